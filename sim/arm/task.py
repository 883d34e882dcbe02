"""``ArmTask``: what every task of the arm shares: observing, commanding within limits, stepping, drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np

from robopolicy.errors import TaskError, nearest
from robopolicy.features import Feature
from robopolicy.task import Expert, Observation, Task
from sim.arm import model as arm
from sim.arm.control import DOF, Servo, down_quat_wxyz
from sim.render import Renderer, mujoco

Read = Callable[[], np.ndarray]

# One entry of an end-effector action: name, unit, lowest, highest.
AXES: dict[str, tuple[str, float, float]] = {
    "x": ("m", 0.28, 0.68),
    "y": ("m", -0.32, 0.32),
    "z": ("m", 0.012, 0.40),
    "yaw": ("rad", -1.6, 1.6),
    "gripper": ("m", 0.0, arm.GRIPPER_MAX_WIDTH),
}
_AXIS_NAMES = tuple(AXES)
_SUBSTEPS_PER_SECOND = round(1.0 / arm.TIMESTEP)


class ArmTask(Task):
    """Base of the arm's tasks.

    An action is an absolute target. With ``control="ee"`` it is a position of the ``ee`` frame in the world [m], the yaw of the
    downward gripper [rad] and the gripper's width [m], or those of them that the task uses; inverse kinematics turns it into
    joint targets. With ``control="joint"`` it is the joint angles [rad] (and the width). Either way the servos' set points keep
    within the joints' position and velocity limits.

    Args:
        control: ``"ee"`` or ``"joint"``.
        obs: Names of the features to observe; None: all state features (and ``image`` when ``image_size`` is given).
        image_size: Height and width of the feature ``image`` [px]; 96 when ``image`` is asked for without a size.
        max_episode_steps: Overrides the task's own.
        render_size: Height and width of ``render()`` [px].
        pretty: Shadows and smooth edges in ``render()``, for films.

    Raises:
        TaskError: For an unknown control mode or feature.
    """

    rate = 20.0
    render_mode = "rgb_array"

    # Set by each task.
    axes: ClassVar[tuple[str, ...]]  # of the end-effector action, out of AXES
    # Where episodes start, about, and the value of the axes that are not in the action.
    rest: ClassVar[dict[str, float]] = {"x": 0.45, "y": 0.0, "z": 0.2, "yaw": 0.0, "gripper": arm.GRIPPER_MAX_WIDTH}
    hold_steps: ClassVar[int] = 1  # consecutive control steps for which the goal must hold

    def __init__(
        self,
        *,
        control: str = "ee",
        obs: Sequence[str] | None = None,
        image_size: int | None = None,
        max_episode_steps: int | None = None,
        render_size: int = 256,
        pretty: bool = True,
    ) -> None:
        if control not in ("ee", "joint"):
            raise TaskError(f"control '{control}' is unknown: {nearest(control, ('ee', 'joint'))}")
        self.control = control
        if max_episode_steps is not None:
            self.max_episode_steps = max_episode_steps
        self._model = mujoco.MjModel.from_xml_string(self._xml())
        self._data = mujoco.MjData(self._model)
        self._servo = Servo(self.rate)
        self._nstep = round(_SUBSTEPS_PER_SECOND / self.rate)
        self._q, self._qd = self._data.qpos[:DOF], self._data.qvel[:DOF]
        self._fingers = self._data.qpos[DOF : DOF + 2]
        self._poses = dict(moving_bodies(self._model, self._data))
        site = self._model.site("ee").id
        self._ee_pos, self._ee_rotation = self._data.site_xpos[site], self._data.site_xmat[site].reshape(3, 3)
        self._command = np.array([self.rest[axis] for axis in _AXIS_NAMES])
        self._columns = [_AXIS_NAMES.index(axis) for axis in self.axes]
        self._steps = self._held = 0

        self._render_size, self._pretty = render_size, pretty
        self._film: Renderer | None = None
        self._eye: Renderer | None = None
        self._image_size = image_size or 96
        self._declare(obs, with_image=image_size is not None)
        self._declare_action()

    # ---- what a task defines -------------------------------------------------------------------------------------------------

    def _xml(self) -> str:
        """MJCF of the task's world."""
        raise NotImplementedError

    def _features(self) -> list[tuple[Feature, Read]]:
        """The task's own features, beside those of the arm, and how to read each."""
        raise NotImplementedError

    def _place(self, rng: np.random.Generator) -> None:
        """Put the objects in their starting places, drawing from ``rng`` only."""
        raise NotImplementedError

    def _evaluate(self) -> tuple[float, bool]:
        """Progress in [0, 1] and whether the goal is met at this instant."""
        raise NotImplementedError

    # ---- gymnasium -----------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode that is a function of ``seed`` alone (None: continue the present random stream)."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self._model, self._data)
        start = self._start_command(self.np_random)
        q = self._servo.kinematics.inverse(arm.home(), start[:3], down_quat_wxyz(start[3]), iterations=8)
        self._servo.set_point = q
        self._q[:] = q
        self._data.act[:DOF] = q
        self._fingers[:] = start[4] / 2
        self._data.ctrl[DOF] = start[4]
        self._command[:] = start
        self._place(self.np_random)
        mujoco.mj_forward(self._model, self._data)
        self._steps = self._held = 0
        return self.observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance ``1 / rate`` seconds.

        Raises:
            TaskError: When the action has another shape than declared, or is not finite.
        """
        target, width = self._target(self._checked(action))
        # The servo integrates this velocity, so its set point arrives exactly at the end of the control step.
        self._data.ctrl[:DOF] = (target - self._data.act[:DOF]) * self.rate
        self._data.ctrl[DOF] = width
        self._servo.set_point = target
        self.advance(self._nstep)
        self._steps += 1
        progress, met = self._evaluate()
        self._held = self._held + 1 if met else 0
        success = self._held >= self.hold_steps
        reward = 1.0 if success else min(max(progress, 0.0), 1.0)
        return self.observe(), reward, success, self._steps >= self.max_episode_steps, {"is_success": success}

    def render(self) -> np.ndarray:
        """A picture ``[render_size, render_size, 3]`` uint8 for films. Raises TaskError when there is no renderer."""
        if self._film is None:
            self._film = Renderer(self._model, self._render_size, self._render_size, "film", self._pretty)
        return self._film(self._data)

    def close(self) -> None:
        for renderer in (self._film, self._eye):
            if renderer is not None:
                renderer.close()
        self._film = self._eye = None

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> Expert:
        raise NotImplementedError

    # ---- the true state, for experts and instruments -------------------------------------------------------------------------

    @property
    def ee_pos(self) -> np.ndarray:
        """Position ``[3]`` [m] of the ``ee`` frame; a view."""
        return self._ee_pos

    @property
    def gripper_width(self) -> float:
        """Distance [m] between the pads."""
        return float(self._fingers[0] + self._fingers[1])

    @property
    def joint_set_point(self) -> np.ndarray:
        """Joint angles ``[7]`` [rad] that the servos track now; a view."""
        return self._data.act[:DOF]

    @property
    def joint_effort(self) -> np.ndarray:
        """Torques ``[7]`` [Nm] of the servos, gravity compensation included; a view."""
        return self._data.qfrc_actuator[:DOF]

    @property
    def positions(self) -> np.ndarray:
        """Joint angles ``[7]`` [rad] and the gripper's width [m]."""
        return np.append(self._q, self.gripper_width)

    @property
    def velocities(self) -> np.ndarray:
        """Of :attr:`positions`, per second."""
        return np.append(self._qd, self._data.qvel[DOF] + self._data.qvel[DOF + 1])

    def poses(self) -> dict[str, np.ndarray]:
        """Of every object that moves, and the goal: position [m] and quaternion xyzw ``[7]``."""
        return {name: np.append(pos, wxyz[[1, 2, 3, 0]]) for name, (pos, wxyz) in self._poses.items()}

    @property
    def physics(self) -> tuple[Any, Any]:
        """MuJoCo's model and data."""
        return self._model, self._data

    # ---- for robots: the world as measured, physics without actions ----------------------------------------------------------

    def show(self, positions: np.ndarray, velocities: np.ndarray, poses: Mapping[str, np.ndarray]) -> None:
        """Put the world into a state that was measured, for :meth:`observe`; see :attr:`positions` and :meth:`poses`."""
        self._q[:], self._qd[:], self._fingers[:] = positions[:DOF], velocities[:DOF], positions[DOF] / 2
        for name, (pos, wxyz) in self._poses.items():
            if name in poses:
                pos[:], wxyz[:] = poses[name][:3], poses[name][[6, 3, 4, 5]]
        mujoco.mj_kinematics(self._model, self._data)

    def drive(self, positions: np.ndarray) -> None:
        """Make joint angles and width ``[8]`` the servos' set points at once, which they keep."""
        self._data.act[:DOF], self._data.ctrl[:DOF], self._data.ctrl[DOF] = positions[:DOF], 0.0, positions[DOF]

    def advance(self, steps: int) -> None:
        """Step physics by ``steps`` times ``arm.TIMESTEP``."""
        mujoco.mj_step(self._model, self._data, steps)
        mujoco.mj_kinematics(self._model, self._data)  # mj_step leaves poses one physics step behind the joints

    def goal_met(self) -> bool:
        """Whether the goal is met at this instant; success needs ``hold_steps`` control steps of it."""
        return self._evaluate()[1]

    def full_command(self, action: np.ndarray) -> np.ndarray:
        """``[x, y, z, yaw, gripper]`` [m, m, m, rad, m] of an end-effector action; what it leaves out is at rest."""
        command = np.array([self.rest[axis] for axis in _AXIS_NAMES])
        command[self._columns] = action
        return command

    # ---- actions -------------------------------------------------------------------------------------------------------------

    def _declare_action(self) -> None:
        gripper = "gripper" in self.axes
        if self.control == "ee":
            names = tuple(f"ee_{axis}" if axis != "gripper" else "gripper_width" for axis in self.axes)
            units = [AXES[axis][0] for axis in self.axes]
            low, high = (np.array([AXES[axis][i] for axis in self.axes]) for i in (1, 2))
        else:
            names = arm.JOINT_NAMES + (("gripper_width",) if gripper else ())
            units = ["rad"] * DOF + (["m"] if gripper else [])
            low = np.append(arm.LOWER, [0.0] * gripper)
            high = np.append(arm.UPPER, [arm.GRIPPER_MAX_WIDTH] * gripper)
        self._low, self._high = low.astype(np.float32), high.astype(np.float32)
        unit = units[0] if len(set(units)) == 1 else ",".join(units)
        self.action_feature = Feature("action", self._low.shape, "float32", unit, names, self.rate)
        self.action_space = gymnasium.spaces.Box(self._low, self._high, dtype=np.float32)

    def _checked(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, np.float64)
        if action.shape != self._low.shape:
            raise TaskError(
                f"{type(self).__name__}: action of shape {action.shape}; expected {self._low.shape} "
                f"({', '.join(self.action_feature.names)})"
            )
        if not np.isfinite(action).all():
            bad = self.action_feature.names[int(np.argmin(np.isfinite(action)))]
            raise TaskError(f"{type(self).__name__}: action entry '{bad}' is not finite; check the policy's output")
        return np.clip(action, self._low, self._high)

    def _target(self, action: np.ndarray) -> tuple[np.ndarray, float]:
        """The servos' next set point ``[7]`` [rad] and the gripper's width [m] for a checked action."""
        if self.control == "joint":
            width = float(action[DOF]) if len(action) > DOF else self.rest["gripper"]
            return self._servo.joint_target(action[:DOF]), width
        self._command[self._columns] = action
        return self._servo.pose_target(self._command[:3], float(self._command[3])), float(self._command[4])

    def command_to_action(self, command: np.ndarray) -> np.ndarray:
        """The action that commands ``[x, y, z, yaw, gripper]`` [m, m, m, rad, m] in this task's control mode, within limits."""
        if self.control == "joint":
            joints = self._servo.pose_target(command[:3], float(command[3]))
            action = np.append(joints, command[4:5] if "gripper" in self.axes else [])
        else:
            action = command[self._columns]
        return np.clip(action, self._low, self._high).astype(np.float32)

    def _start_command(self, rng: np.random.Generator) -> np.ndarray:
        """Where the episode starts: ``[x, y, z, yaw, gripper]``, scattered around the rest pose."""
        start = np.array([self.rest[axis] for axis in _AXIS_NAMES])
        start[:3] += rng.uniform([-0.06, -0.10, -0.05], [0.06, 0.10, 0.05])
        return start

    # ---- observations --------------------------------------------------------------------------------------------------------

    def _declare(self, obs: Sequence[str] | None, with_image: bool) -> None:
        def feature(name: str, size: int, unit: str, names: Sequence[str] = ()) -> Feature:
            return Feature(name, (size,), "float32", unit, tuple(names), self.rate)

        known: list[tuple[Feature, Read]] = [
            (feature("qpos", DOF, "rad", arm.JOINT_NAMES), lambda: self._q),
            (feature("qvel", DOF, "rad/s", arm.JOINT_NAMES), lambda: self._qd),
            (feature("ee_pos", 3, "m", "xyz"), lambda: self._ee_pos),
            (feature("ee_rot6d", 6, "rot6d"), lambda: rot6d(self._ee_rotation)),
            (feature("gripper_width", 1, "m"), lambda: self._fingers[:1] + self._fingers[1:]),
            *self._features(),
            (Feature("image", (self._image_size, self._image_size, 3), "uint8", "1", (), self.rate), self.look),
        ]
        table = {f.name: (f, read) for f, read in known}
        names = list(obs) if obs is not None else [name for name in table if name != "image" or with_image]
        for name in names:
            if name not in table:
                raise TaskError(f"{type(self).__name__} has no feature '{name}': {nearest(name, table)}")
        self.observation_features = {name: table[name][0] for name in names}
        self.observes_objects = bool({f.name for f, _ in self._features()} & set(names))
        self._reads = [(name, table[name][1], np.dtype(table[name][0].dtype)) for name in names]
        spaces: dict[str, gymnasium.Space[Any]] = {f.name: _space(f) for f in self.observation_features.values()}
        self.observation_space: gymnasium.Space[Any] = gymnasium.spaces.Dict(spaces)

    def observe(self, image: np.ndarray | None = None) -> Observation:
        """Every observed feature as the world is now; ``image`` [H, W, 3] uint8 instead of drawing one, where it is observed."""
        return {
            name: image if image is not None and name == "image" else read().astype(dtype) for name, read, dtype in self._reads
        }

    def look(self) -> np.ndarray:
        """The picture of the feature ``image``. Raises TaskError when there is no renderer."""
        if self._eye is None:
            self._eye = Renderer(self._model, self._image_size, self._image_size, "front")
        return self._eye(self._data)


def moving_bodies(model: Any, data: Any) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Names of free and of placed bodies, with views of position ``[3]`` and quaternion wxyz ``[4]``."""
    for index in range(model.nbody):
        body = model.body(index)
        if body.mocapid[0] >= 0:
            yield body.name, (data.mocap_pos[body.mocapid[0]], data.mocap_quat[body.mocapid[0]])
        elif body.dofnum[0] == 6:
            place = data.qpos[model.jnt_qposadr[body.jntadr[0]] :]
            yield body.name, (place[:3], place[3:7])


def rot6d(rotation: np.ndarray) -> np.ndarray:
    """First two columns of a rotation matrix ``[3, 3]``, one after the other ``[6]`` (Zhou et al. 2019)."""
    return rotation[:, :2].T.ravel()


def quarter_turn_yaw(rotation: np.ndarray) -> float:
    """Yaw [rad] in [-pi/4, pi/4) of a cube, which looks the same after every quarter turn."""
    yaw = math.atan2(rotation[1, 0], rotation[0, 0])
    return (yaw + math.pi / 4) % (math.pi / 2) - math.pi / 4


def _space(feature: Feature) -> gymnasium.spaces.Box:
    if feature.is_image:
        return gymnasium.spaces.Box(0, 255, feature.shape, np.uint8)
    return gymnasium.spaces.Box(-np.inf, np.inf, feature.shape, np.float32)
