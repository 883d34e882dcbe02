"""Faults of streams as parameters of a node: ``faults.STREAM.FAULT``, declared with ranges, in force as soon as they are set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hardware.ros2.contract import message_type
from hardware.ros2.faults import STREAMS, Faults
from hardware.ros2.runtime import RosClock
from hardware.ros2.streams import Stream
from robopolicy.config import Config, parse
from robopolicy.errors import RobopolicyError


class FaultParameters:
    """Declares them, and gives the channels of the streams what is set.

    Args:
        node: Whose parameters they are.
        streams: By kind: ``state``, ``camera``, ``poses``.
        clock: Of :attr:`set_at`.

    Attributes:
        set_at: When one was set last [s].
    """

    def __init__(self, node: Any, streams: Mapping[str, Sequence[Stream]], clock: RosClock) -> None:
        self._node, self._streams, self._clock = node, streams, clock
        self.set_at = clock.now()
        for kind in STREAMS:
            for name, field in Faults.model_fields.items():
                node.declare_parameter(f"faults.{kind}.{name}", field.default, describe(Faults, name))
        self._set([])
        node.add_on_set_parameters_callback(self._set)

    def clear(self) -> None:
        """No faults."""
        from rclpy.parameter import Parameter

        fields = Faults.model_fields.items()
        defaults = [Parameter(f"faults.{kind}.{name}", value=field.default) for kind in STREAMS for name, field in fields]
        self._node.set_parameters_atomically(defaults)

    def counted(self) -> dict[str, dict[str, int]]:
        """How often each was put in, by stream."""
        found: dict[str, Counter[str]] = {kind: Counter() for kind in STREAMS}
        for kind, streams in self._streams.items():
            for stream in streams:
                found[kind].update(stream.channel.counters)
        return {kind: dict(counter) for kind, counter in found.items()}

    def clear_counters(self) -> None:
        for streams in self._streams.values():
            for stream in streams:
                stream.channel.counters.clear()

    def _set(self, changes: Sequence[Any]) -> Any:
        changed = {parameter.name: parameter.value for parameter in changes}
        self.set_at = self._clock.now()
        result = message_type("rcl_interfaces/msg/SetParametersResult")(successful=True)
        try:
            for kind in STREAMS:
                names = {name: f"faults.{kind}.{name}" for name in Faults.model_fields}
                values = {name: changed.get(key, self._node.get_parameter(key).value) for name, key in names.items()}
                faults = parse(Faults, values, where=f"faults.{kind}")
                for stream in self._streams[kind]:
                    stream.channel.faults = faults
        except RobopolicyError as error:
            result.successful, result.reason = False, str(error)
        return result


def describe(config: type[Config], name: str, read_only: bool = False) -> Any:
    """A parameter's descriptor out of a config's field: description and range."""
    field = config.model_fields[name]
    found = message_type("rcl_interfaces/msg/ParameterDescriptor")(description=field.description or "", read_only=read_only)
    low = next((m.ge for m in field.metadata if hasattr(m, "ge")), None)
    high = next((m.le for m in field.metadata if hasattr(m, "le")), None)
    if low is not None and high is not None:
        kind = "IntegerRange" if field.annotation is int else "FloatingPointRange"
        bounds = message_type(f"rcl_interfaces/msg/{kind}")(from_value=low, to_value=high)
        setattr(found, "integer_range" if field.annotation is int else "floating_point_range", [bounds])
    return found
