"""``Robot``: what deployment, evaluation and teleoperation drive: an arm of one's own, over ROS 2, or simulated.

None of its methods wait for the world: they return what is newest, with its times, and the caller decides what is too old.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.safety import Reason, Stamp
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
        unusable: Why no policy may act on it, though its times are good; None: nothing is known against it.
    """

    values: Mapping[str, np.ndarray]
    time: float
    stamps: Mapping[str, Stamp]
    unusable: Reason | None = None


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


class RealRobot(Robot, Protocol):
    """An arm that is where it was left, because its ``reset`` moves nothing: what ``robopolicy eval --robot`` asks of it.

    Before each episode it is brought to its home, through its safety filter.

    Attributes:
        resets: False. Robots whose ``reset`` does bring arm and objects to where an episode begins have True, and need no more.
        home: Where episodes begin ``[n]``; None: nobody knows, and none begins.
        limits: Of the safety filter.
    """

    @property
    def resets(self) -> bool: ...

    @property
    def home(self) -> np.ndarray | None: ...

    @property
    def limits(self) -> SafetyLimits: ...

    def hindrances(self) -> list[str]:
        """Why it must not begin to move, a line each: who else commands it or says where it is, or that it takes no commands."""
        ...

    def hear(self, request: Callable[..., Any]) -> None:
        """Tell ``request``, from any thread and until it is closed, who stops it: people at buttons, second masters, itself.

        ``request("estop", why=...)``, ``request("stop", why="rival: ...")`` or, for one who commands it, too, ``"mute"``;
        ``request("mute", why="permit ...")`` once it takes no commands any more; and ``request("deadman", pressed=...)`` again
        and again. They are heeded in the next period; see
        :meth:`robopolicy.deploy.arbiter.Arbiter.request`.
        """
        ...


class Measured(NamedTuple):
    """What a robot measures, before it means anything to a policy.

    Attributes:
        positions: ``[n]``, in the order and units of :attr:`RobotModel.names`.
        velocities: ``[n]``, likewise, per second.
        inputs: Other inputs by name: images uint8 ``[H, W, 3]`` RGB, poses ``[7]`` as position [m] and quaternion xyzw.
    """

    positions: np.ndarray
    velocities: np.ndarray
    inputs: Mapping[str, np.ndarray]


class RobotModel(Protocol):
    """What measurements and targets of a robot mean to its policies, whatever carries the messages.

    The simulated robot and the one behind ROS 2 share one, so what is observed and commanded cannot differ between them.

    Attributes:
        names: Of the coordinates that are measured and commanded.
        observation_features: What :meth:`observe` gives.
        action_feature: What :meth:`targets` takes; its rate is the policy's.
        inputs: Names of the :attr:`Measured.inputs` that :meth:`observe` reads: nobody needs to send others.
        kinematics: For the workspace of the safety filter; None: it has none.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def observation_features(self) -> Mapping[str, Feature]: ...

    @property
    def action_feature(self) -> Feature: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def kinematics(self) -> Kinematics | None: ...

    def reset(self, positions: np.ndarray) -> None:
        """An episode begins at these positions ``[n]``."""
        ...

    def observe(self, measured: Measured) -> dict[str, np.ndarray]:
        """Every observation feature, in its units."""
        ...

    def targets(self, action: np.ndarray) -> np.ndarray:
        """As :meth:`Robot.targets`."""
        ...

    def action_of(self, positions: np.ndarray) -> np.ndarray:
        """The action ``[A]`` that asks for coordinates ``[n]``: what :meth:`targets` undoes. Recordings need it."""
        ...
