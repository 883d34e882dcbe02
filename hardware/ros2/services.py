"""Calling services and waiting for the answer, from a thread that does not spin the node: never from a callback."""

from __future__ import annotations

import threading
from typing import Any

import yaml

from hardware.ros2.contract import message_type
from hardware.ros2.runtime import RosError
from robopolicy.errors import nearest

ANSWER = 10.0  # [s]: longer than any honest answer takes
TRIGGER, SET_PARAMETERS = "std_srvs/srv/Trigger", "rcl_interfaces/srv/SetParameters"
GET_PARAMETERS, LIST_PARAMETERS = "rcl_interfaces/srv/GetParameters", "rcl_interfaces/srv/ListParameters"
_DOUBLE, _STRING = 3, 4  # rcl_interfaces/msg/ParameterType


def call(node: Any, name: str, kind: str, request: Any = None, timeout: float = ANSWER) -> Any:
    """Call ``name``, a service of type ``kind``; ``request`` None: an empty one. Another thread must spin ``node``.

    Raises:
        RosError: Nobody offers it, no answer came in time, or it answered that it did not succeed.
    """
    client = node.create_client(message_type(kind), name)
    try:
        if not client.wait_for_service(timeout):
            raise RosError(f"nobody offers the service '{name}' ({kind}); is its node running?")
        answered = threading.Event()
        future = client.call_async(message_type(kind).Request() if request is None else request)
        future.add_done_callback(lambda _: answered.set())
        if not answered.wait(timeout):
            raise RosError(f"the service '{name}' did not answer within {timeout:g} s")
        answer = future.result()
    finally:
        node.destroy_client(client)
    if not getattr(answer, "success", True):
        raise RosError(f"the service '{name}' refused: {answer.message}")
    return answer


def set_parameter(node: Any, other: str, name: str, value: Any, timeout: float = ANSWER) -> None:
    """Set a parameter of another node. Raises RosError as :func:`call`, and when it is refused."""
    from rclpy.parameter import Parameter

    request = message_type(SET_PARAMETERS).Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
    result = call(node, f"{other}/set_parameters", SET_PARAMETERS, request, timeout).results[0]
    if not result.successful:
        raise RosError(f"node '{other}' refuses {name} = {value!r}: {result.reason}")


def set_text(node: Any, other: str, name: str, text: str, timeout: float = ANSWER) -> Any:
    """Set a parameter of another node to what a person typed, in the parameter's own type; gives the value. Raises RosError."""
    names = call(node, f"{other}/list_parameters", LIST_PARAMETERS, None, timeout).result.names
    if name not in names:
        raise RosError(f"node '{other}' has no parameter '{name}': {nearest(name, names)}")
    request = message_type(GET_PARAMETERS).Request(names=[name])
    kind = call(node, f"{other}/get_parameters", GET_PARAMETERS, request, timeout).values[0].type
    try:
        value = text if kind == _STRING else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if kind == _DOUBLE and type(value) is int:
        value = float(value)
    if not isinstance(value, bool | int | float | str):
        raise RosError(f"'{text}' is no value of {name}: give a number, true, false or a text")
    set_parameter(node, other, name, value, timeout)
    return value
