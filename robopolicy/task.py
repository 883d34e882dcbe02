"""``Task``: a gymnasium environment with declared features, and the lookup of tasks by name.

The library never imports a simulator. A task is named by a short name that some installed package registered under the entry
point group ``robopolicy.tasks``, or by the dotted path of its class, ``package.module:Class``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

import gymnasium
import numpy as np

from robopolicy.errors import TaskError, install, nearest
from robopolicy.features import Feature

ENTRY_POINTS = "robopolicy.tasks"

Observation = dict[str, np.ndarray]


class Expert(Protocol):
    """A scripted demonstrator, made by :meth:`Task.expert` after ``reset``; may read privileged state of its task."""

    def act(self) -> np.ndarray:
        """The action ``[A]`` for the present state, in the units of the task's ``action_feature``."""
        ...


class Task(gymnasium.Env[Observation, np.ndarray]):
    """What evaluation, demonstration, RL and deployment need to know of an environment.

    The whole episode is a function of ``reset(seed=...)`` and the actions; nothing is drawn from global random state.
    ``step`` puts ``is_success`` (bool, at this step) into ``info``. Observations are dictionaries of arrays as declared in
    ``observation_features`` (images ``uint8`` HWC); actions are clipped to ``action_space`` by the task.
    """

    observation_features: dict[str, Feature]
    action_feature: Feature
    rate: float  # control steps per second [Hz]
    max_episode_steps: int  # ``truncated`` becomes True at this step
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Expert:
        """A scripted expert for the episode just reset; ``noise`` scales exploration noise (0: none).

        Raises TaskError when the task has none.
        """
        raise TaskError(f"task '{type(self).__name__}' has no scripted expert; record demonstrations by teleoperation instead")


@dataclass(frozen=True)
class TaskSpec:
    """A task by name and constructor arguments; picklable, so that worker processes build their own."""

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Task:
        """Build the task. Raises TaskError for an unknown name or argument."""
        cls = find_task(self.name)
        try:
            return cls(**self.kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            import inspect

            valid = [p for p in inspect.signature(cls).parameters if p != "self"]
            bad = next((k for k in self.kwargs if k not in valid), "")
            raise TaskError(f"task '{self.name}' takes no argument '{bad}'; {nearest(bad, valid)}") from error


def task_names() -> list[str]:
    """Short names of all tasks that installed packages registered."""
    return sorted(point.name for point in entry_points(group=ENTRY_POINTS))


def find_task(name: str) -> type[Task]:
    """The class behind a short name or a dotted path ``package.module:Class``. Raises TaskError with the nearest valid name."""
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise TaskError(f"task '{name}' cannot be imported: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, Task)):  # names come from checkpoints too: build nothing else
            raise TaskError(f"'{name}' is no task; name a class derived from robopolicy.task.Task")
        return cls
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            try:
                return point.load()
            except ImportError as error:
                raise TaskError(
                    f"task '{name}' needs a package that is not installed ({error}); {install('mujoco', 'pusht', 'robosuite')}"
                ) from error
    raise TaskError(f"unknown task '{name}': {nearest(name, task_names())}")
