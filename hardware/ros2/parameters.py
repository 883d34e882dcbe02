"""The node's parameters: the fields of :class:`NodeConfig`, declared with their types, ranges and descriptions.

One table for everybody: what a launch file sets, what ``ros2 param describe`` shows and what is checked are the same fields.
Values that ROS cannot leave out are 0 or empty where a config would say None. Strings are checked by the config itself, so that a
wrong one is refused with the valid ones named. ``rate:=100`` is 100 Hz: a whole number where one with a fraction may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pydantic
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

from hardware.ros2.deployment import DeployConfig
from robopolicy.config import parse

_LARGEST = 2**31 - 1  # of an integer without an upper bound


class NodeConfig(DeployConfig):
    """What the node adds to a deployment."""

    autostart: bool = pydantic.Field(
        default=False,
        description="Configure, activate and start by itself, so the arm MOVES as soon as its inputs are there. Once, when the "
        "node starts; not to be set later. Whatever is asked meanwhile, or refused for more than inputs that are not there yet, "
        "ends it: a person calls ~/start. False: lifecycle services, then ~/start.",
    )
    ready_timeout: float = pydantic.Field(
        default=10.0,
        ge=0.1,
        le=600.0,
        description="Seconds that configure waits for the first message of every input and the first word of every permit.",
    )


def declare(node: Node, given: Mapping[str, Any] | None = None) -> None:
    """Declare every field of :class:`NodeConfig` on ``node``; ``given`` values replace defaults. Raises what rclpy raises where a
    launch file gives a value out of range or of another type."""
    given = given or {}
    for name, field in NodeConfig.model_fields.items():
        node.declare_parameter(name, given.get(name, field.default), descriptor(name))


def descriptor(name: str) -> ParameterDescriptor:
    """Range and description of one field."""
    field = NodeConfig.model_fields[name]
    found = ParameterDescriptor(name=name, description=field.description or "")
    low, high = _bounds(field.metadata)
    if field.annotation is float:
        found.dynamic_typing = True  # of a static type, 100 is refused and 100.0 taken
        found.floating_point_range = [FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)]
        found.additional_constraints = f"from {low:g} to {high:g}"
    elif field.annotation is int:
        found.integer_range = [IntegerRange(from_value=int(low), to_value=int(min(high, _LARGEST)), step=1)]
        found.additional_constraints = f"from {low:g} to {min(high, _LARGEST):g}"
    elif values := getattr(field.annotation, "__args__", ()):  # a Literal
        found.additional_constraints = "one of " + ", ".join(values)
    return found


def _bounds(metadata: Iterable[Any]) -> tuple[float, float]:
    low, high = 0.0, float(_LARGEST)
    for bound in metadata:
        low, high = getattr(bound, "ge", low), getattr(bound, "le", high)
    return low, high


def read(node: Node, changes: Iterable[Parameter] = ()) -> NodeConfig:
    """The parameters of ``node`` as they are, or would be after ``changes``. Raises ConfigError, naming the parameter."""
    values = {name: node.get_parameter(name).value for name in NodeConfig.model_fields}
    values |= {change.name: change.value for change in changes if change.name in values}
    return parse(NodeConfig, values, where="parameters")
