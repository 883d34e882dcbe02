"""``JointModel``: what a real arm means to its policies: joints, or the tool's pose, and pictures seen; targets commanded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hardware.ros2.kinematics import DHKinematics
from hardware.ros2.profile import POSE, RosProfile
from robopolicy.config import import_class
from robopolicy.deploy.workspace import CartesianKinematics, Kinematics
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.robot import Measured, RobotModel

_TOOL = len(POSE)


class JointModel:
    """The model of arms that have none of their own.

    Seen are ``qpos`` and ``qvel``, one entry a coordinate; with kinematics also ``ee_pos`` and ``ee_rot6d``; and every input of
    the profile by its name. An action is the coordinates' targets. Where coordinates are a tool's pose, seen are ``ee_pos``,
    ``ee_rot6d`` and ``rest`` (the gripper), and an action is these one after the other: rotation vectors jump, networks get none.

    Args:
        profile: Names, units, kinematics and inputs are its.
        rate: Of the policy [Hz].

    Raises:
        ConfigError: An image has neither ``size`` nor ``resize``, or there are fewer coordinates than rows of kinematics.
    """

    def __init__(self, profile: RosProfile, rate: float = 20.0) -> None:
        self.names = profile.names
        self.inputs = tuple(profile.inputs)
        self._pose = self.names[:_TOOL] == POSE
        units = [c.unit for c in profile.safety.coordinates]
        self.kinematics = kinematics_of(profile)
        self._chain = self.kinematics if isinstance(self.kinematics, DHKinematics) else None
        seen: dict[str, tuple[list[str], tuple[str, ...]]]
        action: tuple[list[str], tuple[str, ...]]
        if self._pose:
            seen = {"ee_pos": (["m"] * 3, tuple("xyz")), "ee_rot6d": (["rot6d"] * 6, ())}
            if rest := self.names[_TOOL:]:
                seen["rest"] = (units[_TOOL:], rest)
            action = [*["m"] * 3, *["rot6d"] * 6, *units[_TOOL:]], ()
        else:
            seen = {"qpos": (units, self.names), "qvel": ([f"{unit}/s" for unit in units], self.names)}
            if self._chain is not None:
                seen |= {"ee_pos": (["m"] * 3, tuple("xyz")), "ee_rot6d": (["rot6d"] * 6, ())}
            action = units, self.names
        self.observation_features: dict[str, Feature] = {name: _feature(name, *value, rate) for name, value in seen.items()}
        for name, source in profile.inputs.items():
            if source.type == "pose":
                names = ("x", "y", "z", "qx", "qy", "qz", "qw")
                self.observation_features[name] = _feature(name, ["m"] * 3 + ["1"] * 4, names, rate)
                continue
            size = source.resize or source.size
            if size is None:
                raise ConfigError(f"input '{name}' of the profile has no size; a policy needs to know it: give size or resize")
            self.observation_features[name] = Feature(name, (*size, 3), "uint8", "1", (), rate)
        self.action_feature = _feature("action", *action, rate)
        self._rotvec: np.ndarray = np.zeros(3)

    def reset(self, positions: np.ndarray) -> None:
        if self._pose:
            self._rotvec = np.array(positions[3:_TOOL], np.float64)

    def observe(self, measured: Measured) -> dict[str, np.ndarray]:
        """Every feature, float32, and images as they came."""
        q = measured.positions
        values: dict[str, np.ndarray]
        if self._pose:
            values = {"ee_pos": q[:3], "ee_rot6d": _rot6d(Rotation.from_rotvec(q[3:_TOOL]).as_matrix()), "rest": q[_TOOL:]}
        else:
            values = {"qpos": q, "qvel": measured.velocities}
            if self._chain is not None:
                position, rotation = self._chain.pose(q)
                values |= {"ee_pos": position, "ee_rot6d": _rot6d(rotation)}
        values |= measured.inputs
        return {name: values[name].astype(feature.dtype) for name, feature in self.observation_features.items()}

    def targets(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, np.float64)
        if not self._pose:
            return action
        rotvec = near(_rotation(action[3:9]).as_rotvec(), self._rotvec) if np.isfinite(action).all() else np.full(3, np.nan)
        if np.isfinite(rotvec).all():
            self._rotvec = rotvec
        return np.concatenate([action[:3], rotvec, action[9:]])

    def action_of(self, positions: np.ndarray) -> np.ndarray:
        if not self._pose:
            return positions
        rotation = Rotation.from_rotvec(positions[3:_TOOL]).as_matrix()
        return np.concatenate([positions[:3], _rot6d(rotation), positions[_TOOL:]])


def kinematics_of(profile: RosProfile) -> Kinematics | None:
    """For the workspace of a profile's limits: of its tool's pose, or of its table."""
    names = profile.names
    if names[:_TOOL] == POSE:
        return CartesianKinematics(len(names))
    return None if profile.kinematics is None else DHKinematics(profile.kinematics, len(names))


def make_model(profile: RosProfile, task: str | None = None, task_args: Mapping[str, Any] | None = None) -> RobotModel:
    """The model of a profile. One that takes a task, as the simulated arm's does, is set in ``task``, the policy's.

    Raises:
        ConfigError: It cannot be imported or made, or is for other coordinates than the profile.
    """
    args = dict(profile.model.args)
    if task is not None and "task" in args:
        args = {**({} if task != args["task"] else args), "task": task, **(task_args or {})}
    factory: Callable[..., RobotModel] = partial(JointModel, profile)
    if profile.model.factory is not None:
        factory = import_class("robot model", profile.model.factory, {})
    try:
        model = factory(**args)
    except TypeError as error:
        raise ConfigError(f"robot model '{profile.model.factory or 'JointModel'}': {error}; check model.args") from error
    if tuple(model.names) != profile.names:
        raise ConfigError(
            f"the robot model has coordinates {', '.join(model.names)}, the profile's limits are for {', '.join(profile.names)}"
        )
    if missing := set(model.inputs) - set(profile.inputs):
        raise ConfigError(f"the robot model needs input '{min(missing)}', which the profile has not; add it to 'inputs'")
    return model


def near(rotvec: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The same rotation, as the rotation vector ``[3]`` nearest to ``other``: they jump at half turns, an arm does not."""
    angle = float(np.linalg.norm(rotvec))
    axis = rotvec / angle if angle > 1e-9 else other / max(float(np.linalg.norm(other)), 1e-9)
    turns = round((float(axis @ other) - angle) / (2 * np.pi))
    return axis * (angle + 2 * np.pi * turns) if turns else rotvec


def _rot6d(rotation: np.ndarray) -> np.ndarray:
    return rotation[:, :2].T.ravel()


def _rotation(rot6d: np.ndarray) -> Rotation:
    """Of two columns that need not be orthonormal (Gram-Schmidt)."""
    x = rot6d[:3] / np.linalg.norm(rot6d[:3])
    y = rot6d[3:] - x * (x @ rot6d[3:])
    y /= np.linalg.norm(y)
    return Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], axis=1))


def _feature(name: str, units: list[str], names: tuple[str, ...], rate: float) -> Feature:
    unit = units[0] if len(set(units)) == 1 else ",".join(units)
    return Feature(name, (len(units),), "float32", unit, names, rate)
