"""A virtual arm and a policy node in processes of their own, on a domain that is free, and a client that runs episodes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from unittest import mock

from hardware.ros2.contract import LATCHED, message_type
from hardware.ros2.domain import alone, domain
from hardware.ros2.runtime import Ros, RosError
from hardware.ros2.services import TRIGGER, call, change_state, set_parameter, until
from hardware.ros2.supervisor import CONFIGURE, READY

ARM, POLICY = "virtual_arm", "robopolicy_policy"
_END = 15.0  # [s]: for a process to end after Ctrl-C


class Said(NamedTuple):
    """One message of the policy node's ``~/state``."""

    time: float
    mode: str
    cause: str


class Cell:
    """Use as a context manager: the processes are there inside it.

    Args:
        checkpoint: The policy.
        logs: Folder for what the processes print.
        arm: Parameters of the virtual arm.
        policy: Parameters of the policy node.

    Attributes:
        said: What the policy node said of itself, oldest first.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        logs: Path,
        arm: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> None:
        self._arm, self._policy = dict(arm or {}), {"checkpoint": str(Path(checkpoint).resolve()), **(policy or {})}
        self._logs, self._processes = logs, dict[str, subprocess.Popen[bytes]]()
        self.said: list[Said] = []

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            environment = alone(stack.enter_context(domain())) | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            stack.enter_context(mock.patch.dict(os.environ, environment))
            stack.callback(self._end)
            for name, module, parameters in ((ARM, "virtual_arm", self._arm), (POLICY, "policy_node", self._policy)):
                self._processes[name] = _start(f"hardware.ros2.{module}", parameters, self._logs / f"{name}.log")
            ros = stack.enter_context(Ros(signals=False))
            self.node = ros.node("benchmark")
            self.node.create_subscription(message_type("std_msgs/msg/String"), f"{POLICY}/state", self._hear, LATCHED.to_ros())
            ros.spin_in_thread()
            until(self._there, READY)
            self.change("configure")
            self.change("activate")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _end(self) -> None:
        for process in reversed(self._processes.values()):  # the policy first: it brings the arm to rest
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _hear(self, message: Any) -> None:
        found = json.loads(message.data)
        self.said.append(Said(time.monotonic(), found["mode"], found["cause"]))

    # ---- what is asked -------------------------------------------------------------------------------------------------------

    def trigger(self, node: str, service: str, timeout: float = 20.0) -> str:
        """Call a Trigger. Raises RosError when it is refused, and says which process has died if one has."""
        self._alive()
        return str(call(self.node, f"{node}/{service}", TRIGGER, timeout=timeout).message)

    def _there(self) -> bool:
        """Both processes live and offer what is called first."""
        offered = {name for name, _ in self.node.get_service_names_and_types()}
        return self._alive() and {f"/{ARM}/record", f"/{POLICY}/change_state"} <= offered

    def _alive(self) -> bool:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RosError(f"{name} has ended with code {process.returncode}; see {self._logs / name}.log")
        return True

    def change(self, transition: str) -> None:
        """A lifecycle transition of the policy node. Raises RosError with what the node says."""
        if not change_state(self.node, POLICY, transition, CONFIGURE):
            raise RosError(f"{transition} failed; see {self._logs / POLICY}.log")

    def record(self) -> dict[str, Any]:
        """What the simulator has seen since the last reset."""
        found: dict[str, Any] = json.loads(self.trigger(ARM, "record"))
        return found

    def faults(self, stream: str, values: Mapping[str, float | bool]) -> None:
        for name, value in values.items():
            set_parameter(self.node, ARM, f"faults.{stream}.{name}", value)

    def begin(self, seed: int) -> None:
        """Put the arm where the episode of ``seed`` begins, clear the record, start the policy.

        The node is inactive meanwhile: one that is active would refuse to start, because something has moved the arm.
        """
        self.trigger(ARM, "clear_faults")
        self.change("deactivate")
        set_parameter(self.node, ARM, "seed", seed)
        self.trigger(ARM, "reset")
        time.sleep(0.1)  # states from before are gone
        self.change("activate")
        self.trigger(ARM, "clear_record")
        self.trigger(POLICY, "start")

    @property
    def mode(self) -> str:
        """Of the policy node, as it said last."""
        return self.said[-1].mode if self.said else ""


def _start(module: str, parameters: Mapping[str, Any], log: Path) -> subprocess.Popen[bytes]:
    values = [word for key, value in parameters.items() for word in ("-p", f"{key}:={_text(value)}")]
    command = [sys.executable, "-m", module, *(["--ros-args", *values] if values else [])]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
