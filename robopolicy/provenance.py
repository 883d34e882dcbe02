"""What produced a file: git commit, package versions, machine. Recorded in every checkpoint and result."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("robopolicy", "torch", "numpy", "zarr", "gymnasium", "mujoco", "robosuite", "gym-pusht", "pymunk")


def provenance() -> dict[str, Any]:
    """Git commit (None outside a checkout), versions of what is installed, Python, platform, load, UTC time."""
    return {
        **_constant(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@cache
def _constant() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "git": _git(),
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _git() -> str | None:
    """Commit of the checkout this package runs from, with ``-dirty`` when files differ; None when it is not a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
