"""``Record``: what a simulated arm did and was told to do, at its worst: by this safety is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.workspace import Kinematics

_WINDOW = 0.02  # accelerations are means over so long [s], as far as encoders can tell
_STILL = 0.01  # [rad/s]
_FREE = 0.3  # [s] after it has pushed: so long does a servo take to come back from where it was held up
_POINTS_EVERY = 4  # steps


class Record:
    """The worst of what the joints did and were told to do, against what the arm's maker rates.

    Ratios: 1 is the limit. Joints are those whose tracking is watched: grippers hit things, that is their job. What an arm that
    pushes against something does is between it and that thing: ``free_velocity``, ``free_acceleration``, ``free_jerk`` and
    ``free_workspace`` leave it out.

    Args:
        limits: Rated limits, workspace and table.
        kinematics: Of the points that are held against the workspace; None: none are.
        timestep: Of physics [s].
        rate: Of commands [Hz].
    """

    def __init__(self, limits: SafetyLimits, kinematics: Kinematics | None, timestep: float, rate: float) -> None:
        watched = [i for i, c in enumerate(limits.coordinates) if c.tracking is not None]
        self._columns, coordinates = np.array(watched), [limits.coordinates[i] for i in watched]
        self._names = [c.name for c in coordinates]
        self._lower, self._upper = (np.array([getattr(c, key) for c in coordinates]) for key in ("lower", "upper"))
        self._rated = {key: np.array([getattr(c, key) for c in coordinates]) for key in ("velocity", "acceleration", "jerk")}
        self._box, self._kinematics = limits.workspace, kinematics
        self._timestep, self._period = timestep, 1.0 / rate
        self._window = max(1, round(_WINDOW / timestep))
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.worst: dict[str, tuple[float, str]] = {}
        self.counts = dict.fromkeys(("commands", "refused", "ignored", "reflexes", "steps"), 0)
        self.moved: float | None = None  # when a joint last moved
        self.pushed: float | None = None  # when the arm last pushed against something
        self.commanded: float | None = None  # when a target last changed
        self._forget()

    def _forget(self) -> None:
        """The past is not connected to what comes: a reset moved the arm."""
        n = len(self._columns)
        self._speeds = np.zeros((self._window + 1, n))
        self._accelerations = np.zeros((self._window + 1, n))
        self._since = 0
        self._commands: list[tuple[float, np.ndarray]] = []

    def restart(self) -> None:
        """The arm was put elsewhere."""
        self._forget()
        self.pushed = None

    def step(self, now: float, positions: np.ndarray, velocities: np.ndarray, pushing: bool) -> None:
        """What the joints did in one step of physics; ``pushing``: see :attr:`sim.virtual.World.pushing`."""
        q, v = positions[self._columns], velocities[self._columns]
        self.counts["steps"] += 1
        self._note("position", np.maximum(q - self._upper, self._lower - q))
        if pushing:
            self.pushed = now
        free = self.pushed is None or now - self.pushed > _FREE
        self._rate("velocity", v, free)
        if np.abs(v).max() > _STILL:
            self.moved = now
        here, before = self._since % (self._window + 1), (self._since + 1) % (self._window + 1)  # of the ring: now, a window ago
        span = self._window * self._timestep
        self._speeds[here] = v
        if self._since >= self._window:
            acceleration = (v - self._speeds[before]) / span
            self._rate("acceleration", acceleration, free)
            self._accelerations[here] = acceleration
            if self._since >= 2 * self._window:
                self._rate("jerk", (acceleration - self._accelerations[before]) / span, free)
        self._since += 1
        if self.counts["steps"] % _POINTS_EVERY == 0:
            self._points(positions, ("workspace", *["free_workspace"] * free), "table")

    def _points(self, positions: np.ndarray, workspace: Sequence[str], table: str) -> None:
        """How far points are outside the box, and below the table, under these names."""
        if self._kinematics is None or self._box is None:
            return
        points = self._kinematics.points(positions)
        outside = np.maximum(points[0] - self._box.upper, self._box.lower - points[0])
        for key in workspace:
            self._worst(key, float(outside.max()), "xyz"[int(outside.argmax())])
        if self._box.table is not None:
            depths = self._box.table - points[:, 2]
            self._worst(table, float(depths.max()), self._kinematics.names[int(depths.argmax())])

    def target(self, positions: np.ndarray) -> None:
        """Where a command leads, of all coordinates."""
        self._points(positions, ("command_workspace",), "command_table")

    def command(self, now: float, positions: np.ndarray) -> None:
        """One of a stream, of all coordinates. Rates are per nominal period, or per the time that passed if that was longer."""
        self.counts["commands"] += 1
        self.target(positions)
        targets = positions[self._columns]
        if self._commands:
            last_time, last = self._commands[-1]
            step = np.abs(targets - last)
            self._note("command_step", step)
            self._note("command_velocity", step / max(now - last_time, self._period) / self._rated["velocity"])
            if step.max() > 1e-7:
                self.commanded = now
        self._commands = [*self._commands[-3:], (now, targets.copy())]
        times = np.diff([time for time, _ in self._commands]) / self._period
        if len(times) == 3 and (np.abs(times - 1.0) < 0.5).all():  # else one may have been lost between them
            path = np.array([target for _, target in self._commands])
            for order, key in ((2, "acceleration"), (3, "jerk")):
                rates = np.abs(np.diff(path, order, axis=0)[-1]) / self._period**order
                self._note(f"command_{key}", rates / self._rated[key])

    def asdict(self) -> dict[str, Any]:
        """Worst values with the joint each is of, and counts. ``position`` in rad (negative: room left), poses in m."""
        return {key: {"worst": value, "of": what} for key, (value, what) in sorted(self.worst.items())} | self.counts

    def _rate(self, key: str, values: np.ndarray, free: bool) -> None:
        for name in (key, *[f"free_{key}"] * free):
            self._note(name, np.abs(values) / self._rated[key])

    def _note(self, key: str, values: np.ndarray) -> None:
        i = int(values.argmax())
        self._worst(key, float(values[i]), self._names[i])

    def _worst(self, key: str, value: float, what: str) -> None:
        if key not in self.worst or value > self.worst[key][0]:
            self.worst[key] = (value, what)
