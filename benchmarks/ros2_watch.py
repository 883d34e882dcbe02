"""Looking at a running :class:`benchmarks.ros2_cell.Cell` from outside: its messages, its processes' time and memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ros2_cell import ARM, POLICY, Cell
from hardware.ros2.contract import COMMAND, DIAGNOSTICS, DIAGNOSTICS_TOPIC, SENSOR, message_type
from hardware.ros2.profile import RosProfile
from hardware.ros2.services import TRIGGER, call

_TICK = os.sysconf("SC_CLK_TCK")
RANKS = ("p50", "p95", "p99", "p99.9", "max")


class WatchedCell(Cell):
    """A cell whose processes can be looked at."""

    def pid(self, name: str) -> int:
        """Of ``virtual_arm`` or ``robopolicy_policy``."""
        return int(self._processes[name].pid)

    def inference(self) -> int | None:
        """The process that the policy node has for inference; None: there is none."""
        found = [pid for pid in children(self.pid(POLICY)) if b"robopolicy.deploy.process" in _command(pid)]
        return found[0] if found else None

    def record(self) -> dict[str, Any]:
        """What the simulator has seen, also when the policy node is gone."""
        found: dict[str, Any] = json.loads(call(self.node, f"{ARM}/record", TRIGGER, timeout=20.0).message)
        return found

    def pids(self) -> dict[str, int]:
        """Of all that live."""
        found = {name: process.pid for name, process in self._processes.items() if process.poll() is None}
        inference = self.inference()
        return found if inference is None else found | {"inference": inference}


class Watch:
    """Listens to commands, diagnostics and pictures.

    Attributes:
        commands: When each command came, on the monotonic clock [s].
        targets: What it said.
        reports: Diagnostics: when, and ``entry -> key -> text``.
        pictures: How many came.
    """

    def __init__(self, cell: Cell, profile: RosProfile, cameras: bool) -> None:
        self.commands: list[float] = []
        self.targets: list[np.ndarray] = []
        self.reports: list[tuple[float, dict[str, dict[str, str]]]] = []
        self.pictures = 0
        quality = COMMAND._replace(depth=100)
        command = message_type("std_msgs/msg/Float64MultiArray")
        cell.node.create_subscription(command, profile.command.topic, self._commanded, quality.to_ros())
        diagnostics = message_type("diagnostic_msgs/msg/DiagnosticArray")
        cell.node.create_subscription(diagnostics, DIAGNOSTICS_TOPIC, self._reported, DIAGNOSTICS.to_ros())
        if cameras:  # drawn only where somebody looks
            image = message_type("sensor_msgs/msg/Image")
            for source in profile.inputs.values():
                if source.type != "pose":
                    topic = source.topic.removesuffix("/compressed")
                    cell.node.create_subscription(image, topic, self._pictured, SENSOR.to_ros(), raw=True)

    def _commanded(self, message: Any) -> None:
        self.commands.append(time.monotonic())
        self.targets.append(np.array(message.data))

    def _reported(self, message: Any) -> None:
        entries = {s.name.rpartition(": ")[2]: {v.key: v.value for v in s.values} for s in message.status}
        self.reports.append((time.monotonic(), entries))

    def _pictured(self, raw: bytes) -> None:
        self.pictures += 1


def values(reports: Sequence[Mapping[str, Mapping[str, str]]], entry: str, key: str) -> np.ndarray:
    """One figure out of all reports that have it."""
    return np.array([float(report[entry][key]) for report in reports if key in report.get(entry, {})])


def ranks(numbers: np.ndarray) -> dict[str, float]:
    """p50 to the largest; empty without numbers."""
    if not len(numbers):
        return {}
    return {rank: float(np.max(numbers) if rank == "max" else np.percentile(numbers, float(rank[1:]))) for rank in RANKS}


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started, and those that they have."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def cpu_seconds(pid: int) -> float:
    """Of processor time so far; 0 of a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICK


def memory_mb(pid: int) -> float:
    """Resident; NaN of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
