"""SparseReach: MuJoCo's two-link Reacher with a sparse reward. Small and fast: where methods of reinforcement are compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np

from robopolicy.errors import TaskError
from robopolicy.features import Feature
from robopolicy.task import Observation, Task
from sim.render import Renderer, mujoco

MODEL = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "reacher.xml"  # that of Reacher-v5
LINKS = (0.1, 0.11)  # from joint to joint, and from there to the tip [m]
FULL_TORQUE = 200.0  # of both motors [N m]; each joint has an inertia of about 1 kg m^2 and a damping of 1 N m s
TARGET_RADIUS = 0.2  # [m]
ELBOW_LIMIT = 3.0  # [rad]
RATE = 50.0  # control steps per second [Hz]
_SUBSTEPS = 2

_NOISE_STD = 0.1  # of the expert's torques, at noise = 1
_NOISE_MEMORY = 0.7  # correlation from one control step to the next


class SparseReach(Task):
    """Bring the tip of a two-link arm within 2 cm of a target and hold it there for 4 steps. Reward 1 per step within, else 0.

    Model, starts and targets are those of gymnasium's Reacher-v5. The episode lasts 48 steps whether it succeeds or not, so
    the return counts the steps spent at the target. An action is a share of the motors' full torque of 200 N m.

    Args:
        max_episode_steps: Overrides the task's own 48.
        render_size: Height and width of ``render()`` [px].
        pretty: Shadows and smooth edges in ``render()``, for films.
    """

    rate = RATE
    max_episode_steps = 48
    render_mode = "rgb_array"

    tolerance: ClassVar[float] = 0.02  # [m]
    hold_steps: ClassVar[int] = 4

    def __init__(self, *, max_episode_steps: int | None = None, render_size: int = 256, pretty: bool = True) -> None:
        if max_episode_steps is not None:
            self.max_episode_steps = max_episode_steps
        spec = mujoco.MjSpec.from_file(str(MODEL))
        spec.worldbody.add_camera(name="film", pos=[0, 0, 0.72])
        self._model = spec.compile()
        self._data = mujoco.MjData(self._model)
        self._qpos, self._qvel, self._ctrl = self._data.qpos, self._data.qvel, self._data.ctrl
        self._start = self._qpos.copy()
        self._render_size, self._pretty = render_size, pretty
        self._film: Renderer | None = None
        self._steps = self._held = 0

        joints = ("shoulder", "elbow")
        features = (
            Feature("joint_cos_sin", (4,), "float32", "1", ("cos_shoulder", "cos_elbow", "sin_shoulder", "sin_elbow"), RATE),
            Feature("joint_vel", (2,), "float32", "rad/s", joints, RATE),
            Feature("target_pos", (2,), "float32", "m", ("x", "y"), RATE),
        )
        self.observation_features = {feature.name: feature for feature in features}
        self.action_feature = Feature("action", (2,), "float32", "1", joints, RATE)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space: gymnasium.Space[Any] = gymnasium.spaces.Dict(
            {f.name: gymnasium.spaces.Box(-np.inf, np.inf, f.shape, np.float32) for f in features}
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode that is a function of ``seed`` alone (None: continue the present random stream)."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self._model, self._data)
        # The draws of Reacher-v5, in its order: a seed starts the same episode here and there.
        self._qpos[:] = self._start + self.np_random.uniform(-0.1, 0.1, 4)
        target: np.ndarray = self.np_random.uniform(-TARGET_RADIUS, TARGET_RADIUS, 2)
        while np.hypot(*target) >= TARGET_RADIUS:
            target = self.np_random.uniform(-TARGET_RADIUS, TARGET_RADIUS, 2)
        self._qpos[2:] = target
        self._qvel[:] = self.np_random.uniform(-0.005, 0.005, 4)
        self._qvel[2:] = 0.0
        self._steps = self._held = 0
        return self._observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance ``1 / rate`` seconds. Raises TaskError when the action has another shape than declared, or is not finite."""
        action = np.asarray(action, np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise TaskError(f"SparseReach: action {action.tolist()}; expected two finite shares of the torque; check the policy")
        np.clip(action, -1.0, 1.0, out=self._ctrl)
        mujoco.mj_step(self._model, self._data, _SUBSTEPS)
        self._steps += 1
        within = self.distance <= self.tolerance
        self._held = self._held + 1 if within else 0
        info = {"is_success": self._held >= self.hold_steps}
        return self._observe(), float(within), False, self._steps >= self.max_episode_steps, info

    def render(self) -> np.ndarray:
        """A picture ``[render_size, render_size, 3]`` uint8 for films. Raises TaskError when there is no renderer."""
        if self._film is None:
            self._film = Renderer(self._model, self._render_size, self._render_size, "film", self._pretty)
        mujoco.mj_kinematics(self._model, self._data)  # mj_step leaves poses one physics step behind the joints
        return self._film(self._data)

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
            self._film = None

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> ReachExpert:
        """A PD controller towards the nearer of the two joint configurations that reach the target."""
        return ReachExpert(self, rng, noise)

    @property
    def joints(self) -> np.ndarray:
        """Angles ``[2]`` [rad] of shoulder and elbow; a view."""
        return self._qpos[:2]

    @property
    def joint_vel(self) -> np.ndarray:
        """Velocities ``[2]`` [rad/s]; a view."""
        return self._qvel[:2]

    @property
    def target(self) -> np.ndarray:
        """The target ``[2]`` [m]; a view."""
        return self._qpos[2:]

    @property
    def distance(self) -> float:
        """Between tip and target [m]."""
        shoulder, elbow, x, y = self._qpos.tolist()
        upper, fore = LINKS
        return math.hypot(
            upper * math.cos(shoulder) + fore * math.cos(shoulder + elbow) - x,
            upper * math.sin(shoulder) + fore * math.sin(shoulder + elbow) - y,
        )

    def _observe(self) -> Observation:
        joints = self._qpos[:2]
        return {
            "joint_cos_sin": np.concatenate([np.cos(joints), np.sin(joints)]).astype(np.float32),
            "joint_vel": self._qvel[:2].astype(np.float32),
            "target_pos": self._qpos[2:].astype(np.float32),
        }


class ReachExpert:
    """PD control of the joints, with correlated Gaussian noise on the torques; its pace differs from episode to episode."""

    def __init__(self, task: SparseReach, rng: np.random.Generator, noise: float) -> None:
        self._task, self._rng, self._std = task, rng, noise * _NOISE_STD
        self._frequency = rng.uniform(9.0, 12.0)  # of the closed loop, critically damped [rad/s]
        self._offset: np.ndarray = np.zeros(2)

    def act(self) -> np.ndarray:
        """The torques ``[2]`` for the task's present state."""
        task, w = self._task, self._frequency
        ways = [goal - task.joints for goal in reaching(task.target)]
        for way in ways:
            way[0] = (way[0] + math.pi) % (2 * math.pi) - math.pi  # the shoulder turns freely
        way = min(ways, key=lambda way: float(way @ way))
        torque = (w**2 * way - (2 * w - 1) * task.joint_vel) / FULL_TORQUE
        fresh = self._rng.normal(size=2) * self._std
        self._offset = _NOISE_MEMORY * self._offset + math.sqrt(1 - _NOISE_MEMORY**2) * fresh
        return np.clip(torque + self._offset, -1.0, 1.0).astype(np.float32)


def reaching(target: np.ndarray) -> list[np.ndarray]:
    """Both joint configurations ``[2]`` [rad] that bring the tip to ``target`` ``[2]`` [m], or as near as the joints can."""
    upper, fore = LINKS
    x, y = target
    cosine = (x * x + y * y - upper**2 - fore**2) / (2 * upper * fore)
    bend = min(math.acos(min(max(cosine, -1.0), 1.0)), ELBOW_LIMIT)
    aside = math.atan2(fore * math.sin(bend), upper + fore * math.cos(bend))
    direction = math.atan2(y, x)
    return [np.array([direction - aside, bend]), np.array([direction + aside, -bend])]
