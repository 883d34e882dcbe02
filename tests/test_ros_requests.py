"""What is asked of the policy node, in the worst order: no emergency stop is lost, and no start comes after its stop."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from std_msgs.msg import Bool

from hardware.ros2.requests import Requests
from robopolicy.deploy.requests import Ticket


class Arbiter:
    """Answers at once; ``meanwhile`` happens between an answer and who asked.

    Attributes:
        asked: What, in order.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.meanwhile: dict[str, Callable[[], Any]] = {}
        self.answer = True, "done"

    def request(self, name: str, **arguments: Any) -> Ticket:
        ticket = Ticket(name, arguments, 0.0)
        self.asked.append(name)
        ticket.settle(*self.answer)
        if act := self.meanwhile.pop(name, None):
            wait = ticket.wait
            ticket.wait = lambda timeout=1.0: (act(), wait(timeout))[1]  # type: ignore[method-assign]
        return ticket


class Node:
    """As much of the policy node as requests look at."""

    lifecycle = "active"

    def __init__(self) -> None:
        self.arbiter, self.io, self.refused, self.reports = Arbiter(), self, "", 0
        self.shadowed, self.logged = False, list[str]()
        self.problems: Callable[[], list[str]] = list
        self.buttons: dict[bytes, str] = {}  # publishers of the emergency stop
        self.deployment: Any = SimpleNamespace(arbiter=self.arbiter)
        arm = {"hindrances": list, "explained": lambda refusal: refusal}
        self.robot: Any = SimpleNamespace(problems=lambda: self.problems(), **arm)

    def get_fully_qualified_name(self) -> str:
        return "/node"

    def create_subscription(self, *arguments: Any, **options: Any) -> Any:
        return SimpleNamespace(topic_name="/estop")

    create_service = create_subscription

    def get_publishers_info_by_topic(self, topic: str) -> list[Any]:
        return [SimpleNamespace(node_name=name, node_namespace="/", endpoint_gid=list(gid)) for gid, name in self.buttons.items()]

    def get_logger(self) -> Any:
        return SimpleNamespace(warning=self.logged.append)

    def refuse(self, what: str) -> None:
        self.refused = what

    def report(self) -> None:
        self.reports += 1


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def requests(node: Node) -> Requests:
    return Requests(node)  # type: ignore[arg-type]


def test_an_emergency_stop_that_is_latched_is_asked_for_again(node: Node, requests: Requests) -> None:
    """The arbiter may just have been reset."""
    for _ in range(2):
        requests._on_estop(Bool(data=True))
    assert node.arbiter.asked == ["estop", "estop"]
    requests._on_estop(Bool(data=False))  # a button that is let go releases nothing
    assert node.arbiter.asked == ["estop", "estop"]
    assert requests.estopped == "topic estop"


def test_no_reset_while_the_button_says_pressed(node: Node, requests: Requests) -> None:
    """Whatever another button says, only its own release counts."""
    node.buttons = {b"red": "red", b"blue": "blue"}
    requests._on_estop(Bool(data=True), b"red")
    requests._on_estop(Bool(data=False), b"blue")
    said = "/red still says pressed on '/estop'; release the button there, then reset"
    assert requests.reset() == (False, said)
    assert requests.estopped
    assert "reset" not in node.arbiter.asked
    requests._on_estop(Bool(data=False), b"red")
    assert requests.reset() == (True, "done")
    assert not requests.estopped


def test_a_button_that_is_gone_is_pressed_until_its_node_is_back_and_says_released(node: Node, requests: Requests) -> None:
    """A wireless pendant out of range; the desk's panel says all the time that it is not pressed."""
    node.buttons = {b"pendant": "pendant", b"panel": "panel"}
    requests._on_estop(Bool(data=False), b"panel")
    requests._on_estop(Bool(data=True), b"pendant")
    del node.buttons[b"pendant"]
    node.buttons[b"late"] = "late"
    for other in (b"panel", b"late"):
        requests._on_estop(Bool(data=False), other)
        ok, said = requests.reset()
        assert not ok
        assert said.startswith("/pendant said pressed on '/estop' and is gone: start it again, release it, then reset")
    node.deployment = None
    assert not requests.reset()[0]  # also while nothing could move
    node.buttons[b"again"] = "pendant"
    assert not requests.reset()[0]  # it is there, and has not said anything
    requests._on_estop(Bool(data=True), b"again")
    assert requests.reset()[1].startswith("/pendant still says pressed")
    requests._on_estop(Bool(data=False), b"again")
    assert requests.reset() == (True, "released")


def test_what_a_button_s_node_said_elsewhere_before_the_press_releases_nothing(node: Node, requests: Requests) -> None:
    """Two buttons of one node, or two nodes of one name."""
    node.buttons = {b"left": "panel", b"right": "panel"}
    requests._on_estop(Bool(data=False), b"left")
    requests._on_estop(Bool(data=True), b"right")
    del node.buttons[b"right"]
    requests._on_estop(Bool(data=False), b"left")
    assert not requests.reset()[0]


def test_nameless_buttons_are_not_taken_for_each_other(node: Node, requests: Requests) -> None:
    node.buttons = {b"one": "_NODE_NAME_UNKNOWN_"}
    requests._on_estop(Bool(data=True), b"one")
    node.buttons = {b"two": "_NODE_NAME_UNKNOWN_"}
    requests._on_estop(Bool(data=False), b"two")
    assert requests.reset()[1].startswith("a button said pressed on '/estop' and is gone: ")


def test_a_button_whose_name_comes_after_its_word_is_known_by_it(node: Node, requests: Requests) -> None:
    """A button speaks once, and discovery may have its publisher before its node."""
    node.buttons = {b"one": "_NODE_NAME_UNKNOWN_"}
    requests._on_estop(Bool(data=True), b"one")
    node.buttons = {b"one": "pendant"}
    requests.look()
    node.buttons = {b"two": "_NODE_NAME_UNKNOWN_"}
    assert requests.reset()[1].startswith("/pendant said pressed on '/estop' and is gone: ")
    requests._on_estop(Bool(data=False), b"two")
    assert not requests.reset()[0]  # whose word that was is not known
    node.buttons = {b"two": "pendant"}
    assert requests.reset()[0]


def test_a_cleanup_forgets_a_button_that_is_gone_once_a_reset_was_refused_for_it(node: Node, requests: Requests) -> None:
    """The only way on when it never comes back; a cleanup for another reason is no word about a button."""
    node.buttons = {b"pendant": "pendant"}
    requests._on_estop(Bool(data=True), b"pendant")
    assert not requests.reset()[0]
    assert requests.forget() == []  # it is there
    del node.buttons[b"pendant"]
    assert requests.forget() == []
    assert "deactivate, cleanup and configure the node" in requests.reset()[1]
    assert requests.forget() == ["/pendant"]
    assert requests.estopped
    assert requests.reset()[0]


def test_where_nobody_says_who_speaks_one_publisher_is_known_by_being_the_only_one(node: Node, requests: Requests) -> None:
    node.buttons = {b"red": "red"}
    requests._on_estop(Bool(data=True))
    assert requests.reset()[1].startswith("/red still says pressed")
    requests._on_estop(Bool(data=False))
    assert requests.reset()[0]
    requests._on_estop(Bool(data=True))
    node.buttons = {b"blue": "blue"}  # red is gone
    requests._on_estop(Bool(data=False))
    assert requests.reset()[1].startswith("/red said pressed on '/estop' and is gone")


@pytest.mark.parametrize("beside", ["before the press", "after it"])
def test_where_nobody_says_who_speaks_no_release_of_several_counts(node: Node, requests: Requests, beside: str) -> None:
    both = {b"red": "red", b"blue": "blue"}
    node.buttons = both if beside == "before the press" else {b"red": "red"}
    requests._on_estop(Bool(data=True))
    node.buttons = both
    requests._on_estop(Bool(data=False))
    ok, said = requests.reset()
    assert not ok
    assert "which of several publishers says what is not known here; now there: /red and /blue. Release all, end them" in said
    assert requests.forget() == []
    node.buttons = {}
    requests._on_estop(Bool(data=False))
    assert not requests.reset()[0]
    assert len(requests.forget()) == 1
    assert requests.reset()[0]


def test_a_start_by_itself_does_not_come_after_a_stop(node: Node, requests: Requests) -> None:
    """Autostart asks on the main thread; a stop is heard while it looks at the topics."""
    requests.armed = True

    def stopped() -> list[str]:
        requests._on_halt("stop", None, SimpleNamespace())
        return []

    node.problems = stopped
    ok, message = requests.start(by_itself=True)
    assert not ok
    assert message == "autostart is off: stop (asked); to go on: start"
    assert node.arbiter.asked == ["stop"]


@pytest.mark.parametrize("name", ["stop", "estop"])
def test_a_stop_is_on_its_way_before_the_end_of_autostart_is_said(node: Node, requests: Requests, name: str) -> None:
    """A line of the log may take its time."""
    requests.armed, asked = True, list[list[str]]()
    node.logged = SimpleNamespace(append=lambda line: asked.append([*node.arbiter.asked]))  # type: ignore[assignment]
    requests._on_halt(name, None, SimpleNamespace())
    assert asked == [[name]]


def test_a_stop_while_a_start_by_itself_is_granted_is_what_is_said_of_autostart(node: Node, requests: Requests) -> None:
    requests.armed = True
    node.arbiter.meanwhile["start"] = lambda: requests._on_halt("stop", None, SimpleNamespace())
    assert requests.start(by_itself=True)[0]
    assert node.arbiter.asked == ["start", "stop"]
    assert requests.disarmed.startswith("autostart is off: stop (asked)")
    assert requests.start()[0]  # by a person
    assert requests.disarmed == ""


@pytest.mark.parametrize("name", ["stop", "estop", "home", "start", "reset", "enable", "disable", "button"])
@pytest.mark.parametrize("there", [True, False])
def test_whatever_is_asked_ends_autostart_and_the_answer_says_so(node: Node, requests: Requests, name: str, there: bool) -> None:
    """Also while the node configures, and nothing is there that could be stopped."""
    requests.armed, response = True, SimpleNamespace(message="")
    if not there:
        node.deployment, node.lifecycle = None, "configuring"
    if name in ("stop", "estop"):
        requests._on_halt(name, None, response)
    elif name in ("enable", "disable"):
        requests._on_enable(SimpleNamespace(data=name == "enable"), response)
    elif name == "button":
        requests._on_estop(Bool(data=True))
    else:
        requests._on_trigger(name, getattr(requests, name), None, response)
    assert not requests.armed
    assert not requests.start(by_itself=True)[0]
    assert len(node.logged) == 1
    granted = there and name in ("home", "start", "enable")
    assert ("autostart is off; to go on: " in response.message) == (not granted and name != "button")
    assert requests.disarmed.startswith("autostart is off: ") == (not granted)
    assert requests.disarm("again") == ""


def test_a_start_by_itself_happens_once(node: Node, requests: Requests) -> None:
    requests.armed = True
    node.arbiter.answer = False, "refused: stale state: 0.4, limit 0.3"
    assert requests.start(by_itself=True) == (False, "stale state: 0.4, limit 0.3")
    node.arbiter.answer = True, "policy begins"
    assert requests.start(by_itself=True)[0]
    assert not requests.start(by_itself=True)[0]
    assert node.arbiter.asked == ["start", "start"]


def test_a_refused_start_says_what_to_do(node: Node, requests: Requests) -> None:
    node.arbiter.answer = False, "refused: start_moved joint1: 0.53, limit 0.2"
    said = "start_moved joint1: 0.53, limit 0.2; if somebody moved the arm on purpose: reset first, then start"
    assert requests.start() == (False, said)


def test_an_emergency_stop_meanwhile_refuses_the_start(node: Node, requests: Requests) -> None:
    node.problems = lambda: requests._on_estop(Bool(data=True)) or []  # type: ignore[func-returns-value]
    assert requests.start() == (False, "estopped (topic estop): reset first, then start")
    assert node.arbiter.asked == ["estop"]


@pytest.mark.parametrize(
    ("lifecycle", "way"),
    [
        ("unconfigured", "configure, activate, "), ("configuring", "activate, "), ("inactive", "activate, "), ("activating", ""),
        ("deactivating", "activate, "), ("cleaningup", "configure, activate, "),
    ],
)  # fmt: skip
def test_nothing_starts_while_the_node_is_not_active(node: Node, requests: Requests, lifecycle: str, way: str) -> None:
    node.lifecycle = lifecycle
    for name in ("start", "home"):
        assert requests.start(name) == (False, f"the node is {lifecycle}; to go on: {way}{name}")
    assert node.arbiter.asked == []
    requests._on_halt("stop", None, SimpleNamespace())
    assert node.arbiter.asked == ["stop"]  # but whatever there is can be stopped


def test_an_arm_that_the_node_lets_go_of_meanwhile_is_an_answer_and_no_end(node: Node, requests: Requests) -> None:
    """An exception in a callback would end the thread that hears stops."""
    node.problems = lambda: [str(1 // 0)]
    response = SimpleNamespace()
    requests._on_enable(SimpleNamespace(data=True), response)
    assert (response.success, response.message) == (False, "ZeroDivisionError: integer division or modulo by zero")
    assert node.refused.startswith("enable refused")
    node.deployment = None
    requests._on_halt("estop", None, response)
    assert response.message == "the node is active: nothing moves"
    requests._on_deadman(Bool(data=True))
    assert requests.reset() == (True, "released")
    assert requests.estopped == ""
