"""rclpy, set up so that it can be trusted with an arm: one clear error without it, transports, signals, spinning, clocks.

What differs from rclpy's own way, and why: see docs/ros2.md, each has a test.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from robopolicy.deploy.clock import SystemClock
from robopolicy.errors import RobopolicyError

SPIN = 0.1  # [s]: how long one wait for messages lasts at most, so how late an end is noticed

# Only for those who have not set them. LARGE_DATA: best-effort messages above half a megabyte, a raw 640x480 image, are lost
# without a word by Fast DDS's default transports; only rmw_fastrtps reads it.
DEFAULTS = {"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA"}
# Where discovery is LOCALHOST, rmw_fastrtps brings transports of its own and ignores that variable; it minds an XML profile.
LOCALHOST = {"FASTDDS_DEFAULT_PROFILES_FILE": str(Path(__file__).with_name("localhost.xml"))}

# Message packages that the wheels of the extra `ros` bring. Others (control_msgs, tf2_msgs, ...) only a ROS installation has.
_WHEELS = {
    "action_msgs", "actionlib_msgs", "builtin_interfaces", "diagnostic_msgs", "geometry_msgs", "lifecycle_msgs", "nav_msgs",
    "rcl_interfaces", "rosgraph_msgs", "sensor_msgs", "service_msgs", "shape_msgs", "std_msgs", "std_srvs", "stereo_msgs",
    "trajectory_msgs", "type_description_interfaces", "unique_identifier_msgs", "visualization_msgs",
}  # fmt: skip
_OLD = {"foxy", "galactic", "humble", "iron"}  # built for Python 3.10 or older
_INSTALL = "run `make setup` in the checkout, or: uv pip install -e '.[ros]'"


class RosError(RobopolicyError):
    """ROS is absent, incomplete, or does not answer."""


def require() -> None:
    """Import rclpy. Raises RosError that says how to get it here."""
    localhost = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE") == "LOCALHOST"
    for name, value in (DEFAULTS | (LOCALHOST if localhost else {})).items():
        os.environ.setdefault(name, value)  # read when the first node is made
    try:
        import rclpy  # noqa: F401
        import sensor_msgs.msg  # noqa: F401
    except ImportError as error:
        raise RosError(_mend(error)) from error


def _mend(error: ImportError, root: Path = Path("/opt/ros")) -> str:
    """How to get ROS, in one line."""
    here = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    reason = " ".join(str(error).split())
    installed = sorted(path.name for path in root.iterdir() if (path / "setup.bash").is_file()) if root.is_dir() else []
    usable = [name for name in installed if name not in _OLD]
    distribution = os.environ.get("ROS_DISTRO", "")
    if distribution in _OLD or (installed and not usable and not distribution):
        there = f"ROS {distribution} is sourced" if distribution else f"ROS {installed[-1]} is installed"
        return (
            f"{there}, but its packages are built for Python 3.10 or older, and this needs 3.11 or newer ({reason}); "
            "docs/virtual_arm.md#with-a-ros-installation says what works"
        )
    if distribution:
        return (
            f"ROS {distribution} is sourced, but {here} cannot import it ({reason}); use the Python that it was built for, in a "
            "virtual environment made with --system-site-packages"
        )
    if usable:
        return f"ROS is installed but not sourced ({reason}); run: source {root}/{usable[-1]}/setup.bash"
    if importlib.util.find_spec("rclpy") is not None:
        return f"rclpy is installed but incomplete ({reason}); {_INSTALL}"
    machine, system = platform.machine(), platform.system()
    if (system, machine) != ("Linux", "x86_64"):
        return f"there is no rclpy here ({reason}) and no wheel for {system} on {machine}; install ROS 2 or RoboStack, source it"
    return f"there is no rclpy here ({reason}); {_INSTALL}, or source a ROS 2 installation"


def packages_mend(packages: Iterable[str], distribution: str) -> str:
    """How to get message packages that are missing; ``distribution``: of the ROS that is sourced, empty: none is."""
    lacking = sorted(packages)
    if distribution:
        return f"apt install {' '.join(f'ros-{distribution}-{name}'.replace('_', '-') for name in lacking)}"
    mends = [_INSTALL] * any(name in _WHEELS for name in lacking)
    if alone := [name for name in lacking if name not in _WHEELS]:
        debs = " ".join(f"ros-DISTRO-{name}".replace("_", "-") for name in alone)
        mends.append(f"there are no wheels of {', '.join(alone)}: source a ROS installation that has {debs}")
    return "; ".join(mends)


class RosClock(SystemClock):
    """The machine's monotonic clock, and header stamps on it."""

    def made(self, stamp: Any) -> float | None:
        """When ``builtin_interfaces/Time`` was, on the clock of :meth:`now`; None for the zero stamp, which says nothing.

        The wall clock is looked at each time: after it was set, new stamps are right again at once.
        """
        if stamp.sec == 0 and stamp.nanosec == 0:
            return None
        now = self.now()  # first: if this thread is interrupted here, things seem older than they are, not younger
        return now - (time.time_ns() - (stamp.sec * 1_000_000_000 + stamp.nanosec)) * 1e-9

    def stamp(self, moment: float | None = None) -> Any:
        """The header stamp of a moment on :meth:`now`'s clock; None: of now."""
        from builtin_interfaces.msg import Time

        wall = time.time_ns()
        if moment is not None:
            wall -= round((self.now() - moment) * 1e9)
        return Time(sec=wall // 1_000_000_000, nanosec=wall % 1_000_000_000)


class Ros:
    """A context of ROS, its nodes and the thread that spins them::

        with Ros() as ros:
            node = ros.node("robopolicy_policy")
            ros.spin()  # until stop(), SIGINT or SIGTERM; nodes can still publish afterwards

    rclpy's own handler of Ctrl-C ends the context at once, so that no node could send its last commands: this one only says
    that it is time to go. A second Ctrl-C interrupts whatever is going on. Signals are handled where Python allows it, in the
    main thread.

    Args:
        args: Of ROS, ``--ros-args`` and so on; None: none.
        signals: Whether to handle SIGINT and SIGTERM.
        domain: ROS_DOMAIN_ID instead of the environment's.

    Attributes:
        stopping: Set once it is time to end.
    """

    def __init__(self, args: Sequence[str] | None = None, *, signals: bool = True, domain: int | None = None) -> None:
        require()
        self._args, self._domain = list(args or []), domain
        self._signals = signals and threading.current_thread() is threading.main_thread()
        self._handlers: dict[int, Any] = {}
        self._nodes: list[Any] = []
        self._thread: threading.Thread | None = None
        self.fault: BaseException | None = None  # of the spin thread
        self.stopping = threading.Event()

    def __enter__(self) -> Self:
        import rclpy
        from rclpy.executors import ExternalShutdownException
        from rclpy.experimental import EventsExecutor
        from rclpy.signals import SignalHandlerOptions

        self._gone = ExternalShutdownException
        self.context = rclpy.Context()
        rclpy.init(args=self._args, context=self.context, signal_handler_options=SignalHandlerOptions.NO, domain_id=self._domain)
        self.executor = EventsExecutor(context=self.context)
        if self._signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._told)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def node(self, name: str, make: Callable[..., Any] | None = None, **options: Any) -> Any:
        """A node, spun by this. ``make``: its class (default ``rclpy.node.Node``), called as ``make(name, context=..., ...)``."""
        from rclpy.node import Node

        node = (make or Node)(name, context=self.context, **options)
        self._nodes.append(node)
        self.executor.add_node(node)
        return node

    def spin(self, until: Callable[[], bool] | None = None) -> None:
        """Dispatch messages, services and timers in this thread until told to stop, or ``until()``.

        ``EventsExecutor.spin()`` never dispatches anything in the wheels of Kilted and Jazzy; ``spin_once`` with a timeout does.
        """
        while not self.stopping.is_set() and (until is None or not until()):
            self.executor.spin_once(timeout_sec=SPIN)

    def spin_in_thread(self) -> None:
        """The same in a thread of its own."""
        self._thread = threading.Thread(target=self._spin_thread, name="ros", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End spinning, from any thread."""
        self.stopping.set()

    def close(self) -> None:
        """Destroy nodes and context, so that nothing stays in shared memory. May be called twice."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.context.ok():
            self.executor.shutdown()
            for node in self._nodes:
                node.destroy_node()
            self._nodes.clear()
            self.context.try_shutdown()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _spin_thread(self) -> None:
        try:
            self.spin()
        except BaseException as error:  # a callback's, kept: whoever waits for messages reports it
            self.fault = error

    def _told(self, number: int, frame: FrameType | None) -> None:
        if self.stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping.set()
