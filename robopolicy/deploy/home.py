"""``HomeSource``: straight to a joint configuration, slowly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from robopolicy.deploy.clock import Tick
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.safety import Reason
from robopolicy.deploy.sources import Target
from robopolicy.errors import ConfigError
from robopolicy.robot import State


class HomeSource:
    """Goes straight to a configuration at the slow speed of a ramp, waits for an arm that lags, and says when it is there.

    Coordinates whose ``tracking`` is not watched, grippers that is, are not waited for: they may hold something.

    Args:
        positions: Where ``[n]``.
        limits: Of the safety filter: ``ramp`` times the velocity it lets through is the speed.
        near: Measured positions this close are there [units].

    Raises:
        ConfigError: Home is outside the limits.
    """

    name = "home"
    _AHEAD = 0.5  # [s] of way by which the target may lead
    _STANDS = 0.3  # [s] near home, then it is there
    _GIVE_UP = 2.0  # [s] after which an arm that lags, or is not there, does not come

    def __init__(self, positions: np.ndarray, limits: SafetyLimits, near: float = 0.02) -> None:
        self.positions = np.array(positions, np.float64)
        if self.positions.shape != (len(limits.names),):
            raise ConfigError(f"home has {self.positions.size} positions; give one for each of {', '.join(limits.names)}")
        for value, c in zip(self.positions, limits.coordinates, strict=True):
            if not c.lower + c.margin <= value <= c.upper - c.margin:
                raise ConfigError(
                    f"home: {c.name} {value:g} is outside {c.lower + c.margin:g} to {c.upper - c.margin:g} (the limits less "
                    "margin); move it in"
                )
        self._names, self._near = limits.names, near
        self._speed = limits.ramp * limits.scale.velocity * np.array([c.velocity for c in limits.coordinates])
        self._free = np.array([c.tracking is None for c in limits.coordinates])
        self._dt = 1.0 / limits.rate

    def begin(self, now: float, state: State) -> tuple[Reason, ...]:
        if state.positions.shape != self.positions.shape or not np.isfinite(state.positions).all():
            return (Reason("state_not_finite"),)  # nobody knows from where
        self._from = state.positions.copy()
        self._way = self.positions - self._from
        # Along 3 x^2 - 2 x^3, which begins and ends at rest; in between it is at most 1.5 times as fast as the mean.
        self._needs = 1.5 * float(np.max(np.abs(self._way) / self._speed))  # [s]
        self._gone = self._waited = self._stood = 0.0  # [s]
        return ()

    def ready(self, now: float) -> bool:
        return True

    def target(self, tick: Tick, state: State) -> Target:
        x = min(1.0, self._gone / self._needs) if self._needs > 0 else 1.0
        if x >= 1.0:
            return Target(self.positions, over=self._arrived(state))
        goal = self._from + x * x * (3 - 2 * x) * self._way
        if (self._free | (np.abs(goal - state.positions) <= self._AHEAD * self._speed)).all():  # False for NaN
            self._gone += self._dt
            return Target(goal, 6 * x * (1 - x) * self._way / self._needs)
        self._waited += self._dt
        lags = self._waited > self._GIVE_UP
        return Target(goal, over=Reason("home_lag", "", self._waited, self._GIVE_UP) if lags else None)

    def _arrived(self, state: State) -> Reason | None:
        error = np.where(self._free, 0.0, np.abs(state.positions - self.positions))
        if (error <= self._near).all():
            self._stood += self._dt
            return Reason("home", "reached") if self._stood >= self._STANDS else None
        self._stood = 0.0
        self._waited += self._dt
        if self._waited <= self._GIVE_UP:
            return None
        i = int(np.argmax(error))
        return Reason("home_missed", self._names[i], float(error[i]), self._near)

    def end(self) -> None:
        pass

    def report(self) -> Mapping[str, Any]:
        return {}
