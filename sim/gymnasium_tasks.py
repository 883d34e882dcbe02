"""Any gymnasium environment with continuous control behind :class:`robopolicy.task.Task`, MuJoCo's locomotion first of all."""

from __future__ import annotations

import atexit
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from robopolicy.errors import TaskError, nearest
from robopolicy.features import Feature
from robopolicy.task import Observation, Task
from sim.render import renderer_available  # also: chooses the OpenGL library before gymnasium imports mujoco

_NAME = "state"  # of the feature that a plain vector observation becomes


class Gymnasium(Task):
    """A gymnasium environment by its id, for example HalfCheetah-v5: rewards, ends and limits are its own.

    A vector observation is the feature ``state``; of a dictionary each vector is a feature. gymnasium states no units, so they
    are empty. ``is_success`` is what the environment says under ``is_success`` or ``success`` in its info, else False:
    locomotion is judged by its return.

    Args:
        id: Name of the environment; ``module:Name-v0`` imports the module that registers it.
        kwargs: Whatever else ``gymnasium.make`` and the environment take: ``max_episode_steps``, ``ctrl_cost_weight``, ``width``.

    Raises:
        TaskError: The environment is unknown, cannot be made, acts discretely or without bounds, or observes pixels.
    """

    render_mode = "rgb_array"

    def __init__(self, id: str = "", **kwargs: Any) -> None:
        self.id = id
        self._env = _make(id, kwargs)
        self.max_episode_steps = self._limit()
        self.rate = self._rate()
        self.observation_features = self._observed()
        self.action_feature = self._acted()
        self._vector = isinstance(self._env.observation_space, Box)
        self.observation_space: gymnasium.Space[Any] = Dict(
            {f.name: Box(-np.inf, np.inf, f.shape, np.float32) for f in self.observation_features.values()}
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode that is a function of ``seed`` alone (None: continue the present random stream)."""
        observation, info = self._env.reset(seed=seed, options=options)
        return self._named(observation), {**info, "is_success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance ``1 / rate`` seconds. Raises TaskError when the action has another shape than declared, or is not finite."""
        action = np.asarray(action)
        if action.shape != self._low.shape or not np.isfinite(action).all():
            raise TaskError(f"{self.id}: action {action.tolist()}; expected {len(self._low)} finite numbers; check the policy")
        clipped = np.clip(action, self._low, self._high).astype(self._low.dtype)
        observation, reward, terminated, truncated, info = self._env.step(clipped)
        success = bool(info.get("is_success", info.get("success", False)))
        return self._named(observation), float(reward), bool(terminated), bool(truncated), {**info, "is_success": success}

    def render(self) -> np.ndarray:
        """A picture ``[H, W, 3]`` uint8. Raises TaskError when the machine has no offscreen renderer."""
        if renderer_available() is None:
            raise TaskError(f"{self.id}: no offscreen renderer found; 'apt-get install libegl1' brings one (docs/install.md)")
        frame = np.asarray(self._env.render())
        # Left open, its context would complain on stderr after mujoco has shut EGL down; exit handlers run last in, first out.
        atexit.unregister(self._env.close)
        atexit.register(self._env.close)
        return frame

    def close(self) -> None:
        atexit.unregister(self._env.close)
        self._env.close()

    # ---- what the environment declares ---------------------------------------------------------------------------------------

    def _limit(self) -> int:
        limit = self._env.spec.max_episode_steps if self._env.spec else None
        if limit is None:
            raise TaskError(f"{self.id} has no limit of its own on the length of an episode; give max_episode_steps")
        return int(limit)

    def _rate(self) -> float:
        dt = getattr(self._env.unwrapped, "dt", None)
        rate = 1.0 / float(dt) if dt else self._env.metadata.get("render_fps")
        if not rate:
            raise TaskError(f"{self.id} says neither its time step (dt) nor its frames per second; it cannot be used as a task")
        return round(float(rate), 6)  # 1 / 0.008 and its like

    def _observed(self) -> dict[str, Feature]:
        space = self._env.observation_space
        spaces = dict(space.spaces) if isinstance(space, Dict) else {_NAME: space}
        features: dict[str, Feature] = {}
        for name, part in spaces.items():
            if not isinstance(part, Box):
                raise TaskError(f"{self.id}: observation '{name}' is {part}; only vectors of numbers can be observed")
            if len(part.shape) != 1 or part.dtype == np.uint8:
                raise TaskError(
                    f"{self.id}: observation '{name}' is an array {part.shape} {part.dtype}; only vectors can be observed"
                )
            features[name] = Feature(name, part.shape, "float32", "", (), self.rate)
        return features

    def _acted(self) -> Feature:
        space = self._env.action_space
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise TaskError(f"{self.id}: actions are {space}; a policy commands a vector of numbers, choose a continuous task")
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise TaskError(f"{self.id}: actions are not bounded ({space}); register the environment with bounds of its own")
        self.action_space = space
        self._low, self._high = space.low, space.high
        return Feature("action", self._low.shape, "float32", "", (), self.rate)

    def _named(self, observation: Any) -> Observation:
        parts = {_NAME: observation} if self._vector else observation
        return {name: np.asarray(parts[name], np.float32) for name in self.observation_features}


def _make(id: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    if not id:
        raise TaskError("task 'gymnasium' needs the environment's id, for example id=HalfCheetah-v5")
    try:
        return gymnasium.make(id, render_mode="rgb_array", disable_env_checker=True, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise TaskError(f"gymnasium knows no environment '{id}': {nearest(id, gymnasium.registry)}") from error
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise TaskError(f"gymnasium environment '{id}' cannot be made: {_line(error)}") from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise TaskError(f"gymnasium environment '{id}': {_line(error)}") from error


def _line(error: Exception) -> str:
    """An error's text as one line, without what gymnasium adds about its own signatures."""
    return " ".join(str(error).split(" was raised from ")[0].split())
