"""What comparisons on a shared machine need: two sides taking turns, wall and CPU time, ratios with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from robopolicy.errors import RobopolicyError
from robopolicy.provenance import provenance


class Times(NamedTuple):
    """Seconds of each repetition. CPU seconds are summed over threads; on a busy machine only they repeat."""

    wall: list[float]
    cpu: list[float]


def measure(function: Callable[[], object], repeats: int) -> Times:
    """Run ``function`` so often, timing each run."""
    times = Times([], [])
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        times.wall.append(time.perf_counter() - wall)
        times.cpu.append(time.process_time() - cpu)
    return times


Block = Callable[[], Times]


class Side(NamedTuple):
    """One contestant: the times of its blocks, in the order in which they ran."""

    name: str
    blocks: list[Times]

    def seconds(self, clock: str) -> float:
        """Median over all repetitions."""
        return statistics.median(t for block in self.blocks for t in getattr(block, clock))

    def speedup(self, other: Side, clock: str) -> tuple[float, float, float]:
        """How many times faster than ``other``: median, least and greatest over the rounds."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        ratios = [statistics.median(getattr(b, clock)) / statistics.median(getattr(a, clock)) for a, b in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)


def take_turns(contestants: dict[str, Block], rounds: int) -> dict[str, Side]:
    """Blocks A B C A B C ...: drift of the machine meets all alike. A first round warms up and is thrown away."""
    sides = {name: Side(name, []) for name in contestants}
    for turn in range(rounds + 1):
        for name, block in contestants.items():
            times = block()
            if turn:
                sides[name].blocks.append(times)
    return sides


def rows(sides: dict[str, Side], reference: str | None, clock: str) -> list[dict[str, Any]]:
    """A row per side for JSON and the table; ``reference`` is what speedups are against."""
    out = []
    for side in sides.values():
        row: dict[str, Any] = {"name": side.name, "wall_s": side.seconds("wall"), "cpu_s": side.seconds("cpu")}
        if reference is not None:
            row["speedup"], row["speedup_min"], row["speedup_max"] = side.speedup(sides[reference], clock)
        row["samples"] = {"wall_s": [b.wall for b in side.blocks], "cpu_s": [b.cpu for b in side.blocks]}
        out.append(row)
    return out


def print_rows(title: str, table: Sequence[dict[str, Any]], unit: str, per: int = 1) -> None:
    """The table; with ``per`` > 1 also how many of ``unit`` per CPU second."""
    print(f"\n{title}")
    for row in table:
        line = f"  {row['name']:<44} {row['wall_s']:9.4f} s wall {row['cpu_s']:9.4f} s CPU"
        if per > 1:
            line += f" {per / row['cpu_s']:10.0f} {unit}/CPU-s"
        if "speedup" in row:
            line += f"   x{row['speedup']:.2f} [{row['speedup_min']:.2f}, {row['speedup_max']:.2f}]"
        print(line, flush=True)


def conditions() -> dict[str, Any]:
    """Versions, processor and load: what a figure means nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return {**provenance(), "cpu": models[0] if models else platform.processor(), "amx_bf16": "amx_bf16" in text}


class Peer:
    """The other side in a process of its own, ``peer.py`` under an interpreter that has lerobot.

    Args:
        python: That interpreter. benchmarks/README.md says how to make one.
    """

    def __init__(self, python: str) -> None:
        command = [python, str(Path(__file__).with_name("peer.py"))]
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        except OSError as error:
            raise RobopolicyError(f"--peer-python '{python}' does not start ({error}); benchmarks/README.md makes one") from error
        self.versions = self.ask(verb="versions")

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer. Raises RobopolicyError when the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise RobopolicyError(f"the peer's process ended at request '{request['verb']}'; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def times(self, **request: Any) -> Times:
        """The times of a request that measures."""
        pairs = self.ask(**request)["times"]
        return Times([wall for wall, _ in pairs], [cpu for _, cpu in pairs])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def finish(document: dict[str, Any], path: Path | None) -> None:
    """Close a benchmark's ``document`` with the conditions at its end, and write it to ``path`` if there is one."""
    document["ended"] = conditions()
    print("load", document["started"]["load"], "->", document["ended"]["load"])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1))
