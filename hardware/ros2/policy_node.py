"""``robopolicy_policy``: the lifecycle node that lets a policy move an arm: ``python -m hardware.ros2.policy_node``

Threads, and who may wait::

    main        lifecycle, parameters, diagnostics: takes seconds when it loads policies
    ros         joint states, cameras, deadman, estop, ~/start, ~/stop, ...: in the order they come; never waits for the above
    control     Arbiter.run: absolute deadlines, waits for nobody
    inference   in a thread, or in a process of its own

docs/ros2.md has the tables of topics, services, parameters and states.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState

from hardware.ros2 import parameters
from hardware.ros2.contract import SIGNAL
from hardware.ros2.deployment import Deployment, check_fit, deploy, features_of, profile_of, task_of
from hardware.ros2.diagnostics import Reporter
from hardware.ros2.joints import make_model
from hardware.ros2.parameters import NodeConfig
from hardware.ros2.requests import Requests
from hardware.ros2.robot import Absent, RosRobot
from hardware.ros2.runtime import Ros, RosClock, RosError
from robopolicy.deploy.status import Period
from robopolicy.errors import ConfigError, RobopolicyError

NAME = "robopolicy_policy"
_TICK = 0.1  # [s] between diagnostics
_POLL = 0.05  # [s] between looks at what is missing
_PATIENCE = 3.0  # [s] before it is said that something is
_BUSY = 0.3  # [s] that inputs get to become fresh
_NEXT = 0.5  # [s] between steps of autostart: what was asked during one is heard before the next
_AT_CLEANUP = {"profile", "rate", "mode"}  # parameters that the connection to the arm is made of
_ANY_TIME = {"ready_timeout"}
SUCCESS, FAILURE, ERROR = (getattr(TransitionCallbackReturn, name) for name in ("SUCCESS", "FAILURE", "ERROR"))


class PolicyNode(LifecycleNode):
    """See the module. Spun by the main thread; what concerns the arm by ``messages``.

    Args:
        name: Of the node.
        messages: Spins a second node, for the arm's topics, in a thread of its own.
        ending: Set when the program is to end: nothing is waited for then.
        options: Of rclpy's node.

    Attributes:
        io: The second node.
        deployment: Policy and control; None: unconfigured.
        robot: The arm; likewise.
        refused: What was refused last and why; empty after it worked.
        over: The node was shut down; the program may end.
    """

    def __init__(self, name: str, messages: Ros, ending: threading.Event | None = None, **options: Any) -> None:
        super().__init__(name, **options)
        self.deployment: Deployment | None = None
        self.robot: RosRobot | None = None
        self.refused = ""
        self.over = False
        self._time, self._messages, self._ending = RosClock(), messages, ending or threading.Event()
        self._next_step = 0.0  # of autostart
        self._absent = False  # configure failed, and only because a driver was not there
        parameters.declare(self)
        config = parameters.read(self)
        rename = ["--ros-args", "-r", f"__node:={self.get_name()}_io"]  # counts before a __node of the command line
        self.io = messages.node(f"{name}_io", namespace=self.get_namespace(), cli_args=rename)
        me = self.get_fully_qualified_name()
        self._shadow = self.io.create_publisher(JointState, f"{me}/shadow", SIGNAL.to_ros())
        self._commanded = self.io.create_publisher(JointState, f"{me}/commanded", SIGNAL.to_ros())
        self._fault: BaseException | None = None  # of inference, that has been said
        self._followed = False  # somebody listens to ~/commanded
        self.requests, self.reporter = Requests(self, armed=config.autostart), Reporter(self, self._time)
        self._hear_transitions()
        self.add_on_set_parameters_callback(self._on_parameters)
        self.create_timer(_TICK, self._tick)

    @property
    def lifecycle(self) -> str:
        """``unconfigured``, ``inactive``, ``active`` or ``finalized``."""
        return str(self._state_machine.current_state[1])

    @property
    def shadowed(self) -> bool:
        """Nothing is sent to the arm."""
        return self.deployment is not None and self.deployment.config.mode == "shadow"

    def refuse(self, what: str) -> None:
        """Say what was refused, and why: in the log, on ~/state and in diagnostics, until something works (empty)."""
        if what and what != self.refused:
            self.get_logger().error(what)
        self.refused = what

    # ---- lifecycle -----------------------------------------------------------------------------------------------------------

    def _hear_transitions(self) -> None:
        """Whoever asks for a transition ends autostart, also where rclpy refuses it and calls nothing of ours."""
        service = self._service_change_state
        change = service.callback

        def asked(request: Any, response: Any) -> Any:
            self.requests.disarm("a transition was asked for")
            return change(request, response)

        service.callback = asked

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("configure", self._configure)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("activate", self._activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("deactivate", self._deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("cleanup", self._cleanup)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.over = True
        return self._transition("shutdown", self._release)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything: the node is unconfigured then, and may be configured again. What went wrong stays said."""
        said = self.refused
        result = self._transition("error", self._release)
        self.refused = said
        return result

    def _transition(self, name: str, work: Callable[[], None]) -> TransitionCallbackReturn:
        """rclpy swallows what transitions raise, and its answer has no room for a reason."""
        try:
            work()
        except RobopolicyError as error:
            self.refuse(f"{name} refused: {error}")
            return FAILURE if name in ("configure", "activate") else ERROR
        except Exception as error:
            self.get_logger().error(traceback.format_exc())
            self.refuse(f"{name} failed: {type(error).__name__}: {error}")
            return ERROR
        self.refuse("")
        self.get_logger().info(f"{name}: done{'; shadow mode: nothing is sent to the arm' if self.shadowed else ''}")
        return SUCCESS

    def _configure(self) -> None:
        """Connect to the arm, wait until everything comes, load the policy and warm it up."""
        self._absent = False
        config = parameters.read(self)
        profile = profile_of(config)
        model = make_model(profile, *task_of(config.checkpoint))
        if (features := features_of(config.checkpoint)) is not None:
            check_fit(features, model)  # before anything is waited for
        try:
            self.robot = RosRobot(profile, self.io, self._time, model, enabled=config.mode == "live")
            self._await(self.robot, config.ready_timeout)
            self.deployment = deploy(config, self.robot, self._time, profile)
        except BaseException:
            self._release()
            raise

    def _await(self, robot: RosRobot, timeout: float) -> None:
        begun, said = time.monotonic(), False
        while problems := [*robot.problems(), *robot.unheard()]:
            passed, missing = time.monotonic() - begun, "; ".join(problems)
            if passed > timeout or self._ending.wait(_POLL):
                self._absent = all(isinstance(problem, Absent) for problem in problems)
                again = "; it is tried again until they come" if self._absent and self.requests.armed else ""
                raise RosError(f"the robot is not ready after {round(min(passed, timeout), 1):g} s: {missing}{again}")
            if passed > _PATIENCE and not said:
                said = True
                if missing not in self.refused:  # autostart tries again and again
                    self.get_logger().info(f"configure waits for the robot, {timeout:g} s at most: {missing}")

    def _activate(self) -> None:
        assert self.deployment is not None
        if (fault := self.deployment.fault) is not None:
            raise RosError(f"{fault}; cleanup and configure begin another")
        self._names = list(self.deployment.limits.names)
        arbiter = self.deployment.activate(self.requests.estopped, self._show)
        if self.requests.estopped:  # it may have come while there was no arbiter yet
            arbiter.request("estop", why=self.requests.estopped)
        self._catch_up(self.deployment.limits.freshness.state)

    def _catch_up(self, fresh: float) -> None:
        """Messages have waited while this process was busy with freezing what exists: a start now would find them old."""
        assert self.robot is not None
        slots, end = self.robot.slots.values(), time.monotonic() + _BUSY
        while time.monotonic() < end and any(slot.age(self._time.now()) > fresh for slot in slots):
            time.sleep(0.01)

    def _deactivate(self) -> None:
        """The policy ends first, then the arm comes to rest, then nothing is sent any more."""
        if self.deployment is not None:
            self.deployment.deactivate()

    def _cleanup(self) -> None:
        self._release()
        if gone := self.requests.forget():
            self.get_logger().warning(f"forgotten: {' and '.join(gone)} said pressed on the emergency stop's topic, and is gone")

    def _release(self) -> None:
        deployment, robot, self.deployment, self.robot = self.deployment, self.robot, None, None
        try:
            if deployment is not None:
                deployment.close()
        finally:
            if robot is not None:
                robot.close()

    def shutdown(self) -> None:
        """Before the program ends: the arm at rest, inference ended. The context must still be there to send commands."""
        if self.lifecycle in ("unconfigured", "inactive", "active"):
            self.trigger_shutdown()
        else:  # within a transition that a second Ctrl-C interrupted
            self._release()

    # ---- parameters ----------------------------------------------------------------------------------------------------------

    def _on_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Refuses what cannot be, and swaps the policy of an inactive node: the answer says whether it works."""
        changes = [change for change in changes if change.name in NodeConfig.model_fields]
        try:
            config = parameters.read(self, changes)
            changed = {change.name for change in changes if change.value != self.get_parameter(change.name).value}
            if "autostart" in changed:
                raise ConfigError("autostart counts when the node starts, and is not set later; configure, activate, start")
            if self.deployment is not None and changed - _ANY_TIME:
                self._swap(self.deployment, config, changed)
        except RobopolicyError as error:
            self.refuse(f"parameters refused: {error}")
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _swap(self, old: Deployment, config: NodeConfig, changed: set[str]) -> None:
        names = ", ".join(sorted(changed))
        if self.lifecycle == "active":
            raise ConfigError(f"{names}: the node is active; deactivate it first")
        if changed & _AT_CLEANUP:
            raise ConfigError(f"{names}: the node is connected to the arm; cleanup first, then set, then configure")
        assert self.robot is not None
        try:
            new = deploy(config, self.robot, self._time, old.profile)
        except RobopolicyError as error:
            raise ConfigError(f"{error}. The policy of before stays; for one of another task cleanup and configure") from error
        self.deployment = new
        old.close()
        self.refuse("")
        self.get_logger().info(f"swapped {names}; the policy is {config.checkpoint}")

    # ---- ten times a second --------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._messages.fault is not None and not self.over:
            self.refuse(f"the thread of the arm's topics died: {self._messages.fault!r}")
            self.over = True
        if self.deployment is not None and (fault := self.deployment.fault) is not None and fault is not self._fault:
            self._fault = fault  # said once, at once: nobody may be asking for plans
            self.refuse(f"{fault}; deactivate, cleanup and configure begin another")
        self.requests.look()
        self._watch_rivals()
        self._watch_permits()
        self._followed = self._commanded.get_subscription_count() > 0
        if self.requests.armed and time.monotonic() >= self._next_step:
            self._autostart()
            self._next_step = time.monotonic() + _NEXT
        self.report()

    def _watch_rivals(self) -> None:
        """A second master stops an arm that moves; one who commands it, too, is left alone with it, whether it moves or stands.

        Graph and slots are looked at here, not in control.
        """
        arbiter = None if self.deployment is None else self.deployment.arbiter
        if arbiter is None or self.robot is None or arbiter.silent:
            return
        if masters := self.robot.masters():
            self.get_logger().error(masters[0])
            self.requests.halt("mute", masters[0])
        elif arbiter.commanded and (rivals := self.robot.rivals()):
            self.get_logger().error(rivals[0])
            self.requests.halt("stop", rivals[0])

    def _watch_permits(self) -> None:
        """An arm that must not be commanded any more is stopped, and what was held is not sent when it may be again."""
        arbiter = None if self.deployment is None else self.deployment.arbiter
        if arbiter is None or self.robot is None or arbiter.silent:
            return
        if denied := self.robot.denied():
            self.get_logger().error(denied[0])
            self.requests.halt("mute", denied[0])

    def report(self) -> None:
        """~/state and diagnostics, now: whoever was answered finds them up to date."""
        self.reporter.report(
            self.lifecycle, self.refused, self.requests.autostart, self.requests.estopped, self.deployment, self.robot
        )

    def _autostart(self) -> None:
        """One step. It is tried again until the driver is there, and for nothing else: who mends that may stand in the way."""
        if self.lifecycle == "active":
            done, why = self.requests.start(by_itself=True)
            later = isinstance(why, Absent)
            self.refuse(f"autostart waits: {why}" if later and not done else "")
        else:
            step = self.trigger_configure if self.lifecycle == "unconfigured" else self.trigger_activate
            done, why = step() == SUCCESS, self.refused
            later = self._absent
        if not done and not later and self.requests.disarm(why):
            self.refuse("")  # that says it

    def _show(self, period: Period) -> None:
        """What was wanted, to who listens, and in shadow mode what would have been sent. On the control thread: 0.1 ms each."""
        if self._followed and period.target.positions is not None:
            self._commanded.publish(self._positions(period, period.target.positions))
        if period.result.executed is not None and self.shadowed:
            self._shadow.publish(self._positions(period, period.result.executed))

    def _positions(self, period: Period, positions: np.ndarray) -> JointState:
        message = JointState(name=self._names, position=positions.tolist())
        message.header.stamp = self._time.stamp(period.tick.start)
        return message


def main(args: Sequence[str] | None = None) -> int:
    """Until Ctrl-C or shutdown: then the arm comes to rest, the last commands are sent, and nodes are destroyed."""
    arguments = list(sys.argv if args is None else args)
    try:
        with Ros(arguments) as ros, Ros(arguments, signals=False) as messages:
            node = ros.node(NAME, PolicyNode, messages=messages, ending=ros.stopping)
            messages.spin_in_thread()
            try:
                ros.spin(until=lambda: node.over)
            finally:
                node.shutdown()
            return 1 if messages.fault is not None else 0
    except (RobopolicyError, ParameterException) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
