"""Shadow on a bag: what a policy would have commanded, beside what was commanded. Nothing moves, and nothing is sent.

The policy sees what it would have seen on the robot, through the robot's own code, and its plans are made, carried out and
interpolated as in deployment. It does not act, so its observations never become those of its own actions: small differences say
that it would begin as the demonstration did, large ones where it would not. Targets are those before the safety filter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hardware.ros2.bagfile import Bag, BagError, open_bag
from hardware.ros2.contract import message_type, robot_topics
from hardware.ros2.deployment import DeployConfig, check_fit, limits_of, profile_of, task_of
from hardware.ros2.heard import CommandReader
from hardware.ros2.joints import make_model
from hardware.ros2.played import BagClock, BagNode
from hardware.ros2.profile import RosProfile
from hardware.ros2.robot import RosRobot
from robopolicy.deploy.clock import Tick
from robopolicy.deploy.engine import InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.interpolate import InterpolationConfig
from robopolicy.deploy.process import open_planner
from robopolicy.deploy.sources import ControlConfig, PolicySource

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Shadow(NamedTuple):
    """What came of it, a row for each control period with a plan.

    Attributes:
        names, units: Of the coordinates.
        times: Since the bag began ``[T]`` [s].
        wanted: What the policy would have commanded ``[T, n]``.
        commanded: What was ``[T, n]``; NaN before the first command, and where commands say no coordinates.
        measured: Where the arm was ``[T, n]``.
        episodes: How often the policy began anew, because inputs were stale or its plans had run out.
        notes: Why.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    times: np.ndarray
    wanted: np.ndarray
    commanded: np.ndarray
    measured: np.ndarray
    episodes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Differences by coordinate."""
        return {
            "seconds": float(self.times[-1] - self.times[0]),
            "periods": len(self.times),
            "episodes": self.episodes,
            "notes": list(self.notes),
            "differences": {name: self._differences(i) for i, name in enumerate(self.names)},
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = self.to_json()
        wide = max(map(len, self.names))
        lines = [
            f"{found['seconds']:.1f} s, {found['periods']} periods, {self.episodes} begun"
            + "".join(f"; {note}" for note in self.notes),
            f"{'':{wide}}  |policy - commanded|            |commanded - measured|",
            f"{'':{wide}}      mean       p95       max      mean",
        ]
        for (name, row), unit in zip(found["differences"].items(), self.units, strict=True):
            numbers = "".join("         -" if value is None else f"{value:10.4f}" for value in row.values())
            lines.append(f"{name:{wide}}{numbers}  {unit}")
        return lines

    def _differences(self, i: int) -> dict[str, float | None]:
        known = np.isfinite(self.commanded[:, i])
        if not known.any():
            return dict.fromkeys(("mean", "p95", "max", "lag"))
        off = np.abs(self.wanted[known, i] - self.commanded[known, i])
        lag = np.abs(self.commanded[known, i] - self.measured[known, i])
        return {
            "mean": float(off.mean()),
            "p95": float(np.quantile(off, 0.95)),
            "max": float(off.max()),
            "lag": float(lag.mean()),
        }

    def plot(self) -> Figure:
        """One line of axes for each coordinate."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.6 * len(self.names)), layout="constrained")
        axes = figure.subplots(len(self.names), 1, sharex=True, squeeze=False)[:, 0]
        gaps = np.diff(self.times, prepend=self.times[0]) > 3 * np.median(np.diff(self.times))
        wanted = np.where(gaps[:, None], np.nan, self.wanted)  # no line across a pause
        for i, (ax, name, unit) in enumerate(zip(axes, self.names, self.units, strict=True)):
            ax.plot(self.times, self.measured[:, i], color="0.7", label="measured")
            ax.plot(self.times, self.commanded[:, i], color="tab:blue", label="commanded")
            ax.plot(self.times, wanted[:, i], color="tab:orange", lw=1, label="policy")
            ax.set_ylabel(f"{name} [{unit}]")
        axes[0].legend(loc="upper right", ncols=3)
        axes[-1].set_xlabel("time [s]")
        return figure


def shadow(path: str | Path, config: DeployConfig, *, namespace: str = "", latency: float = 0.05) -> Shadow:
    """Run a policy on a bag.

    Args:
        path: The bag.
        config: Which policy and profile, and how plans are made and carried out; what concerns sending is not used.
        namespace: That the robot's topics had.
        latency: Of inference, on the bag's time [s].

    Raises:
        BagError: The bag cannot be read, or has not what the policy needs.
        RobopolicyError: The policy cannot be loaded or does not fit the robot.
    """
    import torch

    profile = profile_of(config)
    limits = limits_of(config, profile)
    planner: Any = open_planner(config.checkpoint, config.planner, config.steps or None)
    with open_bag(path) as bag:
        clock = BagClock(bag.start)
        node = BagNode(bag, clock, namespace)
        robot = RosRobot(profile, node, clock, make_model(profile, *task_of(config.checkpoint)), enabled=False)
        node.robot = robot
        try:
            check_fit(planner.policy, robot)
            action = robot.action_feature
            engine = InlineEngine(
                planner,
                1.0 / (action.rate or limits.rate),
                clock,
                torch.Generator().manual_seed(config.seed),
                delay=latency,
            )
            control = ControlConfig(n_obs_steps=planner.policy.n_obs_steps, replan=config.replan or planner.policy.n_action_steps)
            between = InterpolationConfig.of_policy(action, planner.policy)
            source = PolicySource(robot, engine, make_executor(config.executor), limits, control, between)
            return _run(path, bag, node, clock, robot, source, profile, limits.rate)
        finally:
            robot.close()


def _run(
    path: str | Path,
    bag: Bag,
    node: BagNode,
    clock: BagClock,
    robot: RosRobot,
    source: PolicySource,
    profile: RosProfile,
    rate: float,
) -> Shadow:
    commands = _Commands(profile, node)
    rows: list[tuple[float, np.ndarray, np.ndarray, np.ndarray]] = []
    notes: dict[str, int] = {}
    prepared = active = False
    episodes = number = 0

    def period(now: float) -> None:
        nonlocal prepared, active, episodes
        clock.sleep_until(now)
        state = robot.state()
        if not prepared:
            if robot.problems():
                return
            source.prepare()
            prepared = True
        if not active:
            reasons = source.begin(now, state)
            for reason in reasons:
                notes[reason.kind + " " + reason.what] = notes.get(reason.kind + " " + reason.what, 0) + 1
            active = not reasons
            episodes += active
        elif source.ready(now):
            target = source.target(Tick(number, now, now, 0), state)
            stale = [name for name, stamp in (target.stamps or {}).items() if now - stamp.came > fresh.get(name, default)]
            if target.over is not None or stale:
                for what in [f"stale {name}" for name in stale] or [str(target.over)]:
                    notes[what] = notes.get(what, 0) + 1
                active = False
            elif target.positions is not None:
                rows.append((now, target.positions.copy(), commands.read(state.positions), state.positions))

    fresh, default = profile.safety.freshness.inputs, profile.safety.freshness.default
    for message in node.messages():
        while number / rate < clock.of(message.came):
            period(number / rate)
            number += 1
        node.deliver(message)
    if not rows:
        problems = robot.problems() or [*notes] or ["it is too short"]
        raise BagError(f"'{path}': the policy never had what it needs to plan: {problems[0]}")
    times, wanted, commanded, measured = (np.array(column) for column in zip(*rows, strict=True))
    units = tuple(c.unit for c in profile.safety.coordinates)
    told = tuple(f"{what} ({count} periods)" for what, count in notes.items())
    return Shadow(robot.names, units, times, wanted, commanded, measured, episodes, told)


class _Commands:
    """What was commanded last, as coordinates."""

    def __init__(self, profile: RosProfile, node: BagNode) -> None:
        self._reader = CommandReader(profile)
        self._message: Any = None
        takes: Mapping[str, Callable[[Any], None]] = {"command": self._take, "gripper": self._reader.gripper}
        for topic in robot_topics(profile, ()):
            if topic.key in takes:
                node.create_subscription(message_type(topic.type), topic.name, takes[topic.key], None)

    def _take(self, message: Any) -> None:
        self._message = message

    def read(self, measured: np.ndarray) -> np.ndarray:
        value = None if self._message is None else self._reader.read(self._message, measured)
        return np.full(len(measured), np.nan) if value is None else value
