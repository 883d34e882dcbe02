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
    from rig import Stand
    from ros import Sandbox

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_data(name: str) -> Path:
    """Folder ``name`` of the real recordings beside the checkout."""
    path = SHARED_DATA / name
    if not path.exists():
        absent(f"the recordings '{name}' are not beside this checkout")
    return path


def absent(what: str) -> None:
    """Skip the test because this machine lacks something; fail it under ``CI=true``, which must not pass by skipping."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, although CI=true")
    pytest.skip(what)


@pytest.fixture
def renderer() -> None:
    """For tests that draw with MuJoCo."""
    from sim.render import renderer_available

    if renderer_available() is None:
        absent("no EGL or OSMesa on this machine")


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


@pytest.fixture(scope="module")
def bench(ros_module: "Sandbox", tmp_path_factory: pytest.TempPathFactory) -> Iterator["Stand"]:
    """A policy node and its driver, shared by the tests of a file; see tests/rig.py."""
    from rig import Stand

    stand = Stand(ros_module, tmp_path_factory.mktemp("policies"))
    yield stand
    stand.close()


@pytest.fixture
def stand(bench: "Stand") -> Iterator["Stand"]:
    """Inactive, the arm at home, nothing sent."""
    bench.driver.alive = True
    bench.driver.put()
    if bench.rig.node.lifecycle == "unconfigured":
        assert bench.rig.to("configure"), bench.rig.node.refused
    bench.driver.commands.clear()
    yield bench
    if bench.rig.node.lifecycle == "active":
        assert bench.rig.to("deactivate")
    bench.rig.call("reset")


@pytest.fixture
def active(stand: "Stand") -> "Stand":
    assert stand.rig.to("activate")
    stand.driver.commands.clear()
    return stand


@pytest.fixture
def running(active: "Stand") -> "Stand":
    active.start()
    active.ros.until(lambda: len(active.driver.commands) > 20, what="commands")
    return active
