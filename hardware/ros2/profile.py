"""``RosProfile``: one arm behind ROS 2: which topics, which joints, which limits; a YAML file for each in ``profiles/``.

Coordinates are what the safety filter moves: their names and order are those of the profile's limits, their units SI. Everything
that a driver does differently is said here: the names of its joints, what it takes as a command, where its gripper listens.
Topics are relative: they follow the namespace of the node, and remappings. docs/profiles.md explains how to write one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pydantic

from robopolicy.config import Config, load_yaml, parse
from robopolicy.deploy.limits import SafetyLimits, load_limits
from robopolicy.errors import ConfigError, nearest

PROFILES = Path(__file__).parent / "profiles"

POSE = ("x", "y", "z", "rx", "ry", "rz")  # coordinates of a tool: position [m] and rotation vector [rad]


class Model(Config):
    """What measurements and actions mean: a :class:`robopolicy.robot.RobotModel`, built as ``factory(**args)``.

    Attributes:
        factory: Dotted path, ``package.module:Class``; None: :class:`hardware.ros2.joints.JointModel` of this profile.
        args: Its arguments.
    """

    factory: str | None = None
    args: dict[str, Any] = {}


class Joints(Config):
    """A coordinate out of joint states: ``offset + scale * (sum of the joints)``. A joint's name alone is short for that joint.

    Two fingers that open by half the width each are ``names: [left, right]``; a percentage is a ``scale``.
    """

    names: tuple[str, ...] = pydantic.Field(min_length=1)
    scale: float = 1.0
    offset: float = 0.0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"names": (value,)}
        listed = isinstance(value, dict) and isinstance(value.get("names"), list)
        return {**value, "names": tuple(value["names"])} if listed else value

    @pydantic.model_validator(mode="after")
    def _turns(self) -> Self:
        if self.scale == 0:
            raise ValueError("scale is 0; nothing would be measured")
        return self


class StateSource(Config):
    """Where measured positions come from.

    Attributes:
        type: ``joints``: JointState, by name. ``pose``: PoseStamped of the tool. ``fk``: JointState, and the tool's pose by the
            profile's kinematics.
        topic: Of it.
        joints: Coordinate -> joints; with ``fk`` the joints of the chain, in its order, and the gripper.
    """

    type: Literal["joints", "pose", "fk"] = "joints"
    topic: str = "joint_states"
    joints: dict[str, Joints] = {}


class Command(Config):
    """What the controller takes.

    Attributes:
        type: ``position``: Float64MultiArray of joint positions. ``trajectory``: JointTrajectory of one point. ``pose``:
            PoseStamped. ``velocity``: Float64MultiArray of joint velocities; ``twist``: TwistStamped.
        topic: Of it.
        joints: Coordinates in the controller's order; the pose's for ``pose`` and ``twist``.
        frame: Frame of poses and twists.
        duration: After which a trajectory's point is reached [s]: a period or a few; shorter ones are refused, because the
            controller would then be faster than the limits.
        gain: Of the position error that velocities correct [1/s].
        unsafe_velocity: Velocity and twist controllers never time out: if this process dies, the arm moves on. Say true to
            take that upon yourself.
    """

    type: Literal["position", "trajectory", "pose", "velocity", "twist"] = "position"
    topic: str = "forward_position_controller/commands"
    joints: tuple[str, ...] = pydantic.Field(min_length=1)
    frame: str = "base_link"
    duration: float = pydantic.Field(default=0.02, gt=0)
    gain: float = pydantic.Field(default=2.0, ge=0)
    unsafe_velocity: bool = False

    @property
    def velocity(self) -> bool:
        """Whether velocities are sent."""
        return self.type in ("velocity", "twist")

    @pydantic.model_validator(mode="after")
    def _is_meant(self) -> Self:
        if self.velocity and not self.unsafe_velocity:
            raise ValueError(
                f"type '{self.type}' keeps the arm moving when this process dies, those controllers have no timeout; use "
                "position or trajectory, or say unsafe_velocity: true"
            )
        if self.type in ("pose", "twist") and self.joints != POSE:
            raise ValueError(f"type '{self.type}' commands {', '.join(POSE)}, in this order")
        return self


class Gripper(Config):
    """A gripper with a topic of its own.

    Attributes:
        coordinate: Which it is.
        type: ``float64``: Float64, by ``scale`` and ``offset``; ``none``: not commanded here.
        topic: Of the command.
        scale: The command is ``(coordinate - offset) / scale``: what the driver takes; with ``offset`` as in the state.
        hysteresis: Smaller changes are not sent, until the target comes to rest.
        state_topic: JointState of the gripper's joints, where the driver does not put them beside the arm's; None: it does.
    """

    coordinate: str = "gripper_width"
    type: Literal["float64", "none"] = "float64"
    topic: str = "gripper/command"
    scale: float = 1.0
    offset: float = 0.0
    hysteresis: float = pydantic.Field(default=0.0005, ge=0)
    state_topic: str | None = None


class Input(Config):
    """A camera, or the pose of an object.

    Attributes:
        type: ``image``: Image; ``compressed``: CompressedImage; ``pose``: PoseStamped.
        topic: Of it.
        encoding: Of images, ``rgb8`` or ``bgr8`` or ``mono8``: others are refused. Compressed ones hold their own.
        size: Height and width of what comes [px]: other images are refused. None: any.
        resize: Height and width of what is handed on [px], by area; None: as it came.
        frame: Of poses: others are refused. None: any.
        stuck: Whose content is the same to the bit for longer [s] is a dead sensor, however new its stamps: the arm holds. Real
            sensors have noise. None: where nothing has, in simulation, and for poses that somebody made up.
    """

    type: Literal["image", "compressed", "pose"]
    topic: str
    encoding: Literal["rgb8", "bgr8", "mono8"] = "rgb8"
    size: tuple[int, int] | None = None
    resize: tuple[int, int] | None = None
    frame: str | None = None
    stuck: float | None = pydantic.Field(default=1.0, gt=0)


NO_PERMIT = "`permits: null` in a profile of yours for one that has no such topic"  # where nobody publishes it


class Permit(Config):
    """A Bool topic that must say true for the arm to be commanded: the driver's, or that of a node of yours.

    Attributes:
        topic: Of it.
        latched: Said on change, and to whoever comes later: it holds while its publisher is there. False: said again and again,
            and a second of silence counts as false.
        mend: What a person does where it is not true, for the refusal.
    """

    topic: str
    latched: bool = True
    mend: str = "find out why at the robot"


class Reset(Config):
    """How a simulated robot begins an episode: its node's parameter takes the seed, its service ``Trigger`` does it."""

    node: str
    service: str = "reset"
    seed_parameter: str | None = "seed"


class Chain(Config):
    """Denavit and Hartenberg's parameters, one row ``[a, alpha, d, theta]`` a joint [m, rad, m, rad]: :mod:`.kinematics`.

    Attributes:
        convention: ``standard``: Rz(theta) Tz(d) Tx(a) Rx(alpha); ``modified`` (Craig): Rx(alpha) Tx(a) Rz(theta) Tz(d).
        rows: From the base; ``theta`` is added to the joint's angle. They belong to the first coordinates of the limits.
        base: Where the chain begins, in the frame of the workspace: x, y, z [m] and the turn about z [rad].
        tool: Position of the tool in the last frame [m].
        points: Further points above the table: name -> [index of the frame (1 is behind the first joint), x, y, z].
    """

    convention: Literal["standard", "modified"]
    rows: tuple[tuple[float, float, float, float], ...] = pydantic.Field(min_length=1)
    base: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    tool: tuple[float, float, float] = (0.0, 0.0, 0.0)
    points: dict[str, tuple[int, float, float, float]] = {}


class RosProfile(Config):
    """One arm behind ROS 2.

    Attributes:
        description: One line, for people.
        model: What measurements and actions mean.
        limits: Of the safety filter: a preset's name, a file beside the profile, or the limits themselves.
        rate: Of the control loop [Hz].
        state: Where measured positions come from.
        command: What the controller takes.
        gripper: None: there is none, or it is one of the command's joints.
        inputs: Cameras and poses by name.
        permits: What must say true for the arm to be commanded, by name. None: nothing.
        home: Where ``home`` goes: coordinate -> position. None: there is no such place.
        reset: How an episode begins; None: by going home, on real robots.
        success: Bool topic that says whether the goal has been met since the last reset; None: nobody knows.
        kinematics: For the workspace of the limits, and for ``fk``; None: the model's own, or none.
    """

    description: str = ""
    model: Model = Model()
    limits: str | SafetyLimits
    rate: float = pydantic.Field(default=100.0, gt=0)
    state: StateSource = StateSource()
    command: Command
    gripper: Gripper | None = None
    inputs: dict[str, Input] = {}
    permits: dict[str, Permit] | None = None
    home: dict[str, float] | None = None
    reset: Reset | None = None
    success: str | None = None
    kinematics: Chain | None = None

    @property
    def safety(self) -> SafetyLimits:
        """The limits themselves, at this profile's rate."""
        limits = load_limits(self.limits) if isinstance(self.limits, str) else self.limits
        return limits.model_copy(update={"rate": self.rate})

    @property
    def names(self) -> tuple[str, ...]:
        """Of the coordinates, in the order of the limits."""
        return self.safety.names

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Of every joint that joint states must hold."""
        return tuple(name for coordinate in self.state.joints for name in self.state.joints[coordinate].names)

    @property
    def home_positions(self) -> np.ndarray | None:
        """``[n]`` in the order of :attr:`names`."""
        return None if self.home is None else np.array([self.home[name] for name in self.names])

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        names = self.names
        gripper = () if self.gripper is None else (self.gripper.coordinate,)
        commanded = (*self.command.joints, *gripper)
        if sorted(commanded) != sorted(names):
            raise ValueError(f"command and gripper take {', '.join(commanded)}; the limits are for {', '.join(names)}")
        if self.state.type == "joints" and sorted(self.state.joints) != sorted(names):
            raise ValueError(f"state.joints gives {', '.join(self.state.joints)}; the limits are for {', '.join(names)}")
        if self.state.type != "joints" and set(names) - set(self.state.joints) - set(POSE):
            raise ValueError(f"nothing measures {', '.join(sorted(set(names) - set(self.state.joints) - set(POSE)))}")
        chain = [name for name in self.state.joints if name not in names]
        if self.state.type == "fk" and (self.kinematics is None or len(self.kinematics.rows) != len(chain)):
            raise ValueError("state of type 'fk' needs 'kinematics', and its joints in state.joints, one a row")
        apart = self.gripper is not None and self.gripper.state_topic is not None
        if self.state.type == "pose" and self.state.joints and not apart:
            raise ValueError("a pose holds no joints; give gripper.state_topic, where those of state.joints come")
        if self.command.type == "trajectory" and any(len(self.state.joints[name].names) > 1 for name in self.command.joints):
            raise ValueError("a trajectory's coordinates must be one joint each")
        rate, duration, gap = self.rate, self.command.duration, self.safety.freshness.gap
        if self.command.type == "trajectory" and duration * rate < 1 - 1e-6:
            raise ValueError(
                f"command.duration of {duration:g} s is shorter than a period at {rate:g} Hz, the controller would be faster "
                f"than the limits; make it {1 / rate:.3g} or more, or the rate {1 / duration:.3g} or more"
            )
        if gap * rate <= 1:
            raise ValueError(
                f"at {rate:g} Hz every period is longer than freshness.gap of the limits, {gap:g} s: nothing would move; raise "
                "the rate or the gap"
            )
        if self.home is not None and sorted(self.home) != sorted(names):
            raise ValueError(f"home gives {', '.join(self.home)}; the limits are for {', '.join(names)}")
        if len(set(self.joint_names)) < len(self.joint_names):
            raise ValueError("a joint occurs twice in state.joints")
        return self


def profile_names() -> list[str]:
    """Those that come with the project."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(source: str | Path, **changes: Any) -> RosProfile:
    """A profile by name, or in a YAML file; ``changes`` replace top-level keys, as ``rate=250.0``.

    A file with ``base: NAME`` says only what differs from that profile: its mappings are merged, everything else is replaced.

    Raises:
        ConfigError: There is none, or it does not fit together.
    """
    return parse(RosProfile, {**_read(source), **changes}, where=f"profile '{source}'")


def _read(source: str | Path, inside: Path | None = None) -> dict[str, Any]:
    text = str(source)
    file = "/" in text or text.endswith((".yaml", ".yml"))
    path = (inside or Path()) / source if file else PROFILES / f"{text}.yaml"
    if not file and not path.is_file():
        raise ConfigError(f"no profile '{text}': {nearest(text, profile_names())} Or give a file, ./mine.yaml")
    value = load_yaml(path)
    limits = value.get("limits")
    if isinstance(limits, str) and limits.endswith((".yaml", ".yml")):  # a file beside the profile
        value["limits"] = str(path.parent / limits)
    base = value.pop("base", None)
    return value if base is None else _merge(_read(base, path.parent), value)


def _merge(base: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merge(base[k], v) for k, v in value.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **value, **both}
