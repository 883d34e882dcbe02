"""What people and programs ask of the policy node: start, stop, home, estop, reset, enable, and the deadman.

All of it is heard on the thread of the arm's topics, which never waits for the main thread, and in the order in which it comes: a
start never overtakes the stop that follows it. The emergency stop latches here as well as in the arbiter, because it outlives
every arbiter.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rclpy.event_handler import SubscriptionEventCallbacks
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger

from hardware.ros2.contract import DEADMAN, ESTOP, LATCHED, SENSOR, SIGNAL
from hardware.ros2.inputs import with_origin
from hardware.ros2.robot import Absent
from hardware.ros2.topics import UNKNOWN
from robopolicy.deploy.requests import mend

if TYPE_CHECKING:
    from hardware.ros2.policy_node import PolicyNode
    from robopolicy.deploy.arbiter import Arbiter
    from robopolicy.deploy.requests import Ticket

_PRESSES = 10  # messages of the emergency stop that may wait: a press is heard though its release follows at once
_FORGET = "deactivate, cleanup and configure the node (that forgets it), and reset"
# Up, from a lifecycle state, to where a start is granted; from others it is the whole.
_WAY = {"configuring": ("activate",), "inactive": ("activate",), "deactivating": ("activate",), "activating": (), "active": ()}
Said = tuple[bool, str]  # whether it was done, and what there is to say


@dataclass
class _Button:
    """A publisher of the emergency stop. Times are counts of the messages that have come.

    Attributes:
        since: When it was first heard.
        pressed: When it last said so; 0: what it said last is that it is released.
        node: Whose it is; empty: not known yet.
        told: A reset was refused because it is gone and pressed.
    """

    since: int
    pressed: int = 0
    node: str = ""
    told: bool = False


class Requests:
    """Services and topics of a node.

    Args:
        node: Offers them.
        armed: The node starts by itself.

    Attributes:
        estopped: Why the emergency stop is latched; empty: it is not.
        armed: Autostart is not over: it has not started, nobody has asked for anything, and nothing but a driver is missing.
        disarmed: Why it was over without a start; empty: it was not, or somebody has started since.
    """

    def __init__(self, node: PolicyNode, armed: bool = False) -> None:
        self._node, self.estopped, self.armed, self.disarmed = node, "", armed, ""
        self._lock = threading.Lock()  # autostart asks from the main thread
        self._buttons: dict[bytes | None, _Button] = {}  # by gid; None: those that cannot be told apart
        self._heard, self._blind = 0, False  # messages of the emergency stop; the middleware does not say whose they are
        io, me = node.io, node.get_fully_qualified_name()
        silent = SubscriptionEventCallbacks(use_default_callbacks=False)  # that one of the three does not match says nothing
        for quality in (SIGNAL, LATCHED, SENSOR):  # an emergency stop is heard whatever its publisher promises
            deep, hear = quality._replace(depth=_PRESSES).to_ros(), with_origin(self._on_estop)
            self._button = io.create_subscription(Bool, ESTOP, hear, deep, event_callbacks=silent)
        io.create_subscription(Bool, DEADMAN, self._on_deadman, SENSOR.to_ros())
        for name, act in (("start", self.start), ("home", self.home), ("reset", self.reset)):
            io.create_service(Trigger, f"{me}/{name}", functools.partial(self._on_trigger, name, act))
        for name in ("stop", "estop"):
            io.create_service(Trigger, f"{me}/{name}", functools.partial(self._on_halt, name))
        io.create_service(SetBool, f"{me}/enable", self._on_enable)

    def start(self, name: str = "start", by_itself: bool = False) -> Said:
        """``start`` or ``home``: granted; or refused and why, Absent where a driver ends that by coming.

        What comes of it later, with the first plan, is in ~/state.

        Args:
            name: Which.
            by_itself: Autostart asks: refused once that is over.
        """
        node, arbiter = self._node, self._arbiter()
        robot = node.robot
        if node.lifecycle != "active" or arbiter is None or robot is None:
            return False, f"the node is {node.lifecycle}; {self._way(name)}"
        if (fault := getattr(node.deployment, "fault", None)) is not None and name == "start":
            return False, f"{fault}; deactivate, cleanup and configure begin another"
        problems = [*robot.problems(), *robot.hindrances()]
        if problems:  # first what no driver ends by coming
            return False, min(problems, key=lambda problem: isinstance(problem, Absent))
        with self._lock:  # who stops now stops what is asked for here
            if self.estopped:
                return False, f"estopped ({self.estopped}): reset first, then start"
            if by_itself and not self.armed:
                return False, f"{self.disarmed}; {self._way()}"
            ticket = arbiter.request(name)
        ok, message = ticket.wait()
        if ok:
            with self._lock:
                if self.armed or not by_itself:  # else somebody has ended autostart since it asked
                    self.armed, self.disarmed = False, ""
            return ok, message + ("; shadow mode: nothing is sent to the arm" if node.shadowed else "")
        why = robot.explained(message.removeprefix("refused: "))
        return ok, why if isinstance(why, Absent) else why + mend(message)

    @property
    def autostart(self) -> str:
        """``waits`` until it is over; then why it is off, or empty: it has started, or was never asked for."""
        with self._lock:
            armed, off = self.armed, self.disarmed
        return "waits" if armed else f"{off}; {self._way()}" if off else ""

    def disarm(self, why: str) -> str:
        """Autostart is over, for good. What there is to say of that; empty: it was over before."""
        with self._lock:
            off = self._disarm(why)
        return self._tell(off)

    def _disarm(self, why: str) -> str:
        if not self.armed:
            return ""
        self.armed, self.disarmed = False, f"autostart is off: {why}"
        return self.disarmed

    def _tell(self, off: str) -> str:
        if not off:
            return ""
        way = self._way()
        self._node.get_logger().warning(f"{off}; {way}")
        return f"autostart is off; {way}"

    def _way(self, name: str = "start") -> str:
        """What a person does, from where the node is, for the arm to move."""
        return f"to go on: {', '.join([*_WAY.get(self._node.lifecycle, ('configure', 'activate')), name])}"

    def home(self) -> Said:
        return self.start("home")

    def reset(self) -> Said:
        if pressed := self._pressed():
            return False, pressed
        ok, message = True, "released"
        if (arbiter := self._arbiter()) is not None:
            ok, message = arbiter.request("reset").wait()
        if ok:
            self.estopped, there = "", self._there()
            with self._lock:
                self._buttons = {key: button for key, button in self._buttons.items() if key in there}
        return ok, message

    def forget(self) -> list[str]:
        """Buttons that were pressed, are gone, and for which a reset was refused: forgotten. Which; the stop stays latched.

        At a cleanup, which a person asks for: there is no other way to go on when such a button never comes back.
        """
        there = self._there()
        with self._lock:
            here = set(there) | ({None} if there else set())
            gone = {key: button for key, button in self._buttons.items() if button.told and key not in here}
            for key in gone:
                del self._buttons[key]
        return [button.node or "a button" for button in gone.values()]

    def look(self) -> None:
        """Names of buttons that discovery has told since they were heard. Now and then: one that leaves takes its name along."""
        with self._lock:
            nameless = any(key is not None and not button.node for key, button in self._buttons.items())
        if nameless:
            self._there()

    def _pressed(self) -> str:
        """Which button still says pressed, and what a person does about it; empty: none."""
        topic, there = self._button.topic_name, self._there()
        with self._lock:
            for key, button in sorted(self._buttons.items(), key=lambda item: item[0] not in there):  # whom one can press first
                if not button.pressed or self._released(button, key in there):
                    continue
                who = button.node or "a button"
                if self._blind and (key is None or len(there) > 1):
                    button.told = True
                    names = " and ".join(there.values()) or "nobody any more"
                    return (
                        f"pressed was said on '{topic}', and which of several publishers says what is not known here; now there: "
                        f"{names}. Release all, end them, {_FORGET}; keep one publisher"
                    )
                if key in there:
                    return f"{who} still says pressed on '{topic}'; release the button there, then reset"
                button.told = True
                return (
                    f"{who} said pressed on '{topic}' and is gone: start it again, release it, then reset. If it never comes "
                    f"back, and you have seen that it is released: {_FORGET}"
                )
        return ""

    def _released(self, button: _Button, here: bool) -> bool:
        """Whether a button that is gone came back as another publisher of the same node, and says released."""
        again = (other for other in self._buttons.values() if other.node == button.node and other.since > button.pressed)
        return not here and bool(button.node) and any(not other.pressed for other in again)

    def _there(self) -> dict[bytes, str]:
        """Who publishes the emergency stop: full names of nodes by gid; empty where the name is not known yet.

        Discovery may have a publisher before it has its node, so what a button said first often comes without a name.
        """
        infos = self._node.io.get_publishers_info_by_topic(self._button.topic_name)
        known = {bytes(info.endpoint_gid): info for info in infos}
        there = {
            gid: "" if info.node_name == UNKNOWN else f"{info.node_namespace.rstrip('/')}/{info.node_name}"
            for gid, info in known.items()
        }
        with self._lock:
            for key, button in self._buttons.items():
                if key is not None:
                    button.node = button.node or there.get(key, "")
        return there

    def halt(self, name: str, why: str) -> Ticket | None:
        """``stop``, ``mute`` or ``estop``, in every state of the node. None: there is no control that could move anything."""
        return self._halt(name, why)[0]

    def _halt(self, name: str, why: str) -> tuple[Ticket | None, str]:
        """The same, and what there is to say of autostart. Nothing is granted or said between its end and the stop."""
        with self._lock:
            off = self._disarm(f"{name} ({why})")
            if name == "estop":
                self.estopped = self.estopped or why
            arbiter = self._arbiter()
            ticket = None if arbiter is None else arbiter.request(name, why=why)
        return ticket, self._tell(off)

    # ---- services and topics -------------------------------------------------------------------------------------------------

    def _on_trigger(self, name: str, act: Callable[[], Said], request: Any, response: Any) -> Any:
        off = self.disarm(f"{name} was asked for")
        try:
            ok, message = act()
        except Exception as error:  # of an arm that the main thread lets go of; this thread must live on, to hear stops
            ok, message = False, f"{type(error).__name__}: {error}"
        if off and self.disarmed:  # a start that is granted says enough
            message += f"; {off}"
        self._node.refuse("" if ok else f"{name} refused: {message}")
        self._node.report()
        response.success, response.message = ok, message
        return response

    def _on_halt(self, name: str, request: Any, response: Any, why: str = "asked") -> Any:
        ticket, off = self._halt(name, why)
        nothing = True, f"the node is {self._node.lifecycle}: nothing moves"
        response.success, message = nothing if ticket is None else ticket.wait()
        response.message = f"{message}; {off}" if off else message
        if off:
            self._node.report()
        return response

    def _on_enable(self, request: Any, response: Any) -> Any:
        if request.data:
            return self._on_trigger("enable", self.start, request, response)
        return self._on_halt("stop", request, response, "disabled")

    def _on_estop(self, message: Bool, origin: bytes | None = None) -> None:
        if message.data:  # again, too: a reset may be on its way
            self.halt("estop", f"topic {ESTOP}")
        there = self._there()
        self._blind = origin is None
        if origin is None and len(there) == 1:  # only one can have said it
            (origin,) = there
        with self._lock:
            self._heard += 1
            button = self._buttons.setdefault(origin, _Button(self._heard))
            if origin is not None:
                button.node = button.node or there.get(origin, "")
            if message.data:
                button.pressed, button.told = self._heard, False
            elif origin is not None:  # a release by anyone of several releases nothing
                button.pressed = 0

    def _on_deadman(self, message: Bool) -> None:
        if (arbiter := self._arbiter()) is not None:
            arbiter.request("deadman", pressed=bool(message.data))

    def _arbiter(self) -> Arbiter | None:
        deployment = self._node.deployment  # the main thread may let go of it at any moment
        return None if deployment is None else deployment.arbiter
