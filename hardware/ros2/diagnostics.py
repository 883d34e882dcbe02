"""What the node says of itself: ten times a second on ``/diagnostics``, and on change on ``~/state`` and in the log.

==============  ==================================================================================================
``node``        Lifecycle, policy and robot; why the last transition or request was refused; a second master of the arm.
``control``     Who commands and whether the arm moves; the cause of every hold and stop; interventions counted.
``timing``      Rate, lateness and work of control periods; those missed.
``inputs``      Age of everything that control looks at, and messages that were refused.
``inference``   From observation to chunk; what became of chunks.
==============  ==================================================================================================
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import String

from hardware.ros2 import parameters
from hardware.ros2.contract import DIAGNOSTICS, DIAGNOSTICS_TOPIC, LATCHED
from hardware.ros2.deployment import Deployment
from hardware.ros2.robot import RosRobot
from hardware.ros2.runtime import RosClock
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.status import Status

_HANGS = 0.5  # [s] without a period
_SAME = 5.0  # [s] in which a kind of intervention is logged once
_MISSED = 0.01  # share of periods from which on the timing is worth a warning
_MODES = ("stop", "estop")  # interventions that ~/state tells
_MUTED = "nothing is sent until the next ~/start or ~/home"
_WANTED = ("asked", "disabled", "idle", "home reached", "control ends")  # causes of stops that somebody meant


class Level(IntEnum):
    """As ``diagnostic_msgs/DiagnosticStatus`` has them."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


class Health(NamedTuple):
    """One entry of the array."""

    name: str
    level: Level
    message: str
    values: Mapping[str, str]


def node(lifecycle: str, refused: str, rivals: Sequence[str], doubts: Sequence[str], facts: Mapping[str, Any]) -> Health:
    """``refused``: why the last transition or request was, empty when it was not. ``rivals``, ``doubts``: of RosRobot."""
    level = Level.ERROR if rivals else Level.WARN if refused or doubts else Level.OK
    message = "; ".join([*rivals, *([refused] if refused else []), *doubts])
    return Health("node", level, f"{lifecycle}: {message}" if message else lifecycle, _texts({"refused": refused, **facts}))


def health(status: Status, now: float, limits: SafetyLimits, rejected: Mapping[str, int], dead: str = "") -> list[Health]:
    """Everything about control.

    Args:
        status: Of the arbiter.
        now: On its clock [s].
        limits: Of its safety filter.
        rejected: Messages that were refused, by input and reason.
        dead: Why there will be no more plans; empty: there will be.
    """
    silent = now - status.time
    if status.periods and silent > _HANGS:
        return [Health("control", Level.ERROR, f"no control period for {silent:.1f} s: control hangs", {"mode": status.mode})]
    return [_control(status), _timing(status, limits), _inputs(status, limits, rejected), _inference(status, dead)]


def _control(status: Status) -> Health:
    message = f"{status.mode}: {status.cause or status.source}" + (f"; {_MUTED}" if status.muted else "")
    stopped = status.mode == "stopped" and status.cause not in ("", *_WANTED)
    if status.fault or status.muted or status.mode == "estopped" or stopped:
        level = Level.ERROR
    else:
        level = Level.WARN if status.mode == "holding" else Level.OK
    facts: dict[str, Any] = {
        "mode": status.mode,
        "source": status.source,
        "shadow": status.shadow,
        "cause": status.cause,
        "muted": status.muted,
        "reasons": "; ".join(status.reasons),
        "fault": status.fault,
        "deadman": {None: "none", True: "pressed", False: "released"}[status.deadman],
    }
    if status.request is not None:
        facts["request"] = f"{status.request.name}: {'done' if status.request.ok else status.request.message}"
    if status.set_point is not None:
        facts |= {f"set point {name}": value for name, value in zip(status.names, status.set_point, strict=True)}
    facts |= {f"periods with {kind}": count for kind, count in status.counters.items()}
    facts |= {f"began {kind}": count for kind, count in status.events.items()}
    return Health("control", level, message, _texts(facts))


def _timing(status: Status, limits: SafetyLimits) -> Health:
    share = status.missed / status.periods if status.periods else 0.0
    slow = status.periods > limits.rate and status.rate < 0.9 * limits.rate
    message = f"{status.rate:.1f} of {limits.rate:g} Hz, {share:.2%} of periods missed"
    facts: dict[str, Any] = {name: getattr(status, name) for name in ("rate", "periods", "skipped", "missed")}
    for name in ("lateness_ms", "work_ms"):
        facts |= {f"{name} {rank}": value for rank, value in getattr(status, name).items()}
    facts |= {f"note {number}": note for number, note in enumerate(status.notes)}
    return Health("timing", Level.WARN if slow or share > _MISSED else Level.OK, message, _texts(facts))


def _inputs(status: Status, limits: SafetyLimits, rejected: Mapping[str, int]) -> Health:
    fresh = limits.freshness
    allowed = {"state": fresh.state, "command": math.inf if fresh.command is None else fresh.command}
    stale = {
        name: (age, limit)
        for name, age in status.ages.items()
        if not age <= (limit := allowed.get(name, fresh.inputs.get(name, fresh.default)))
    }
    message = "; ".join(f"{name} is {age:.2f} s old, limit {limit:g}" for name, (age, limit) in stale.items()) or "fresh"
    facts = {f"age {name}": age for name, age in status.ages.items()} | {f"refused {name}": n for name, n in rejected.items()}
    return Health("inputs", Level.ERROR if stale else Level.OK, message, _texts(facts))


def _inference(status: Status, dead: str) -> Health:
    report = status.reports.get("policy", {})
    latency = report.get("inference_ms", {})
    fault = dead or (status.cause if status.cause.startswith("inference") else "")
    latency = {rank: value for rank, value in latency.items() if not math.isnan(value)}
    known = f"p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms" if latency else "nothing planned yet"
    facts = {f"latency_ms {rank}": value for rank, value in latency.items()}
    facts |= {name: value for name, value in report.items() if name != "inference_ms"}
    return Health("inference", Level.ERROR if fault else Level.OK, fault or known, _texts(facts))


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in facts.items()}


class Reporter:
    """Publishes it, and logs what begins to go wrong; control only counts.

    Args:
        node: Speaks.
        clock: Of control.
    """

    def __init__(self, node: LifecycleNode, clock: RosClock) -> None:
        self._node, self._clock = node, clock
        self._diagnostics = node.create_publisher(DiagnosticArray, DIAGNOSTICS_TOPIC, DIAGNOSTICS.to_ros())
        self._state = node.create_publisher(String, "~/state", LATCHED.to_ros())
        self._said: dict[str, str] = {}
        self._logged: dict[str, tuple[float, int]] = {}  # kind of intervention: when, and how many there were
        self._lock = threading.Lock()

    def report(
        self,
        lifecycle: str,
        refused: str,
        autostart: str,
        estopped: str,
        deployment: Deployment | None,
        robot: RosRobot | None,
    ) -> None:
        """Everything, now. From any thread. ``autostart``: of Requests."""
        off = "" if autostart == "waits" else autostart
        refused = "; ".join(filter(None, (refused, off)))
        arbiter = None if deployment is None else deployment.arbiter
        status = None if arbiter is None else arbiter.status
        config = parameters.read(self._node)
        facts = {"checkpoint": config.checkpoint, "profile": config.profile, "drives": config.mode, "estopped": estopped}
        rivals, doubts = ([], []) if robot is None else (robot.rivals(), [*robot.denied(), *robot.doubts()])
        entries = [node(lifecycle, refused, rivals, doubts, facts)]
        if status is not None and deployment is not None and robot is not None:
            slots = [(name, slot.rejected.copy()) for name, slot in robot.slots.items()]  # it may grow meanwhile
            rejected = {f"{name}: {kind}": count for name, counts in slots for kind, count in counts.items()}
            dead = "" if deployment.fault is None else str(deployment.fault)
            entries += health(status, self._clock.now(), deployment.limits, rejected, dead)
        with self._lock:
            self._log(status)
            told = {name: facts[name] for name in ("drives", "checkpoint", "profile")}
            self._tell(lifecycle, refused, estopped, status, {"autostart": autostart, **told})
            self._diagnostics.publish(to_message(entries, self._node.get_name(), config.profile, self._clock.stamp()))

    def _log(self, status: Status | None) -> None:
        """Interventions, when a kind of them begins; not one that comes and goes every few periods."""
        events, now = {} if status is None else status.events, time.monotonic()
        self._logged = {kind: seen for kind, seen in self._logged.items() if kind in events}
        for kind, count in events.items():
            when, before = self._logged.get(kind, (-math.inf, 0))
            if kind not in _MODES and count > before and now > when + _SAME:
                reasons = [reason for reason in (status.reasons if status else ()) if reason.startswith(kind)]
                span = f" in {now - when:.0f} s" if math.isfinite(when) else ""
                self._node.get_logger().warning(f"safety: {'; '.join(reasons) or kind} ({count - before} times{span})")
                self._logged[kind] = now, count

    def _tell(self, lifecycle: str, refused: str, estopped: str, status: Status | None, facts: Mapping[str, str]) -> None:
        mode, source, cause = ("off", "", estopped) if status is None else (status.mode, status.source, status.cause)
        muted = "" if status is None else status.muted
        control = {"mode": mode, "source": source, "cause": cause, "muted": muted}
        said = {"lifecycle": lifecycle, **control, "refused": refused, **facts}
        if said == self._said:
            return
        if {key: self._said.get(key) for key in control} != control:
            text = (f"{mode}, {source}" if source else mode) + (f": {cause}" if cause else "")
            if muted and cause:  # rclpy wants one severity for each line of code
                self._node.get_logger().error(f"{text}; {_MUTED}")
            elif cause:
                self._node.get_logger().warning(text)
            else:
                self._node.get_logger().info(f"{text}; {_MUTED}" if muted else text)
        self._said = said
        self._state.publish(String(data=json.dumps(said)))


def to_message(entries: list[Health], origin: str, hardware: str, stamp: Any) -> Any:
    """``diagnostic_msgs/DiagnosticArray``; entries are named ``origin: name``."""
    array = DiagnosticArray()
    array.header.stamp = stamp
    array.status = [
        DiagnosticStatus(
            level=bytes([entry.level]),
            name=f"{origin}: {entry.name}",
            message=entry.message,
            hardware_id=hardware,
            values=[KeyValue(key=key, value=value) for key, value in entry.values.items()],
        )
        for entry in entries
    ]
    return array
