"""Shared memory of Fast DDS: what processes leave behind in /dev/shm when they are killed, and its removal. No ROS.

A participant holds a lock on ``fastdds_<id>_el`` as long as it lives; the system lets go of it however the process ends. So what
is there without a lock is left over. (`fastdds shm clean` does the same where it works: the one from packages wants psutil.)
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"^(?:sem\.)?(fastdds_(?:port)?[0-9a-f]+)(?:_el|_sl|_mutex)?$")


def leftovers(age: float = 1.0, folder: Path = FOLDER) -> list[Path]:
    """Files whose owner is gone, and which are older than ``age`` [s]: a participant makes its files before it locks them."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*fastdds_*")):
        if match := _NAME.match(path.name):
            groups.setdefault(match[1], []).append(path)
    locked, before = _locked(), time.time() - age
    found: list[Path] = []
    for paths in groups.values():
        try:
            stats = [path.stat() for path in paths]
        except FileNotFoundError:  # its owner ends just now
            continue
        if all(stat.st_ino not in locked and stat.st_ctime < before for stat in stats):
            found += paths
    return found


def segments(pid: int) -> set[str]:
    """Names ``fastdds_...`` that a process uses; empty when it is gone.

    Not the ports below 7400: all domains share them, and somebody else may be about to open the one that was let go.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    names = {match[1] for line in maps.splitlines() if (match := _NAME.match(line.rsplit("/", 1)[-1]))}
    return {name for name in names if not re.fullmatch(r"fastdds_port7[0-3]\d\d", name)}


def remove(paths: Iterable[Path]) -> int:
    """Delete them; the number of bytes that were free'd."""
    freed = 0
    for path in paths:
        try:
            size = path.stat().st_size
            path.unlink()
        except OSError:  # gone, or somebody else's
            continue
        freed += size
    return freed


def belongs(path: Path, names: set[str]) -> bool:
    """Whether a file is of one of the segments ``fastdds_...``."""
    match = _NAME.match(path.name)
    return match is not None and match[1] in names


def _locked() -> set[int]:
    """Inodes with a lock on them."""
    lines = Path("/proc/locks").read_text().splitlines()
    return {int(line.split(":")[-1].split()[0]) for line in lines if line.count(":") >= 3}
