"""``Motion``: a set point that moves within velocity, acceleration and jerk, and can always stop within its bounds.

Every accepted state comes with a stopping trajectory that was checked from end to end. If the next step towards a target cannot
be shown to leave room for a stop, it is not taken, and the stop shown before is followed instead. So no target, however mad,
can bring the set point out: the induction needs only that it starts at rest, inside.

Limits hold exactly in discrete time as well: the trajectory is twice differentiable with ``|v| <= V``, ``|a| <= A``,
``|j| <= J``, and the k-th finite difference at any period divided by ``dt^k`` is a weighted mean of the k-th derivative
(B-spline weights, which are positive and sum to 1). What remains is rounding, ``8 eps max|p| / dt^3``: 1e-7 rad/s^3 at 250 Hz.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ruckig

# Of positions [rad, m]: Ruckig solves polynomials, whose roots, and so the ends of stops, are good to about 1e-9.
TOLERANCE = 1e-6
_STILL = 1e-9

# Whether a stop is admissible, given where it starts [n], how far it strays from there [n], its length [s] and its positions.
Admits = Callable[[np.ndarray, np.ndarray, float, Callable[[float], np.ndarray]], bool]


class Motion:
    """Set points at a fixed period, one coordinate as free as the next (they are not synchronised: a synchronised profile can
    overshoot a stop that each coordinate by itself could make).

    Args:
        dt: Period [s].
        velocity: Limits ``[n]``.
        acceleration: Limits ``[n]``.
        jerk: Limits ``[n]``.
    """

    def __init__(self, dt: float, velocity: np.ndarray, acceleration: np.ndarray, jerk: np.ndarray) -> None:
        n = len(velocity)
        self.dt = dt
        self._velocity = velocity
        self._frame, self._highest_frame = np.zeros(n), 0.99 * velocity  # something must be left to catch up with
        self._towards, self._halting = ruckig.Ruckig(n, dt), ruckig.Ruckig(n, dt)
        self._target, self._halt = ruckig.InputParameter(n), ruckig.InputParameter(n)
        for problem in (self._target, self._halt):
            problem.max_velocity, problem.max_acceleration = velocity.tolist(), acceleration.tolist()
            problem.max_jerk = jerk.tolist()
            problem.synchronization = ruckig.Synchronization.No
        self._halt.control_interface = ruckig.ControlInterface.Velocity
        # Stops are computed from 0: Ruckig 0.19 counts an end at 0 among the extrema of trajectories that only have a velocity.
        self._halt.current_position = self._halt.target_velocity = [0.0] * n
        self._next = ruckig.OutputParameter(n)
        self._stop, self._spare = ruckig.Trajectory(n), ruckig.Trajectory(n)
        self._lower, self._upper = np.full(n, -np.inf), np.full(n, np.inf)
        self.lower, self.upper = self._lower, self._upper  # of the whole path, stops included; widened for starts outside
        self.position: np.ndarray = np.zeros(n)
        self.velocity: np.ndarray = np.zeros(n)
        self.acceleration: np.ndarray = np.zeros(n)
        self._origin: np.ndarray = self.position  # where the stop began
        self._elapsed: float | None = None  # along the stop; None: at rest

    def seat(self, position: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
        """Start at rest at ``position``; the path stays within ``lower`` and ``upper``, widened to include it.

        Where it begins outside it comes in without turning back, and the bounds close behind it.
        """
        self.position = np.array(position, np.float64)
        self._lower, self._upper = lower, upper
        self.lower, self.upper = np.minimum(lower, position), np.maximum(upper, position)
        self.rest()

    def rest(self) -> None:
        """Forget the velocity: the robot stood still while nobody called."""
        self.velocity, self.acceleration = np.zeros_like(self.position), np.zeros_like(self.position)
        self._elapsed = None

    def still(self) -> bool:
        return self._elapsed is None

    def close(self) -> None:
        """Widened bounds end where the set point is now."""
        self.lower, self.upper = self._closed(self.position)

    def _closed(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bounds once the set point is at ``position``."""
        lower = np.minimum(self._lower, np.maximum(self.lower, position))
        return lower, np.maximum(self._upper, np.minimum(self.upper, position))

    def propose(self, target: np.ndarray, velocity: np.ndarray | None, speed: float, admits: Admits) -> bool:
        """Go on by one period towards ``target``, if it can be shown that a stop within bounds remains.

        Args:
            target: Positions ``[n]``, finite.
            velocity: With which the target moves ``[n]``; None: it stands. The problem is solved in a frame that moves along,
                where the target stands, which meets it without lag.
            speed: Share of the velocity limits.
            admits: Judges the stop beyond its bounds in position.

        Returns:
            Whether the step was taken; if not, nothing has changed.
        """
        problem = self._target
        frame = np.clip(self._frame if velocity is None else velocity, -self._highest_frame * speed, self._highest_frame * speed)
        problem.current_position, problem.current_velocity = self.position.tolist(), (self.velocity - frame).tolist()
        problem.current_acceleration = self.acceleration.tolist()
        problem.target_position = (target - frame * self.dt).tolist()  # the output is to be where the target is now
        problem.max_velocity = (speed * self._velocity - frame).tolist()
        problem.min_velocity = (-speed * self._velocity - frame).tolist()
        try:
            result = self._towards.update(problem, self._next)
        except ruckig.RuckigError:  # a bound missed by rounding: the stop is still there
            return False
        if result not in (ruckig.Result.Working, ruckig.Result.Finished):
            return False
        position = np.array(self._next.new_position) + frame * self.dt
        moving, acceleration = np.array(self._next.new_velocity) + frame, np.array(self._next.new_acceleration)
        if not self._can_stop(position, moving, acceleration, admits):
            return False
        self.position, self.velocity, self.acceleration = position, moving, acceleration
        self._origin, self._elapsed = position, 0.0
        return True

    def brake(self) -> None:
        """Go on by one period along the stop."""
        if self._elapsed is None:
            return
        self._elapsed += self.dt
        if self._elapsed < self._stop.duration:
            position, velocity, acceleration = self._stop.at_time(self._elapsed)
            self.position, self.velocity = self._origin + position, np.array(velocity)
            self.acceleration = np.array(acceleration)
        else:
            self.position = self._origin + self._stop.at_time(self._stop.duration)[0]
            self.rest()

    def _can_stop(self, position: np.ndarray, velocity: np.ndarray, acceleration: np.ndarray, admits: Admits) -> bool:
        self._halt.current_velocity, self._halt.current_acceleration = velocity.tolist(), acceleration.tolist()
        path = self._spare
        try:
            result = self._halting.calculate(self._halt, path)
        except ruckig.RuckigError:
            return False
        if result not in (ruckig.Result.Working, ruckig.Result.Finished):
            return False
        extrema = path.position_extrema
        back, forth = np.array([bound.min for bound in extrema]), np.array([bound.max for bound in extrema])
        if not self._comes_in(position, back, forth):
            return False
        lower, upper = self._closed(position)  # as they will be: a stop must not lead out again where it has just come in
        if (position + back < lower - TOLERANCE).any() or (position + forth > upper + TOLERANCE).any():
            return False
        if not admits(position, np.maximum(-back, forth), path.duration, lambda time: position + path.at_time(time)[0]):
            return False
        self._stop, self._spare = path, self._stop
        return True

    def _comes_in(self, position: np.ndarray, back: np.ndarray, forth: np.ndarray) -> bool:
        """Whether coordinates that are still outside only move inwards until the stop ends."""
        low, high = position < self._lower - TOLERANCE, position > self._upper + TOLERANCE
        if not low.any() and not high.any():
            return True
        end = np.array(self._spare.at_time(self._spare.duration)[0])
        inwards = np.where(low, (back > -_STILL) & (end > forth - _STILL), (forth < _STILL) & (end < back + _STILL))
        return bool(inwards[low | high].all())
