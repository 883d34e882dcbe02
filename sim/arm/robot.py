"""The arm as a robot that takes joint targets: what deployment talks to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from robopolicy.deploy.clock import Clock
from robopolicy.deploy.safety import Stamp
from robopolicy.errors import TaskError
from robopolicy.robot import Measured, Sample, State
from robopolicy.task import TaskSpec
from sim.arm import model as arm
from sim.arm.control import DOF, down_quat_wxyz
from sim.arm.control import Kinematics as Inverse
from sim.arm.task import AXES, ArmTask
from sim.render import mujoco

# From each joint's axis to each point, at most [m/rad]: what the links leave when the arm is bent at the worst.
_HAND = arm.WRIST_TO_FLANGE + arm.FLANGE_TO_EE
_BEYOND_ELBOW = arm.FOREARM + _HAND
_ALL = arm.UPPER_ARM + _BEYOND_ELBOW

CAMERA = "front"  # what the feature `image` shows


class ArmKinematics:
    """Where ``ee`` and the wrist are, for the workspace of the safety filter; the gripper's width moves neither."""

    names = ("ee", "wrist")

    def __init__(self) -> None:
        self._model = mujoco.MjModel.from_xml_string(arm.scene())
        self._data = mujoco.MjData(self._model)
        self._ee, self._wrist = self._model.site("ee").id, self._model.body("link6").id
        self._points = np.zeros((2, 3))
        self._jacobians = np.zeros((2, 3, self._model.nv))
        self.levers: np.ndarray | None = np.array(
            [
                [_ALL, _ALL, _BEYOND_ELBOW, _BEYOND_ELBOW, _HAND, _HAND, 0.0, 0.0],
                [_ALL - _HAND, _ALL - _HAND, arm.FOREARM, arm.FOREARM, 0.0, 0.0, 0.0, 0.0],
            ]
        )

    def points(self, coordinates: np.ndarray) -> np.ndarray:
        """Positions ``[2, 3]`` [m] at ``[joint1..joint7, gripper_width]``; a view that the next call overwrites."""
        self._data.qpos[:DOF] = coordinates[:DOF]
        mujoco.mj_kinematics(self._model, self._data)
        self._points[0] = self._data.site_xpos[self._ee]
        self._points[1] = self._data.xpos[self._wrist]
        return self._points

    def jacobians(self) -> np.ndarray:
        """Derivatives ``[2, 3, 8]`` at the last ``points``."""
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jacSite(self._model, self._data, self._jacobians[0], None, self._ee)
        mujoco.mj_jacBody(self._model, self._data, self._jacobians[1], None, self._wrist)
        self._jacobians[:, :, DOF] = 0.0  # not the finger's
        return self._jacobians[:, :, : DOF + 1]


class ArmModel:
    """A task of our arm as a :class:`robopolicy.robot.RobotModel`: what its joints, poses and pictures mean to policies.

    It holds a world of its own, puts it into the measured state, and observes that as the task does: with the same code, so to
    the bit. Nothing moves in it by itself.

    Args:
        task: Name or dotted path of a task of the arm, for example ``"lift"``.
        task_args: Of the task.

    Attributes:
        inputs: The poses of the task's objects by their names, and the camera ``front`` where ``image`` is observed.

    Raises:
        TaskError: The task is not one of the arm.
    """

    names = (*arm.JOINT_NAMES, "gripper_width")

    def __init__(self, task: str = "lift", **task_args: Any) -> None:
        self._world = make_arm_task(task, **task_args)
        self.observation_features, self.action_feature = self._world.observation_features, self._world.action_feature
        poses = tuple(self._world.poses()) if self._world.observes_objects else ()
        self.inputs: tuple[str, ...] = poses + ((CAMERA,) if "image" in self.observation_features else ())
        self.kinematics = ArmKinematics()
        self._inverse = Inverse()
        self._wanted = arm.home()

    def reset(self, positions: np.ndarray) -> None:
        self._wanted = np.array(positions[:DOF], np.float64)

    def observe(self, measured: Measured) -> dict[str, np.ndarray]:
        """Every feature. Raises TaskError for an input that is missing."""
        if missing := set(self.inputs) - set(measured.inputs):
            raise TaskError(f"input '{min(missing)}' is missing; found {', '.join(measured.inputs) or 'none'}")
        image = measured.inputs[CAMERA] if CAMERA in self.inputs else None
        if image is not None and image.shape != self.observation_features["image"].shape:
            raise TaskError(
                f"input '{CAMERA}' must have shape {self.observation_features['image'].shape}, found {image.shape}; "
                "change the camera's size, or the task's 'image_size'"
            )
        self._world.show(measured.positions, measured.velocities, measured.inputs)
        return self._world.observe(image)

    def targets(self, action: np.ndarray) -> np.ndarray:
        if self._world.control == "joint":
            joints, width = action[:DOF], action[DOF] if len(action) > DOF else self._world.rest["gripper"]
        else:
            command = self._world.full_command(action)
            joints = self._inverse.inverse(self._wanted, command[:3], down_quat_wxyz(float(command[3])), iterations=1)
            width = command[4]
        if np.isfinite(joints).all():  # the next search begins here
            self._wanted = joints
        return np.append(joints, width)

    def action_of(self, positions: np.ndarray) -> np.ndarray:
        if self._world.control == "joint":
            return positions[: self.action_feature.size]
        pos, rotation = self._inverse.forward(positions[:DOF])
        command = dict(zip(AXES, (*pos, math.atan2(rotation[1, 0], rotation[0, 0]), positions[DOF]), strict=True))
        return np.array([command[axis] for axis in self._world.axes])


class SimArm:
    """A task of our arm as a :class:`robopolicy.robot.Robot`: physics keep up with a clock, real or fake.

    Position targets take effect at once and are tracked by the joints' servos, as by a driver that streams positions. Physics is
    stepped by whoever asks for the state, up to the clock's time; between two calls the arm moves on under its last targets.

    Args:
        task: As of :class:`ArmModel`, which says what is observed and what actions mean.
        clock: Physics follow it.
        task_args: Of the task.

    Attributes:
        resets: ``reset`` brings arm and objects to where an episode begins.
        follows_clock: It may be given a fake clock, and runs faster than time then: what `robopolicy eval --robot` asks.
        success: Whether the task's goal has been met since the last reset.

    Raises:
        TaskError: The task is not one of the arm.
    """

    names = ArmModel.names
    follows_clock = resets = True

    def __init__(self, task: str, clock: Clock, **task_args: Any) -> None:
        self.task, self.model, self._clock = make_arm_task(task, **task_args), ArmModel(task, **task_args), clock
        self.observation_features, self.action_feature = self.model.observation_features, self.model.action_feature
        self.kinematics = self.model.kinematics
        self._steps = self._held = 0
        self.success = False

    def reset(self, seed: int | None = None) -> None:
        self.task.reset(seed=seed)
        self.model.reset(self.task.positions)
        self._begun, self._steps, self._held, self.success = self._clock.now(), 0, 0, False

    def state(self) -> State:
        self._keep_up()
        return State(self.task.positions, Stamp(self._clock.now(), self._begun + self._steps * arm.TIMESTEP))

    def observe(self) -> Sample:
        self._keep_up()
        inputs = self.task.poses()
        if "image" in self.observation_features:
            inputs[CAMERA] = self.task.look()
        values = self.model.observe(Measured(self.task.positions, self.task.velocities, inputs))
        return Sample(values, self._clock.now(), {})

    def targets(self, action: np.ndarray) -> np.ndarray:
        return self.model.targets(action)

    def command(self, positions: np.ndarray) -> None:
        self._keep_up()
        self.task.drive(positions)

    def stop(self) -> None:
        """The servos hold their last targets by themselves."""

    def close(self) -> None:
        self.task.close()

    def _keep_up(self) -> None:
        """Step to the clock's time, and look at the goal as often as the task does."""
        due = int((self._clock.now() - self._begun) / arm.TIMESTEP + 1e-6)
        every = round(1.0 / (self.task.rate * arm.TIMESTEP))
        while self._steps < due:
            steps = min(due, self._steps - self._steps % every + every) - self._steps
            self.task.advance(steps)
            self._steps += steps
            if self._steps % every == 0:
                self._held = self._held + 1 if self.task.goal_met() else 0
                self.success |= self._held >= self.task.hold_steps


def make_arm_task(task: str, **task_args: Any) -> ArmTask:
    """A task by name. Raises TaskError when it is not one of our arm."""
    made = TaskSpec(task, task_args).make()
    if not isinstance(made, ArmTask):
        raise TaskError(f"task '{task}' is not one of our arm; take reach, lift, stack or arm_pusht")
    return made
