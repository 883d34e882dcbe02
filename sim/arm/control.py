"""From commanded poses to joint set points: kinematics, damped least squares, and the limits that every command passes.

Everything here runs once per control step, on a copy of the arm alone: between control steps MuJoCo's servos work without Python.
"""

from __future__ import annotations

import math

import numpy as np

from sim.arm import model as arm
from sim.render import mujoco

DOF = len(arm.JOINTS)
MAX_SPEED = 0.8  # of a commanded pose [m/s]
MAX_TURN = 2.5  # of a commanded pose [rad/s]

_DAMPING = 0.02**2
_POSTURE_GAIN = 0.1
_ITERATIONS = 2


class Kinematics:
    """Forward kinematics, Jacobian and inverse kinematics of the ``ee`` frame in the base frame."""

    def __init__(self) -> None:
        self._model = mujoco.MjModel.from_xml_string(arm.scene())
        self._data = mujoco.MjData(self._model)
        self._site = self._model.site("ee").id
        self._jacobian = np.zeros((6, self._model.nv))
        self._quat, self._error = np.zeros(4), np.zeros(6)
        self._local = np.zeros(3)
        self._posture = arm.home()
        self._eye = _DAMPING * np.eye(6)
        self.pos = self._data.site_xpos[self._site]
        self.rotation = self._data.site_xmat[self._site].reshape(3, 3)

    def forward(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position ``[3]`` [m] and rotation matrix ``[3, 3]`` of the ``ee`` frame at joint angles ``q`` ``[7]``.

        The arrays are views that the next call overwrites.
        """
        self._data.qpos[:DOF] = q
        mujoco.mj_kinematics(self._model, self._data)
        return self.pos, self.rotation

    def jacobian(self) -> np.ndarray:
        """Geometric Jacobian ``[6, 7]`` (linear above angular, base frame) at the last ``forward``."""
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        return self._jacobian[:, :DOF]

    def inverse(self, q: np.ndarray, pos: np.ndarray, quat_wxyz: np.ndarray, iterations: int = _ITERATIONS) -> np.ndarray:
        """Joint angles ``[7]`` near ``q`` that bring ``ee`` towards a pose, within the joint limits.

        Damped least squares with the home posture in the null space (Wampler 1986; Nakamura and Hanafusa 1986):
        ``dq = z + J^T (J J^T + lambda^2 I)^-1 (e - J z)`` with ``z = k (q_home - q)``. An unreachable pose gives
        the closest configuration that the iterations find.
        """
        q = q.copy()
        error = self._error
        for _ in range(iterations):
            self.forward(q)
            np.subtract(pos, self.pos, out=error[:3])
            mujoco.mju_mat2Quat(self._quat, self._data.site_xmat[self._site])
            mujoco.mju_subQuat(self._local, quat_wxyz, self._quat)  # rotation vector in the ee frame
            np.matmul(self.rotation, self._local, out=error[3:])
            jacobian = self.jacobian()
            z = _POSTURE_GAIN * (self._posture - q)
            q += z + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + self._eye, error - jacobian @ z)
            np.clip(q, arm.LOWER, arm.UPPER, out=q)
        return q


def down_quat_wxyz(yaw: float) -> np.ndarray:
    """Quaternion of a gripper that points down, turned by ``yaw`` [rad] about the world's z: ``Rz(yaw) Rx(pi)``."""
    return np.array([0.0, np.cos(yaw / 2), np.sin(yaw / 2), 0.0])


class Servo:
    """Turns targets into set points of the joint servos, no faster than the limits allow.

    Args:
        rate: Control steps per second [Hz].
    """

    def __init__(self, rate: float) -> None:
        self.kinematics = Kinematics()
        self._max_step = arm.VELOCITY_LIMIT / rate
        self._max_move, self._max_turn = MAX_SPEED / rate, MAX_TURN / rate
        self.set_point = arm.home()  # what the servos track at the end of the control step [rad]

    def joint_target(self, target: np.ndarray) -> np.ndarray:
        """The set point ``[7]`` after one control step towards joint angles ``target`` ``[7]``; every joint by itself."""
        step = np.clip(target - self.set_point, -self._max_step, self._max_step)
        return np.clip(self.set_point + step, arm.LOWER, arm.UPPER)

    def pose_target(self, pos: np.ndarray, yaw: float) -> np.ndarray:
        """The set point ``[7]`` after one control step towards ``ee`` at ``pos`` ``[3]`` [m], pointing down with ``yaw`` [rad].

        The pose moves in a straight line at no more than ``MAX_SPEED`` and ``MAX_TURN``; if a joint would be too fast all slow
        down together, which keeps the line.
        """
        here, rotation = self.kinematics.forward(self.set_point)
        here, heading = here.copy(), math.atan2(rotation[1, 0], rotation[0, 0])
        move = pos - here
        distance = float(np.sqrt(move @ move))
        if distance > self._max_move:
            move *= self._max_move / distance
        turned = heading + min(max(yaw - heading, -self._max_turn), self._max_turn)
        step = self.kinematics.inverse(self.set_point, here + move, down_quat_wxyz(turned)) - self.set_point
        excess = float(np.max(np.abs(step) / self._max_step))
        return self.set_point + (step / excess if excess > 1.0 else step)
