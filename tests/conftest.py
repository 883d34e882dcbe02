"""Shared fixtures. Threads are pinned before torch is imported: small networks are slower on a thread pool than on one thread."""

import os

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("MUJOCO_GL", "egl")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ros import Sandbox

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """Folder ``name`` of the real recordings beside the checkout. Skips the test when it is absent, fails under ``CI=true``."""
    path = SHARED_DATA / name
    if not path.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is absent although CI=true")
        pytest.skip(f"the recordings '{name}' are not beside this checkout")
    return path


@pytest.fixture
def ros() -> Iterator["Sandbox"]:
    """ROS 2 on a domain of the test's own; see tests/ros.py."""
    from ros import sandbox

    with sandbox() as box:
        yield box


@pytest.fixture(scope="module")
def ros_module() -> Iterator["Sandbox"]:
    """The same, shared by the tests of a file: for nodes that take long to start."""
    from ros import sandbox

    with sandbox() as box:
        yield box
