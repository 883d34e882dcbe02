"""A robot and planners that tests can look through."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from robopolicy.deploy.clock import Clock
from robopolicy.deploy.safety import Stamp
from robopolicy.features import Feature
from robopolicy.robot import Sample, State

RATE = 20.0


class Point:
    """Two coordinates that are where they were told to be; actions are the same coordinates, 20 a second."""

    names = ("a", "b")
    kinematics = None
    action_feature = Feature("action", (2,), "float32", "m", ("a", "b"), RATE)
    observation_features: Mapping[str, Feature] = {"pos": Feature("pos", (2,), "float32", "m", ("a", "b"), RATE)}

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at = np.zeros(2)
        self.sent: list[tuple[float, np.ndarray]] = []
        self.stopped = False
        self.age = 0.0  # of the measured state [s]

    def reset(self, seed: int | None = None) -> None:
        self.at = np.zeros(2)

    def state(self) -> State:
        return State(self.at.copy(), Stamp(self._clock.now() - self.age))

    def observe(self) -> Sample:
        return Sample({"pos": self.at.astype(np.float32)}, self._clock.now(), {})

    def targets(self, action: np.ndarray) -> np.ndarray:
        return np.asarray(action, np.float64)

    def command(self, positions: np.ndarray) -> None:
        self.at = positions.copy()
        self.sent.append((self._clock.now(), positions.copy()))

    def stop(self) -> None:
        self.stopped = True


class Planned:
    """A planner whose chunks hold ``value``, 16 rows of it; it can be made slow, or to fail.

    Attributes:
        asked: Observations, previous plans and delays of all calls.
        gate: Inference waits here while it is clear.
    """

    rows = 16

    def __init__(self, value: tuple[float, float] = (0.1, 0.0)) -> None:
        self.value = np.array(value, np.float32)
        self.asked: list[tuple[Mapping[str, np.ndarray], Any, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.error: Exception | None = None
        self.resets = 0

    def plan(self, obs: Mapping[str, np.ndarray], previous: Any, delay: int, generator: Any) -> np.ndarray:
        self.asked.append((obs, previous, delay))
        self.begun.set()
        if not self.gate.wait(30):
            raise TimeoutError("nobody opened the gate")
        if self.error is not None:
            raise self.error
        return np.tile(self.value, (len(obs["pos"]), self.rows, 1))

    def reset(self) -> None:
        self.resets += 1
