"""The arm as a robot that takes joint targets: what deployment talks to."""

from __future__ import annotations

import numpy as np

from sim.arm import model as arm
from sim.arm.control import DOF
from sim.render import mujoco

# From each joint's axis to each point, at most [m/rad]: what the links leave when the arm is bent at the worst.
_HAND = arm.WRIST_TO_FLANGE + arm.FLANGE_TO_EE
_BEYOND_ELBOW = arm.FOREARM + _HAND
_ALL = arm.UPPER_ARM + _BEYOND_ELBOW


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
