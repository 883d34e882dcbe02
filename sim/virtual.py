"""Worlds with an arm in them that a driver moves by position targets: our arm in its tasks, and robosuite's Panda.

A world knows physics, objects and cameras; it does not know time, topics or faults: :mod:`sim.driver` keeps it in step with a
clock, :mod:`hardware.ros2.virtual_arm` puts it behind the topics of a real driver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from robopolicy.deploy.workspace import Kinematics
from robopolicy.errors import TaskError, nearest
from sim.arm import model as arm
from sim.arm.robot import ArmKinematics, ArmModel, make_arm_task
from sim.arm.task import moving_bodies
from sim.render import Renderer, mujoco

CHECK_RATE = 20.0  # the goal is looked at so often [Hz]


class Joints(NamedTuple):
    """What a driver measures ``[m]`` of each joint, in the order of :attr:`World.joint_names`."""

    positions: np.ndarray
    velocities: np.ndarray
    efforts: np.ndarray


class World(Protocol):
    """Physics with an arm.

    Attributes:
        names: Of the coordinates that are driven; the last is the gripper's width.
        joint_names: Of the joints that are measured: those of the arm, and two fingers, each half the width.
        timestep: Of physics [s].
        cameras: Names of those that can be drawn from.
        kinematics: Of the coordinates, for instruments; None: none.
        success: Whether the goal has been met since the last reset.
        pushing: Whether the arm, or what it holds, is in contact with something else, of any force: with the table, or with an
            object that lies on it. What it carries through the air does not count.
    """

    names: tuple[str, ...]
    joint_names: tuple[str, ...]
    timestep: float
    cameras: tuple[str, ...]
    kinematics: Kinematics | None
    success: bool

    @property
    def pushing(self) -> bool: ...

    def reset(self, seed: int | None) -> None:
        """Begin an episode that is a function of ``seed``."""

    def drive(self, positions: np.ndarray) -> None:
        """Make ``[n]`` the set points of the servos."""

    def step(self) -> None:
        """One time step."""

    @property
    def positions(self) -> np.ndarray:
        """Of the coordinates ``[n]``."""
        ...

    @property
    def velocities(self) -> np.ndarray:
        """Of the coordinates ``[n]``."""
        ...

    def joints(self) -> Joints:
        """What a driver publishes."""
        ...

    def poses(self) -> dict[str, np.ndarray]:
        """Of the objects: position [m] and quaternion xyzw ``[7]``, in the world's frame."""
        ...

    def snapshot(self) -> np.ndarray:
        """All that a picture shows."""
        ...

    def eye(self, camera: str, height: int, width: int) -> Callable[[np.ndarray], np.ndarray]:
        """Draws snapshots ``[height, width, 3]`` uint8. To be made and used by one thread, any; it has a state of its own.

        Raises TaskError for an unknown camera, or without a renderer.
        """
        ...

    def close(self) -> None:
        """Free what the tasks opened."""


class _Physics:
    """What worlds share: snapshots and cameras."""

    cameras: tuple[str, ...]

    def __init__(self, model: Any, data: Any, arm_joint: str) -> None:
        self._model, self._data = model, data
        self._trees = model.body_rootid[model.geom_bodyid]  # of each shape: the body that its kinematic tree begins with
        self._arm = int(model.body_rootid[model.jnt_bodyid[model.joint(arm_joint).id]])
        self._fixed = model.body_weldid == 0
        self.timestep = float(model.opt.timestep)
        self.success = False

    @property
    def pushing(self) -> bool:
        pairs = self._trees[self._data.contact.geom]
        with_arm = pairs[(pairs == self._arm).any(1)]
        if not len(with_arm):
            return False
        held = np.unique(with_arm)  # the arm itself, too
        others = held[held != self._arm]
        inside = np.isin(pairs, held)
        return bool(self._fixed[others].any() or (inside[:, 0] != inside[:, 1]).any())

    def snapshot(self) -> np.ndarray:
        return np.concatenate([self._data.qpos, self._data.mocap_pos.ravel(), self._data.mocap_quat.ravel()])

    def eye(self, camera: str, height: int, width: int) -> Callable[[np.ndarray], np.ndarray]:
        if camera not in self.cameras:
            raise TaskError(f"no camera '{camera}': {nearest(camera, self.cameras)}")
        model, data = self._model, mujoco.MjData(self._model)
        renderer = Renderer(model, height, width, camera)
        mocaps = 3 * model.nmocap

        def draw(snapshot: np.ndarray) -> np.ndarray:
            data.qpos[:] = snapshot[: model.nq]
            data.mocap_pos.ravel()[:] = snapshot[model.nq : model.nq + mocaps]
            data.mocap_quat.ravel()[:] = snapshot[model.nq + mocaps :]
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            return renderer(data)

        return draw


class ArmWorld(_Physics):
    """Our arm in one of its tasks; servos as in the task.

    Args:
        task: Name or dotted path.
        task_args: Of the task.
    """

    names: tuple[str, ...] = ArmModel.names
    joint_names: tuple[str, ...] = (*arm.JOINT_NAMES, "left_finger", "right_finger")
    cameras: tuple[str, ...] = ("front", "wrist")

    def __init__(self, task: str = "lift", **task_args: Any) -> None:
        self.task = make_arm_task(task, **task_args)
        super().__init__(*self.task.physics, arm.JOINT_NAMES[0])
        self.kinematics: Kinematics | None = ArmKinematics()
        self._check_every = round(1.0 / (CHECK_RATE * self.timestep))

    def reset(self, seed: int | None) -> None:
        self.task.reset(seed=seed)
        self._steps = self._held = 0
        self.success = False

    def drive(self, positions: np.ndarray) -> None:
        self.task.drive(positions)

    def step(self) -> None:
        self.task.advance(1)
        self._steps += 1
        if self._steps % self._check_every == 0:
            self._held = self._held + 1 if self.task.goal_met() else 0
            self.success |= self._held >= self.task.hold_steps

    @property
    def positions(self) -> np.ndarray:
        return self.task.positions

    @property
    def velocities(self) -> np.ndarray:
        return self.task.velocities

    def joints(self) -> Joints:
        m = len(self.joint_names)
        return Joints(self._data.qpos[:m].copy(), self._data.qvel[:m].copy(), self._data.qfrc_actuator[:m].copy())

    def poses(self) -> dict[str, np.ndarray]:
        return self.task.poses()

    def close(self) -> None:
        self.task.close()


class PandaWorld(_Physics):
    """robosuite's Panda in one of its tasks. Its torque motors get a position servo: computed torque, 8 Hz, without overshoot.

    Args:
        task: Of :mod:`sim.robosuite`: ``Lift``, ``Can``, ``Square``, ``Door``, ``Stack``.
    """

    names: tuple[str, ...] = (*(f"panda_joint{i}" for i in range(1, 8)), "gripper_width")
    joint_names: tuple[str, ...] = (*names[:7], "panda_finger_joint1", "panda_finger_joint2")
    cameras: tuple[str, ...] = ("frontview", "agentview", "robot0_eye_in_hand")
    kinematics: Kinematics | None = None

    _FREQUENCY: ClassVar[float] = 50.0  # of the servo [rad/s]

    def __init__(self, task: str = "Lift") -> None:
        from sim import robosuite

        tasks = {cls.__name__: cls for cls in robosuite.RobosuiteTask.__subclasses__()}
        if task not in tasks:
            raise TaskError(f"robosuite's Panda has no task '{task}': {nearest(task, tasks)}")
        self.task = tasks[task]()
        super().__init__(*self.task.physics, "robot0_joint1")
        joints = [self._model.joint(f"robot0_joint{i}") for i in range(1, 8)]
        fingers = [self._model.joint(f"gripper0_right_finger_joint{i}") for i in (1, 2)]
        self._q = np.array([joint.qposadr[0] for joint in (*joints, *fingers)])
        self._v = np.array([joint.dofadr[0] for joint in (*joints, *fingers)])
        self._motors = np.array([self._model.actuator(f"robot0_torq_j{i}").id for i in range(1, 8)])
        self._grips = np.array([self._model.actuator(f"gripper0_right_gripper_finger_joint{i}").id for i in (1, 2)])
        self._inertia = np.zeros((self._model.nv, self._model.nv))
        self._sign = np.array([1.0] * 8 + [-1.0])  # robosuite's second finger opens towards negative values
        self._set_point: np.ndarray = np.zeros(7)
        bodies = dict(moving_bodies(self._model, self._data))
        self._bodies = {name.removesuffix("_main"): views for name, views in bodies.items() if "eef_target" not in name}
        # Cheap pictures: a shadow map costs ten times the rest without a GPU; and no collision shapes.
        self._model.vis.quality.shadowsize = self._model.vis.quality.offsamples = 0
        self._model.geom_rgba[self._model.geom_group == 0, 3] = 0.0
        self._check_every = round(1.0 / (CHECK_RATE * self.timestep))

    def reset(self, seed: int | None) -> None:
        self.task.reset(seed=seed)
        self._steps, self.success = 0, False
        self._set_point = self._data.qpos[self._q[:7]].copy()

    def drive(self, positions: np.ndarray) -> None:
        self._set_point = np.asarray(positions[:7], np.float64)
        self._data.ctrl[self._grips] = np.array([0.5, -0.5]) * positions[7]

    def step(self) -> None:
        data, joints = self._data, self._v[:7]
        mujoco.mj_fullM(self._model, self._inertia, data.qM)
        error = self._set_point - data.qpos[self._q[:7]]
        wanted = self._FREQUENCY**2 * error - 2 * self._FREQUENCY * data.qvel[joints]
        data.ctrl[self._motors] = self._inertia[np.ix_(joints, joints)] @ wanted + data.qfrc_bias[joints]
        mujoco.mj_step(self._model, data)
        mujoco.mj_kinematics(self._model, data)  # mj_step leaves poses one physics step behind the joints
        self._steps += 1
        if self._steps % self._check_every == 0:
            self.success |= self.task.goal_met()

    @property
    def positions(self) -> np.ndarray:
        return _with_width(self._sign * self._data.qpos[self._q])

    @property
    def velocities(self) -> np.ndarray:
        return _with_width(self._sign * self._data.qvel[self._v])

    def joints(self) -> Joints:
        data = self._data
        return Joints(self._sign * data.qpos[self._q], self._sign * data.qvel[self._v], self._sign * data.qfrc_actuator[self._v])

    def poses(self) -> dict[str, np.ndarray]:
        return {name: np.append(pos, wxyz[[1, 2, 3, 0]]) for name, (pos, wxyz) in self._bodies.items()}

    def close(self) -> None:
        self.task.close()


def _with_width(joints: np.ndarray) -> np.ndarray:
    """``[n]`` out of the arm's joints and two fingers ``[n + 1]``."""
    return np.append(joints[:-2], joints[-2] + joints[-1])


WORLDS: dict[str, Callable[..., World]] = {"arm": ArmWorld, "panda": PandaWorld}


def make_world(name: str, task: str = "", **args: Any) -> World:
    """``arm`` or ``panda`` in a task; ``""``: lift. Raises TaskError for unknown ones."""
    if name not in WORLDS:
        raise TaskError(f"no world '{name}': {nearest(name, WORLDS)}")
    return WORLDS[name](**({"task": task} if task else {}), **args)
