"""A ROS domain for one program alone: what tests and benchmarks run in, so that two of them never share an arm."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from hardware.ros2 import shm
from hardware.ros2.runtime import DEFAULTS, LOCALHOST, RosError

_DOMAINS = range(20, 102)  # 0 to 19 are left to people
_PORTS = 250  # of each domain
# The next user takes the next domain, and processes begin apart: killed nodes, and their ports, live on for a while.
_NEXT = itertools.count(37 * os.getpid())


@contextmanager
def domain() -> Iterator[int]:
    """A ROS domain for one user alone, another one each time. A bound port is the lock: whatever ends us, the system frees it.

    The port is the last of the domain's own, where the 120th participant would be: no other program is there.

    Raises:
        RosError: All are taken.
    """
    lock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        for _ in _DOMAINS:
            found = _DOMAINS[next(_NEXT) % len(_DOMAINS)]
            first = 7400 + _PORTS * found
            try:
                lock.bind(("127.0.0.1", first + _PORTS - 1))
            except OSError:
                continue
            try:
                yield found
            finally:
                ports = {f"fastdds_port{number}" for number in range(first, first + _PORTS)}  # the domain's, so nobody else's
                shm.remove(path for path in shm.leftovers(age=0.0) if shm.belongs(path, ports))
            return
        raise RosError("all ROS domains from 20 to 101 are taken by tests and benchmarks; end some")
    finally:
        lock.close()


def alone(number: int) -> dict[str, str]:
    """The environment that keeps a domain on this computer, and messages above 0.5 MB from being lost."""
    return {"ROS_DOMAIN_ID": str(number), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", **DEFAULTS, **LOCALHOST}
