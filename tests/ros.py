"""ROS 2 in tests: a domain that nobody else has, nodes in processes, time-outs on every wait, and nothing left behind.

The fixtures ``ros`` (a test's own) and ``ros_module`` (shared by the tests of a file) in conftest.py give a :class:`Sandbox`::

    def test_it_moves(ros):
        arm = ros.start("hardware.ros2.virtual_arm", profile="virtual")
        state = ros.message(JointState, "joint_states")
        assert ros.call(Trigger, "robopolicy_policy/start").success
        arm.kill()                      # as kill -9; ros.start(...).send(signal.SIGINT), .wait(5), .output()
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hardware.ros2 import shm
from hardware.ros2.domain import alone, domain

ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1


class Process:
    """A node in a process of its own, with what it starts in turn."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.command = command
        self._log = tempfile.NamedTemporaryFile(dir=folder, suffix=".log", delete=False)  # noqa: SIM115 (its life is ours)
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        self._segments: set[str] = set()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def output(self) -> str:
        """What it has printed so far, to either stream."""
        return Path(self._log.name).read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Its exit code. Fails the test when it does not end."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{' '.join(self.command[1:4])} did not end within {seconds:g} s:\n{self.output()}")

    def wait_for_output(self, text: str, seconds: float = 30.0) -> str:
        """Until it has printed ``text``; everything printed."""
        end = time.monotonic() + seconds
        while text not in (output := self.output()):
            if time.monotonic() > end or not self.alive:
                pytest.fail(f"'{text}' was not printed within {seconds:g} s by {' '.join(self.command[1:4])}:\n{output}")
            time.sleep(0.05)
        return output

    def kill(self) -> None:
        """kill -9, with all that it started."""
        self._segments |= shm.segments(self.pid)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()

    def clean(self) -> None:
        """Delete what it left in /dev/shm."""
        self._log.close()
        shm.remove(path for path in shm.leftovers(age=0.0) if shm.belongs(path, self._segments))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Sandbox:
    """A domain, the processes in it, and a node of the test's own to look at them with.

    Attributes:
        domain: Its number.
        folder: For files; deleted afterwards.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.domain, self.folder = number, folder
        self.processes: list[Process] = []
        self._node: Any = None

    @property
    def environment(self) -> dict[str, str]:
        """For processes; it is this one's, too."""
        return os.environ | environment(self.domain)

    # ---- processes -----------------------------------------------------------------------------------------------------------

    def start(self, module: str, *arguments: str, node: str | None = None, namespace: str = "", **parameters: Any) -> Process:
        """``python -m module arguments --ros-args -p key:=value``. Dots in parameters' names: ``**{"faults.drop": 0.5}``."""
        command = [sys.executable, "-m", module, *arguments]
        remaps = [f"__node:={node}"] * (node is not None) + [f"__ns:=/{namespace}"] * bool(namespace)
        if remaps or parameters:
            command += ["--ros-args", *(word for rule in remaps for word in ("-r", rule))]
            command += [word for key, value in parameters.items() for word in ("-p", f"{key}:={_text(value)}")]
        return self.run(command)

    def run(self, command: list[str]) -> Process:
        """Any command, in this domain."""
        self.processes.append(Process(command, self.environment, self.folder))
        return self.processes[-1]

    def close(self) -> None:
        """End everything, politely first."""
        if self._node is not None:
            self._executor.shutdown()
            self._node.destroy_node()
            self._context.try_shutdown()
        alive = [process for process in self.processes if process.alive]
        for process in alive:
            process.send(signal.SIGINT)
        end = time.monotonic() + 5.0
        while time.monotonic() < end and any(process.alive for process in alive):
            time.sleep(0.02)
        for process in self.processes:
            process.kill()  # also what a dead one left running
        for process in self.processes:
            process.clean()

    # ---- the test's own node -------------------------------------------------------------------------------------------------

    @property
    def node(self) -> Any:
        """An rclpy node in this process, in a context of its own; waiting spins it."""
        if self._node is None:
            import rclpy
            from rclpy.executors import SingleThreadedExecutor

            self._context = rclpy.Context()
            rclpy.init(context=self._context, domain_id=self.domain)
            self._node = rclpy.create_node(f"test_{os.getpid()}", context=self._context)
            self._executor = SingleThreadedExecutor(context=self._context)
            self._executor.add_node(self._node)
        return self._node

    def spin(self, seconds: float) -> None:
        """Let callbacks run for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            assert self.node is not None
            self._executor.spin_once(timeout_sec=min(left, 0.05))

    def until(self, condition: Callable[[], Any], seconds: float = 20.0, what: str = "") -> Any:
        """Spin until ``condition()`` is true, and return it; after ``seconds`` fail the test with what the processes printed."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                self.fail(f"{what or 'the condition'} did not come within {seconds:g} s")
            assert self.node is not None
            self._executor.spin_once(timeout_sec=0.02)
        return value

    def fail(self, reason: str) -> None:
        """Fail the test, with what the processes printed."""
        printed = "\n".join(f"--- {' '.join(p.command[1:4])} (exit {p.popen.poll()})\n{p.output()}" for p in self.processes)
        pytest.fail(f"{reason}\n{printed}")

    def messages(self, kind: Any, topic: str, count: int = 1, seconds: float = 20.0, qos: Any = None) -> list[Any]:
        """The next ``count`` messages. Subscribes as best effort, which every publisher fits."""
        from rclpy.qos import qos_profile_sensor_data

        found: list[Any] = []
        subscription = self.node.create_subscription(kind, topic, found.append, qos or qos_profile_sensor_data)
        try:
            self.until(lambda: len(found) >= count, seconds, f"{count} messages on {topic}")
        finally:
            self.node.destroy_subscription(subscription)
        return found

    def message(self, kind: Any, topic: str, seconds: float = 20.0, qos: Any = None) -> Any:
        """The next message."""
        return self.messages(kind, topic, 1, seconds, qos)[0]

    def call(self, kind: Any, service: str, request: Any = None, seconds: float = 20.0) -> Any:
        """The answer of a service, which is waited for first."""
        client = self.node.create_client(kind, service)
        try:
            self.until(client.service_is_ready, seconds, f"service {service}")
            future = client.call_async(request if request is not None else kind.Request())
            self.until(future.done, seconds, f"the answer of {service}")
            return future.result()
        finally:
            self.node.destroy_client(client)

    def set(self, node: str, **parameters: Any) -> list[str]:
        """Set parameters of a running node: the reasons of those refused. Dots in names: ``**{"faults.drop": 0.5}``."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        values = [Parameter(key, value=value).to_parameter_msg() for key, value in parameters.items()]
        answer = self.call(SetParameters, f"{node}/set_parameters", SetParameters.Request(parameters=values))
        return [result.reason for result in answer.results if not result.successful]

    def change_state(self, node: str, transition: str, seconds: float = 30.0) -> bool:
        """``configure``, ``activate``, ``deactivate`` or ``cleanup`` a lifecycle node: whether it worked."""
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        number = getattr(Transition, f"TRANSITION_{transition.upper()}")
        request = ChangeState.Request(transition=Transition(id=number))
        return bool(self.call(ChangeState, f"{node}/change_state", request, seconds).success)


def environment(number: int) -> dict[str, str]:
    """For processes in a domain."""
    return {
        **alone(number),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl"),
        "PYTHONUNBUFFERED": "1",
    }


def _text(value: Any) -> str:
    """As ``--ros-args -p`` reads it: YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(list(value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """A :class:`Sandbox`; whatever happens in between, its processes are ended, and its files deleted."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, domain() as number:
        for key, value in environment(number).items():
            patch.setenv(key, value)
        box = Sandbox(number, Path(folder))
        try:
            yield box
        finally:
            box.close()
