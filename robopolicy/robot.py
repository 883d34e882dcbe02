"""``Robot``: what deployment, evaluation and teleoperation drive: an arm of one's own, over ROS 2, or simulated.

None of its methods wait for the world: they return what is newest, with its times, and the caller decides what is too old.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from robopolicy.deploy.safety import Stamp
from robopolicy.deploy.workspace import Kinematics
from robopolicy.features import Feature


class State(NamedTuple):
    """Measured positions.

    Attributes:
        positions: ``[n]``, in the order and units of :attr:`Robot.names`.
        stamp: When they came, and were made.
    """

    positions: np.ndarray
    stamp: Stamp


class Sample(NamedTuple):
    """What was observed at one time step.

    Attributes:
        values: Every observation feature, in its units.
        time: When the policy may take it to have been made: the chunk that comes of it counts from here [s].
        stamps: Of inputs with times of their own, such as cameras.
    """

    values: Mapping[str, np.ndarray]
    time: float
    stamps: Mapping[str, Stamp]


class Robot(Protocol):
    """A robot that takes position targets at a control rate, and actions of a policy at the policy's.

    Attributes:
        observation_features: What it sees.
        action_feature: What its policies command; its rate is the policy's.
        names: Of the coordinates that it takes as position targets: joints and gripper, or a pose.
        kinematics: For the workspace of the safety filter; None: it has none.
    """

    @property
    def observation_features(self) -> Mapping[str, Feature]: ...

    @property
    def action_feature(self) -> Feature: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def kinematics(self) -> Kinematics | None: ...

    def reset(self, seed: int | None = None) -> None:
        """Bring it to where an episode begins, and wait until it is there."""
        ...

    def state(self) -> State:
        """The newest measured positions. Called every control period."""
        ...

    def observe(self) -> Sample:
        """The newest observation. Called at the policy's rate."""
        ...

    def targets(self, action: np.ndarray) -> np.ndarray:
        """The coordinates ``[n]`` that an action ``[A]`` asks for: the identity, or inverse kinematics.

        A function of the actions since :meth:`reset`, not of the safety filter's limits.
        """
        ...

    def command(self, positions: np.ndarray) -> None:
        """Send position targets ``[n]``: what the safety filter let through, nothing else."""
        ...

    def stop(self) -> None:
        """Leave it holding where it is; called at the end, and when anything goes wrong."""
        ...
