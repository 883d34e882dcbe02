"""Calling services and waiting for the answer, from a thread that does not spin the node: never from a callback.

An answer can be lost: rmw_fastrtps waits 0.1 s for a client that its server has not discovered yet, and then sends none (its
issue 842). So a node keeps its clients, and what can be asked twice is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import yaml

from hardware.ros2.contract import message_type
from hardware.ros2.runtime import RosError
from robopolicy.errors import nearest

ANSWER = 10.0  # [s]: longer than any honest answer takes
TRIGGER, CHANGE_STATE = "std_srvs/srv/Trigger", "lifecycle_msgs/srv/ChangeState"
SET_PARAMETERS = "rcl_interfaces/srv/SetParameters"
GET_PARAMETERS, LIST_PARAMETERS = "rcl_interfaces/srv/GetParameters", "rcl_interfaces/srv/ListParameters"
_TRIES = 3  # of what makes no difference when it is done twice
_CLIENTS: WeakKeyDictionary[Any, dict[tuple[str, str], Any]] = WeakKeyDictionary()  # by node; they end with it
_CREATE = threading.Lock()
_DOUBLE, _STRING = 3, 4  # rcl_interfaces/msg/ParameterType
_KINDS = {1: "true or false", 2: "a whole number", _DOUBLE: "a number", _STRING: "a text"}


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for something, for so long at most: whether it came."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


Wait = Callable[[Callable[[], bool], float], bool]  # as `until`, by somebody who has more to look after meanwhile


def client(node: Any, name: str, kind: str) -> Any:
    """The node's client of a service, made once. Made some time before it is needed, it is discovered by then."""
    with _CREATE:
        clients = _CLIENTS.setdefault(node, {})
        if (name, kind) not in clients:
            clients[name, kind] = node.create_client(message_type(kind), name)
        return clients[name, kind]


def ask(node: Any, name: str, kind: str, request: Any = None, timeout: float = ANSWER, wait: Wait = until, tries: int = 1) -> Any:
    """The answer of ``name``, a service of type ``kind``; ``request`` None: an empty one. Another thread must spin ``node``.

    Args:
        tries: How often it may be asked within ``timeout``. More than once only what makes no difference when it is done twice,
            and late.

    Raises:
        RosError: Nobody offers it, or no answer came in time.
    """
    asked = client(node, name, kind)
    if not wait(asked.service_is_ready, timeout):
        raise RosError(f"nobody offers the service '{name}' ({kind}); is its node running?")
    for _ in range(tries):
        future = asked.call_async(message_type(kind).Request() if request is None else request)
        if wait(future.done, timeout / tries):
            return future.result()
        asked.remove_pending_request(future)
    raise RosError(f"the service '{name}' did not answer within {timeout:g} s")


def call(node: Any, name: str, kind: str, request: Any = None, timeout: float = ANSWER, tries: int = 1) -> Any:
    """As :func:`ask`; a refusal is a RosError, too."""
    answer = ask(node, name, kind, request, timeout, tries=tries)
    if not getattr(answer, "success", True):
        raise RosError(f"the service '{name}' refused: {answer.message}")
    return answer


def change_state(node: Any, other: str, transition: str, timeout: float, wait: Wait = until) -> bool:
    """``configure``, ``activate``, ``deactivate`` or ``cleanup`` a lifecycle node: whether it worked. Raises as :func:`ask`."""
    state = message_type("lifecycle_msgs/msg/Transition")
    request = message_type(CHANGE_STATE).Request(transition=state(id=getattr(state, f"TRANSITION_{transition.upper()}")))
    return bool(ask(node, f"{other}/change_state", CHANGE_STATE, request, timeout, wait).success)


def set_parameter(node: Any, other: str, name: str, value: Any, timeout: float = ANSWER) -> None:
    """Set a parameter of another node. Raises RosError as :func:`call`, and when it is refused."""
    from rclpy.parameter import Parameter

    request = message_type(SET_PARAMETERS).Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
    result = call(node, f"{other}/set_parameters", SET_PARAMETERS, request, timeout, _TRIES).results[0]
    if not result.successful:
        raise RosError(f"node '{other}' refuses {name} = {value!r}: {result.reason}")


def set_text(node: Any, other: str, name: str, text: str, timeout: float = ANSWER) -> Any:
    """Set a parameter of another node to what a person typed, in the parameter's own type; gives the value. Raises RosError."""
    names = call(node, f"{other}/list_parameters", LIST_PARAMETERS, None, timeout, _TRIES).result.names
    if name not in names:
        raise RosError(f"node '{other}' has no parameter '{name}': {nearest(name, names)}")
    request = message_type(GET_PARAMETERS).Request(names=[name])
    kind = call(node, f"{other}/get_parameters", GET_PARAMETERS, request, timeout, _TRIES).values[0].type
    try:
        value = text if kind == _STRING else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if kind == _DOUBLE and type(value) is int:
        value = float(value)
    if not isinstance(value, bool | int | float | str):
        raise RosError(f"'{text}' is no value of {name}: give a number, true, false or a text")
    try:
        set_parameter(node, other, name, value, timeout)
    except RosError as error:
        if "Wrong parameter type" in str(error) and kind in _KINDS:  # rclpy says it in numbers
            raise RosError(f"'{text}' is no value of {name}: give {_KINDS[kind]}") from error
        raise
    return value
