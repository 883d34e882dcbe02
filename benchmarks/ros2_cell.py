"""A virtual arm and a policy node in processes of their own, on a domain of their own, and a client that runs episodes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from hardware.ros2.contract import LATCHED, message_type
from hardware.ros2.runtime import LOCALHOST, Ros, RosError
from hardware.ros2.services import TRIGGER, call, change_state, set_parameter, until
from hardware.ros2.supervisor import CONFIGURE, READY
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.clock import SystemClock
from robopolicy.policy import Policy, PolicyConfig
from sim.arm.robot import SimArm

ARM, POLICY = "virtual_arm", "robopolicy_policy"
WANDERER_TASK = {"image_size": 48}
_WANDERS = ([0.42, -0.08, 0.10, -0.2, 0.03], [0.52, 0.08, 0.22, 0.2, 0.07])  # between these [m, m, m, rad, m]
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
        domain: ROS domain that nobody else uses.
        logs: Folder for what the processes print.
        arm: Parameters of the virtual arm.
        policy: Parameters of the policy node.

    Attributes:
        said: What the policy node said of itself, oldest first.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        domain: int,
        logs: Path,
        arm: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> None:
        self._arm, self._policy = dict(arm or {}), {"checkpoint": str(Path(checkpoint).resolve()), **(policy or {})}
        self._domain, self._logs = domain, logs
        self.said: list[Said] = []

    def __enter__(self) -> Self:
        os.environ.update(LOCALHOST | {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST", "FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA"})
        environment = os.environ | {"ROS_DOMAIN_ID": str(self._domain), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._logs.mkdir(parents=True, exist_ok=True)
        self._ros = Ros(signals=False, domain=self._domain).__enter__()
        self._processes = {
            name: _start(f"hardware.ros2.{module}", parameters, environment, self._logs / f"{name}.log")
            for name, module, parameters in ((ARM, "virtual_arm", self._arm), (POLICY, "policy_node", self._policy))
        }
        try:
            self.node = self._ros.node("benchmark")
            self.node.create_subscription(message_type("std_msgs/msg/String"), f"{POLICY}/state", self._hear, LATCHED.to_ros())
            self._ros.spin_in_thread()
            until(self._there, READY)
            self.change("configure")
            self.change("activate")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        self._ros.close()
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


def wanderer(folder: Path, image: bool) -> Path:
    """A checkpoint of a policy of the task lift that was never trained: it moves the arm about, and has every input of the task.

    Args:
        folder: For it.
        image: Whether it sees the camera, too.
    """
    arm = SimArm("lift", SystemClock(), **(WANDERER_TASK if image else {}))
    arm.reset(0)
    rng = np.random.default_rng(0)
    values = {name: value for name, value in arm.observe().values.items() if value.dtype != np.uint8}
    normalizers = {name: Normalizer.fit(value + rng.uniform(-1.0, 1.0, (500, value.size))) for name, value in values.items()}
    normalizers["action"] = Normalizer.fit(rng.uniform(*_WANDERS, (500, 5)))
    net = {"horizon": 16, "n_action_steps": 8, "net": {"type": "mlp", "width": 16, "depth": 1}}
    config = parse(PolicyConfig, {**net, "sampler": {"type": "euler", "num_steps": 1}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(config, arm.observation_features, arm.action_feature, normalizers)
    policy.save(folder, {"task": {"name": "lift", "args": WANDERER_TASK if image else {}}})
    arm.close()
    return folder


def _start(module: str, parameters: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    values = [word for key, value in parameters.items() for word in ("-p", f"{key}:={_text(value)}")]
    command = [sys.executable, "-m", module, *(["--ros-args", *values] if values else [])]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
