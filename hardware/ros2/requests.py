"""What people and programs ask of the policy node: start, stop, home, estop, reset, enable, and the deadman.

Whatever stops the arm is heard on the thread of the arm's topics, which never waits; whatever starts it on the main thread, which
may be loading a policy. The emergency stop latches here as well as in the arbiter, because it outlives every arbiter.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from rclpy.event_handler import SubscriptionEventCallbacks
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger

from hardware.ros2.contract import DEADMAN, ESTOP, LATCHED, SENSOR, SIGNAL

if TYPE_CHECKING:
    from hardware.ros2.policy_node import PolicyNode
    from hardware.ros2.robot import RosRobot

_BUSY = 0.3  # [s] that ~/start gives inputs to become fresh
_PLANS = 1.0  # [s] that ~/start waits for the first plan; then it says that it is awaited


class Requests:
    """Services and topics of a node.

    Args:
        node: Offers them.

    Attributes:
        estopped: Why the emergency stop is latched; empty: it is not.
        halts: How often somebody stopped: what starts by itself gives up then.
    """

    def __init__(self, node: PolicyNode) -> None:
        self._node, self.estopped, self.halts = node, "", 0
        io, me = node.io, node.get_fully_qualified_name()
        silent = SubscriptionEventCallbacks(use_default_callbacks=False)  # that one of the three does not match says nothing
        for quality in (SIGNAL, LATCHED, SENSOR):  # an emergency stop is heard whatever its publisher promises
            io.create_subscription(Bool, ESTOP, self._on_estop, quality.to_ros(), event_callbacks=silent)
        io.create_subscription(Bool, DEADMAN, self._on_deadman, SENSOR.to_ros())
        io.create_service(Trigger, f"{me}/stop", functools.partial(self._on_halt, "stop"))
        io.create_service(Trigger, f"{me}/estop", functools.partial(self._on_halt, "estop"))
        node.create_service(Trigger, "~/start", functools.partial(self._on_start, "start"))
        node.create_service(Trigger, "~/home", functools.partial(self._on_start, "home"))
        node.create_service(Trigger, "~/reset", self._on_reset)
        node.create_service(SetBool, "~/enable", self._on_enable)

    # ---- the main thread -----------------------------------------------------------------------------------------------------

    def start(self, name: str = "start") -> tuple[bool, str]:
        """``start`` or ``home``, and what came of it: also of what is only known with the first plan."""
        node = self._node
        deployment, robot = node.deployment, node.robot
        if deployment is None or deployment.arbiter is None or robot is None:
            return False, f"the node is {node.lifecycle}; configure and activate it first"
        if self.estopped:
            return False, f"estopped ({self.estopped}): reset first, then start"
        if problems := [*robot.problems(), *robot.rivals()]:
            return False, problems[0]
        self._catch_up(robot, deployment.limits.freshness.state)
        ok, message = deployment.arbiter.request(name).wait()
        end = time.monotonic() + _PLANS
        while ok:
            status = deployment.arbiter.status
            if status.mode not in ("starting", "running"):
                return False, status.cause.removeprefix("refused: ") or f"the arm is {status.mode}"
            if status.mode == "running":
                break
            if time.monotonic() > end:
                return True, f"{message}; the first plan is awaited"
            time.sleep(0.01)
        return ok, message.removeprefix("refused: ")

    def _catch_up(self, robot: RosRobot, fresh: float) -> None:
        """Messages have waited while this process was busy with loading, or with collecting garbage."""
        end = time.monotonic() + _BUSY
        while time.monotonic() < end and any(slot.age(robot.clock.now()) > fresh for slot in robot.slots.values()):
            time.sleep(0.01)

    def _on_start(self, name: str, request: Any, response: Any) -> Any:
        return self._answer(response, name, *self.start(name))

    def _on_reset(self, request: Any, response: Any) -> Any:
        ok, message = True, "released"
        if (arbiter := self._arbiter()) is not None:
            ok, message = arbiter.request("reset").wait()
        if ok:
            self.estopped = ""
        return self._answer(response, "reset", ok, message)

    def _on_enable(self, request: Any, response: Any) -> Any:
        return self._answer(response, "enable", *(self.start() if request.data else self._halt("stop", "disabled")))

    def _answer(self, response: Any, name: str, ok: bool, message: str) -> Any:
        response.success, response.message = ok, message
        self._node.refuse("" if ok else f"{name} refused: {message}")
        self._node.report()
        return response

    # ---- the thread of the arm's topics --------------------------------------------------------------------------------------

    def _on_halt(self, name: str, request: Any, response: Any) -> Any:
        response.success, response.message = self._halt(name, "asked")
        return response

    def _halt(self, name: str, why: str) -> tuple[bool, str]:
        """``stop`` or ``estop``. Can be done in every state of the node."""
        self.halts += 1
        if name == "estop":
            self.estopped = self.estopped or why
        if (arbiter := self._arbiter()) is None:
            return True, f"the node is {self._node.lifecycle}: nothing moves"
        return arbiter.request(name, why=why).wait()

    def _on_estop(self, message: Bool) -> None:
        if message.data and not self.estopped:
            self._halt("estop", f"topic {ESTOP}")

    def _on_deadman(self, message: Bool) -> None:
        if (arbiter := self._arbiter()) is not None:
            arbiter.request("deadman", pressed=bool(message.data))

    def _arbiter(self) -> Any:
        return None if self._node.deployment is None else self._node.deployment.arbiter
