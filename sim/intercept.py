"""Intercept: catch a target that runs around a pillar and turns without warning. A task on which late actions cost something.

Made for studies of delay. Two ways lead around the pillar, and from opposite the target they are equally good: plans made
one after the other may disagree, and what lies between them is the pillar. Plain numpy, a few microseconds a step.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import gymnasium
import numpy as np

from robopolicy.errors import TaskError
from robopolicy.features import Feature
from robopolicy.task import Observation, Task

RATE = 20.0  # control steps per second [Hz]
ARENA = 1.0  # half its side [m]
PILLAR = 0.24  # distance from the middle at which the agent touches the pillar [m]
RING = 0.7  # radius on which the target runs [m]
TARGET_SPEED = (0.15, 0.3)  # along the ring, drawn anew with every target [m/s]
TURN_TIME = (1.0, 3.0)  # between its turns [s]
MAX_SPEED, MAX_ACCELERATION, GAIN = 0.7, 4.0, 8.0  # of the agent towards the commanded position [m/s], [m/s^2], [1/s]

_DT = 1 / RATE
_CLEARANCE = 0.37  # from the middle, kept by the expert [m]
_DECISION = 0.6  # from the middle: where the expert takes a side [m]
_AHEAD = 0.12  # of the agent: where the expert puts its command [m]
_NOISE_STD, _NOISE_MEMORY = 0.03, 0.8  # of the expert's commands at noise = 1 [m]; correlation over a step


class Intercept(Task):
    """Catch the target three times before time is up, without touching the pillar in the middle.

    Action: where the agent shall go, ``[2]`` m; its speed and acceleration are limited. The target runs on a ring around the
    pillar and turns at random times. It is caught when the agent stays within 10 cm of it for 3 steps, and appears at once on the
    other side. Reward: the share of the catches made so far. The episode ends with the third catch, at the pillar, or after 15 s.

    Args:
        max_episode_steps: Overrides the task's own 300.
        render_size: Side of the frames of :meth:`render` [px].
    """

    rate = RATE
    max_episode_steps = 300
    render_mode = "rgb_array"

    catches: ClassVar[int] = 3
    reach: ClassVar[float] = 0.1  # [m]
    hold_steps: ClassVar[int] = 3

    def __init__(self, *, max_episode_steps: int | None = None, render_size: int = 256) -> None:
        if max_episode_steps is not None:
            self.max_episode_steps = max_episode_steps
        self._size = render_size
        self.agent, self.agent_vel = (0.0, 0.0), (0.0, 0.0)  # [m], [m/s]
        self.bearing = self.turning = 0.0  # of the target on its ring [rad], [rad/s]
        self.caught = self._held = self._steps = self._until_turn = 0
        features = tuple(
            Feature(name, (2,), "float32", unit, ("x", "y"), RATE)
            for name, unit in (("agent_pos", "m"), ("agent_vel", "m/s"), ("target_pos", "m"), ("target_vel", "m/s"))
        )
        self.observation_features = {feature.name: feature for feature in features}
        self.action_feature = Feature("action", (2,), "float32", "m", ("x", "y"), RATE)
        self.action_space = gymnasium.spaces.Box(-ARENA, ARENA, (2,), np.float32)
        self.observation_space: gymnasium.Space[Any] = gymnasium.spaces.Dict(
            {f.name: gymnasium.spaces.Box(-np.inf, np.inf, f.shape, np.float32) for f in features}
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode that is a function of ``seed`` alone (None: continue the present random stream)."""
        super().reset(seed=seed)
        angle, radius = self.np_random.uniform(-math.pi, math.pi), self.np_random.uniform(0.6, 0.9)
        self.agent, self.agent_vel = (radius * math.cos(angle), radius * math.sin(angle)), (0.0, 0.0)
        self.caught = self._held = self._steps = 0
        self._appear()
        return self._observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance ``1 / rate`` seconds. Raises TaskError when the action has another shape than declared, or is not finite."""
        if np.shape(action) != (2,) or not np.isfinite(action).all():
            raise TaskError(f"Intercept: action {np.asarray(action).tolist()}; expected a finite position [2]; check the policy")
        to = [min(max(float(value), -ARENA), ARENA) for value in action]
        self._move(to[0], to[1])
        self._until_turn -= 1
        if self._until_turn == 0:
            self.turning = -self.turning
            self._until_turn = self._next_turn()
        self.bearing += self.turning * _DT
        self._steps += 1
        crashed = math.hypot(*self.agent) < PILLAR
        self._held = self._held + 1 if self.distance <= self.reach else 0
        if self._held >= self.hold_steps and not crashed:
            self.caught += 1
            self._held = 0
            if self.caught < self.catches:
                self._appear()
        success = self.caught >= self.catches
        info = {"is_success": success}
        return self._observe(), self.caught / self.catches, success or crashed, self._steps >= self.max_episode_steps, info

    def render(self) -> np.ndarray:
        """A picture ``[render_size, render_size, 3]`` uint8: the pillar grey, the target red, the agent blue."""
        frame = np.full((self._size, self._size, 3), 245, np.uint8)
        axis = (np.arange(self._size) + 0.5) / self._size * 2.2 - 1.1
        x, y = axis[None, :], -axis[:, None]
        ring = np.abs(np.hypot(x, y) - RING) < 0.006
        frame[ring] = (220, 200, 200)
        for centre, radius, colour in (
            ((0.0, 0.0), PILLAR - 0.04, (120, 120, 120)),
            (self.target, self.reach, (240, 150, 140)),
            (self.target, 0.03, (200, 40, 30)),
            (self.agent, 0.04, (40, 80, 200)),
        ):
            frame[np.hypot(x - centre[0], y - centre[1]) <= radius] = colour
        return frame

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> InterceptExpert:
        """Runs at the target, and where the pillar is in the way takes a side late, at random where both are as good."""
        return InterceptExpert(self, rng, noise)

    @property
    def target(self) -> tuple[float, float]:
        """Where the target is [m]."""
        return RING * math.cos(self.bearing), RING * math.sin(self.bearing)

    @property
    def target_vel(self) -> tuple[float, float]:
        """[m/s]."""
        speed = RING * self.turning
        return -speed * math.sin(self.bearing), speed * math.cos(self.bearing)

    @property
    def distance(self) -> float:
        """Between agent and target [m]."""
        x, y = self.target
        return math.hypot(self.agent[0] - x, self.agent[1] - y)

    def _appear(self) -> None:
        """A target on the other side of the pillar."""
        draw = self.np_random
        self.bearing = math.atan2(self.agent[1], self.agent[0]) + math.pi + draw.uniform(-0.6, 0.6)
        self.turning = draw.choice((-1.0, 1.0)) * draw.uniform(*TARGET_SPEED) / RING
        self._until_turn = self._next_turn()

    def _next_turn(self) -> int:
        return max(1, round(self.np_random.uniform(*TURN_TIME) * RATE))

    def _move(self, x: float, y: float) -> None:
        """Towards the command, as fast as speed and acceleration allow."""
        (px, py), (vx, vy) = self.agent, self.agent_vel
        wx, wy = GAIN * (x - px), GAIN * (y - py)
        scale = min(1.0, MAX_SPEED / max(math.hypot(wx, wy), 1e-9))
        dx, dy = wx * scale - vx, wy * scale - vy
        share = min(1.0, MAX_ACCELERATION * _DT / max(math.hypot(dx, dy), 1e-9))
        vx, vy = vx + share * dx, vy + share * dy
        self.agent, self.agent_vel = (px + vx * _DT, py + vy * _DT), (vx, vy)

    def _observe(self) -> Observation:
        values = (self.agent, self.agent_vel, self.target, self.target_vel)
        return {name: np.array(value, np.float32) for name, value in zip(self.observation_features, values, strict=True)}


class InterceptExpert:
    """Straight at where the target will be; around the pillar by its tangent; commands with correlated Gaussian noise."""

    def __init__(self, task: Intercept, rng: np.random.Generator, noise: float) -> None:
        self._task, self._rng, self._std = task, rng, noise * _NOISE_STD
        self._side = 0  # of the pillar: 1 counter-clockwise, -1 clockwise, 0 not decided
        self._caught = 0
        self._offset: np.ndarray = np.zeros(2)

    def act(self) -> np.ndarray:
        """The commanded position ``[2]`` m for the task's present state."""
        task = self._task
        if task.caught != self._caught:
            self._side, self._caught = 0, task.caught
        (px, py), (tx, ty), (ux, uy) = task.agent, task.target, task.target_vel
        lead = min(0.6, task.distance / MAX_SPEED)
        goal = (tx + lead * ux, ty + lead * uy)
        way = math.atan2(goal[1] - py, goal[0] - px)
        radius = math.hypot(px, py)
        if self._blocked(px, py, *goal):
            if self._side == 0 and radius < _DECISION:
                self._side = self._choose(px, py, goal)
            elif self._side and self._advantage(px, py, goal) * self._side < -0.5:
                self._side = -self._side  # the target turned, and the other way has become much the shorter
            if self._side:
                inward = math.atan2(-py, -px)
                # Passing counter-clockwise keeps the pillar to the left: the tangent lies to the right of the way inward.
                way = inward - self._side * math.asin(min(1.0, _CLEARANCE / max(radius, 1e-9)))
        else:
            self._side = 0
        reach = min(_AHEAD, max(0.02, math.hypot(goal[0] - px, goal[1] - py)))
        fresh = self._rng.normal(size=2) * self._std
        self._offset = _NOISE_MEMORY * self._offset + math.sqrt(1 - _NOISE_MEMORY**2) * fresh
        command = np.array([px + reach * math.cos(way), py + reach * math.sin(way)]) + self._offset
        return np.clip(command, -ARENA, ARENA).astype(np.float32)

    def _blocked(self, px: float, py: float, gx: float, gy: float) -> bool:
        """Does the straight way to the goal pass too near to the middle?"""
        dx, dy = gx - px, gy - py
        share = -(px * dx + py * dy) / max(dx * dx + dy * dy, 1e-9)
        if not 0 < share < 1:
            return False
        return math.hypot(px + share * dx, py + share * dy) < _CLEARANCE - 0.02

    def _advantage(self, px: float, py: float, goal: tuple[float, float]) -> float:
        """How much shorter the way counter-clockwise is, as an angle [rad]; 0 for a goal straight opposite."""
        angle = math.atan2(goal[1], goal[0]) - math.atan2(py, px)
        return math.pi - angle % (2 * math.pi)

    def _choose(self, px: float, py: float, goal: tuple[float, float]) -> int:
        odds = 1 / (1 + math.exp(-self._advantage(px, py, goal) / 0.3))
        return 1 if self._rng.uniform() < odds else -1
