"""The state of the machine: what a latency means nothing without. And work for it, to see what load does."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robopolicy.provenance import provenance

# Ends by itself when the process that started it has gone.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(20000))\n"


def machine() -> dict[str, Any]:
    """Processor, kernel, power governor, affinity, scheduling and load, with versions; None for what cannot be read."""
    models = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        **provenance(),
        "cpu": models[0] if models else platform.processor() or None,
        "kernel": platform.release(),
        "preemption": "PREEMPT_RT" if "PREEMPT_RT" in platform.version() else platform.version(),
        "governor": next(iter(_lines("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")), None),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "scheduler": {0: "SCHED_OTHER", 1: "SCHED_FIFO", 2: "SCHED_RR"}.get(os.sched_getscheduler(0), "other")
        if hasattr(os, "sched_getscheduler")
        else None,
    }


def runtime_versions() -> dict[str, str]:
    """Of the runtimes that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "onnxruntime", "openvino"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute all the time, while the block runs."""
    started = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
