"""robosuite's tasks behind :class:`robopolicy.task.Task`: Lift, Can, Square, Door and Stack with a Panda arm.

Physics, controller (OSC_POSE, the default of robosuite 1.5) and success checks are robosuite's. What the adapter adds:

* **Units.** An action is a displacement of the grip site in the robot's base frame (parallel to the world's): metres, a rotation
  vector in radians, and the gripper (positive closes, else opens: robosuite reads its sign). robosuite's own datasets store it
  divided by 0.05 m and 0.5 rad.
* **Seeds.** robosuite shares one generator among its samplers for the life of an environment; it is put into a state that
  depends on the seed alone at every reset. The model, which includes the size of Lift's cube, is drawn once, always the same:
  so resets need not compile it again, which takes a hundred times as long.
* **What survives a robosuite reset.** The gripper's integrated command does; it is cleared.

Nothing of robosuite, nor MuJoCo, is imported before the first environment is made.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
import numpy as np

from robopolicy.errors import TaskError, install
from robopolicy.features import Feature
from robopolicy.task import Observation, Task

if TYPE_CHECKING:
    from sim.render import Renderer
    from sim.robosuite_experts import GraspExpert

RATE = 20.0  # control steps per second [Hz]
ACTION_LIMIT = np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5, 1.0])  # per step: m, m, m, rad, rad, rad, 1
# The grip site pointing straight down, xyzw. The sign of an orientation is chosen for a positive product with it, which puts the
# jump between the two signs where the arm never is; the usual choice (positive w) puts it right here.
DOWN = np.array([1.0, 1.0, 0.0, 0.0]) / math.sqrt(2)

Read = Callable[[], np.ndarray]


class RobosuiteTask(Task):
    """What the five tasks share. Sparse reward: 1 on success, which also ends the episode.

    Observations are in the world frame: ``eef_pos`` [m] and ``eef_quat`` (xyzw) of the grip site, ``gripper_qpos`` of the two
    fingers [m], and the poses of the task's objects.

    Args:
        max_episode_steps: Overrides the task's own.
        render_size: Height and width of the frames of :meth:`render` [px]; nothing is drawn unless it is called.

    Raises:
        TaskError: When robosuite is not installed.
    """

    rate = RATE
    max_episode_steps = 400  # robomimic's roll-out horizon for Lift, Can and Square
    render_mode = "rgb_array"

    robosuite_name: ClassVar[str]
    camera: ClassVar[str] = "agentview"

    def __init__(self, max_episode_steps: int | None = None, render_size: int = 512) -> None:
        if max_episode_steps is not None:
            self.max_episode_steps = max_episode_steps
        self._env = _make(self.robosuite_name)
        self._render_size = render_size
        self._renderer: Renderer | None = None
        self._steps = 0
        data, robot = self._env.sim.data, self._env.robots[0]
        site = robot.eef_site_id["right"]
        fingers = robot._ref_gripper_joint_pos_indexes["right"]
        declared: list[tuple[Feature, Read]] = [
            (Feature("eef_pos", (3,), unit="m", names=("x", "y", "z"), rate=RATE), lambda: data.site_xpos[site]),
            (_quaternion("eef_quat"), lambda: _site_quaternion(data.site_xmat[site])),
            (Feature("gripper_qpos", (2,), unit="m", names=("left", "right"), rate=RATE), lambda: data.qpos[fingers]),
            *self._objects(),
        ]
        self.observation_features = {feature.name: feature for feature, _ in declared}
        self._read = {feature.name: read for feature, read in declared}
        self.action_feature = Feature(
            "action", (7,), unit="m,m,m,rad,rad,rad,1", names=("dx", "dy", "dz", "rx", "ry", "rz", "gripper"), rate=RATE
        )
        self.action_space = gymnasium.spaces.Box(-ACTION_LIMIT.astype(np.float32), ACTION_LIMIT.astype(np.float32))
        self.observation_space: gymnasium.Space[Any] = gymnasium.spaces.Dict(
            {f.name: gymnasium.spaces.Box(-np.inf, np.inf, f.shape, np.float32) for f, _ in declared}
        )

    def _objects(self) -> list[tuple[Feature, Read]]:
        """The features of the task's objects and how to read each."""
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode that is a function of ``seed`` alone (None: continue the present random stream)."""
        super().reset(seed=seed)
        fresh = np.random.default_rng(int(self.np_random.integers(2**63)))
        # In place: the samplers of the arm's and the objects' poses hold references to this very generator.
        self._env.rng.bit_generator.state = fresh.bit_generator.state
        self._env.reset()
        self._env.robots[0].gripper["right"].current_action[:] = 0.0
        self._steps = 0
        return self._observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        action = np.clip(np.asarray(action, np.float64), -ACTION_LIMIT, ACTION_LIMIT)
        self._env.step(action / ACTION_LIMIT)
        self._steps += 1
        success = self.goal_met()
        return self._observe(), float(success), success, self._steps >= self.max_episode_steps, {"is_success": success}

    def render(self) -> np.ndarray:
        """A picture ``[S, S, 3]`` uint8. Raises TaskError when the machine has no offscreen renderer."""
        model = self._env.sim.model._model
        if self._renderer is None:
            from sim.render import Renderer

            model.geom_rgba[model.geom_group == 0, 3] = 0.0  # robosuite's collision shapes
            self._renderer = Renderer(model, self._render_size, self._render_size, self.camera)
        return self._renderer(self._env.sim.data._data)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._env.close()

    @property
    def physics(self) -> tuple[Any, Any]:
        """MuJoCo's model and data."""
        return self._env.sim.model._model, self._env.sim.data._data

    def goal_met(self) -> bool:
        """Whether the goal is met at this instant."""
        return bool(self._env._check_success())

    def read(self, name: str) -> np.ndarray:
        """The present value of an observed feature, float64."""
        return np.array(self._read[name](), np.float64)

    def _observe(self) -> Observation:
        return {name: np.asarray(read(), np.float32) for name, read in self._read.items()}

    def _pose(self, name: str, body: int) -> list[tuple[Feature, Read]]:
        """Features ``<name>_pos`` [m] and ``<name>_quat`` (xyzw) of a body."""
        data = self._env.sim.data
        return [
            (Feature(f"{name}_pos", (3,), unit="m", names=("x", "y", "z"), rate=RATE), lambda: data.body_xpos[body]),
            (_quaternion(f"{name}_quat"), lambda: data.body_xquat[body][[1, 2, 3, 0]]),
        ]


class Lift(RobosuiteTask):
    """Lift a cube 4 cm off the table. Observes ``cube_pos``, ``cube_quat``."""

    robosuite_name = "Lift"

    def _objects(self) -> list[tuple[Feature, Read]]:
        return self._pose("cube", self._env.cube_body_id)

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> GraspExpert:
        from sim.robosuite_experts import lift_expert

        return lift_expert(self, rng, noise)


class Can(RobosuiteTask):
    """Take a can from one bin to its compartment in the other. Observes ``can_pos``, ``can_quat``."""

    robosuite_name = "PickPlaceCan"

    def _objects(self) -> list[tuple[Feature, Read]]:
        return self._pose("can", self._env.obj_body_id["Can"])

    @property
    def target(self) -> np.ndarray:
        """Where the can belongs, ``[3]`` [m]: the floor of its compartment."""
        return np.array(self._env.target_bin_placements[self._env.object_id])

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> GraspExpert:
        from sim.robosuite_experts import can_expert

        return can_expert(self, rng, noise)


class Square(RobosuiteTask):
    """Put a square nut over the square peg. Observes ``nut_pos``, ``nut_quat``."""

    robosuite_name = "NutAssemblySquare"

    def _objects(self) -> list[tuple[Feature, Read]]:
        return self._pose("nut", self._env.obj_body_id["SquareNut"])


class Door(RobosuiteTask):
    """Turn the handle of a door and open it by 0.3 rad. Observes the door's and the handle's positions and both angles."""

    robosuite_name = "Door"
    max_episode_steps = 500
    camera = "frontview"

    def _objects(self) -> list[tuple[Feature, Read]]:
        env = self._env
        data = env.sim.data
        door = env.object_body_ids["door"]
        return [
            (Feature("door_pos", (3,), unit="m", names=("x", "y", "z"), rate=RATE), lambda: data.body_xpos[door]),
            (
                Feature("handle_pos", (3,), unit="m", names=("x", "y", "z"), rate=RATE),
                lambda: data.site_xpos[env.door_handle_site_id],
            ),
            (
                Feature("hinge_angle", (1,), unit="rad", rate=RATE),
                lambda: data.qpos[env.hinge_qpos_addr : env.hinge_qpos_addr + 1],
            ),
            (
                Feature("handle_angle", (1,), unit="rad", rate=RATE),
                lambda: data.qpos[env.handle_qpos_addr : env.handle_qpos_addr + 1],
            ),
        ]


class Stack(RobosuiteTask):
    """Stack the small cube on the large one and let go. Observes the poses ``small_*`` and ``large_*``."""

    robosuite_name = "Stack"

    def _objects(self) -> list[tuple[Feature, Read]]:
        return [*self._pose("small", self._env.cubeA_body_id), *self._pose("large", self._env.cubeB_body_id)]

    def expert(self, rng: np.random.Generator, noise: float = 0.0) -> GraspExpert:
        from sim.robosuite_experts import stack_expert

        return stack_expert(self, rng, noise)


def _quaternion(name: str) -> Feature:
    return Feature(name, (4,), unit="quat_xyzw", names=("x", "y", "z", "w"), rate=RATE)


def _site_quaternion(matrix: np.ndarray) -> np.ndarray:
    """Orientation ``[4]`` xyzw of a rotation matrix, on the side of :data:`DOWN`."""
    from sim.render import mujoco

    wxyz = np.empty(4)
    mujoco.mju_mat2Quat(wxyz, np.asarray(matrix).ravel())
    xyzw = wxyz[[1, 2, 3, 0]]
    return xyzw if xyzw @ DOWN >= 0 else -xyzw


def _make(name: str) -> Any:
    """A robosuite environment that neither draws nor prints."""
    # What robosuite has to say on import and at every construction concerns robots that are not used here. Errors come through.
    logging.getLogger("robosuite_logs").addFilter(_errors_only)
    # First: it finds out which OpenGL library works and tells MuJoCo, before robosuite insists on EGL.
    importlib.import_module("sim.render")
    chosen = os.environ["MUJOCO_GL"]
    try:
        import robosuite
    except ImportError as error:
        raise TaskError(f"robosuite's tasks need a package that is missing ({error}); {install('robosuite')}") from error
    finally:
        os.environ["MUJOCO_GL"] = chosen
    return robosuite.make(
        name,
        robots="Panda",
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        use_object_obs=False,  # read from the simulator here
        control_freq=RATE,
        ignore_done=True,  # the limit is counted here
        hard_reset=False,
        renderer="mujoco",  # the default one opens a viewer at the first step
        seed=0,
    )


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
