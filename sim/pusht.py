"""Push-T as published: push the grey T onto the green one with a round finger, in the plane.

The world (shapes, masses, gains) is gym-pusht's, which copied it from diffusion_policy; so are reward and rendering. Three
things are done here instead of there:

* **Setting a state.** The block's angle is set before its position, and no extra physics step is taken: setting the angle turns
  the block about its centre of mass, which moves the origin that was just placed. gym-pusht does it the other way round, and
  replaying the human recordings from its reset is off by tens of pixels. With this order their replay is exact.
* **The initial distribution.** The published reset has that very order, and both the human demonstrations and the published
  scores were made with it. What it amounts to: the block is placed upright on a random pixel, then turned about its centre of
  mass. :meth:`PushT.reset` draws from exactly this distribution (the first states of all 206 recordings fit it).
* **Speed.** The controller is written in scalars, contacts are not counted in Python, and the overlap with the goal is not
  computed while it cannot exist. Trajectories equal gym-pusht's to the last bit, rewards to 1e-15: gym-pusht adds up the
  rectangles in an order that depends on memory addresses, and so does not repeat its own last bit; the order is fixed here.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import cv2
import gymnasium
import numpy as np

from robopolicy.errors import TaskError, nearest
from robopolicy.features import Feature
from robopolicy.task import Observation, Task

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # pygame's, on every import
    import pymunk
    import shapely
    from gym_pusht.envs.pusht import PushTEnv

Observe = Literal["state", "keypoints", "image"]

BOARD = 512.0  # side of the board [px]
IMAGE_SIZE = 96  # side of an image observation [px]
RATE = 10.0  # control steps per second [Hz]
MAX_EPISODE_STEPS = 300
SUCCESS_COVERAGE = 0.95

# Nine points on the T in its own frame [px]. diffusion_policy drew them once by farthest-point sampling; the values are the mean
# over the rows of the human recordings, which determines them to 1e-6 px.
KEYPOINTS = np.array(
    [
        [9.269787, 90.040974],
        [-60.983472, -1.18673],
        [60.912756, -1.393364],
        [-0.270503, 25.543625],
        [-14.064927, 122.815854],
        [39.002738, 32.857404],
        [-39.966415, 32.729655],
        [-16.824344, 62.863179],
        [23.541461, -1.700288],
    ]
)

# The T in its own frame [px]: its two rectangles, closed; its centre of mass; a circle around that centre that holds it.
CORNERS = np.array(
    [
        [[-60.0, 0.0], [60.0, 0.0], [60.0, 30.0], [-60.0, 30.0], [-60.0, 0.0]],
        [[-15.0, 30.0], [15.0, 30.0], [15.0, 120.0], [-15.0, 120.0], [-15.0, 30.0]],
    ]
)
CENTRE = (0.0, 45.0)
RADIUS = 77.0


def keypoints(block_pose: np.ndarray) -> np.ndarray:
    """The nine points of the human recordings on a block at ``block_pose``.

    Args:
        block_pose: ``[..., 3]``: x [px], y [px], angle [rad].

    Returns:
        ``[..., 18]``: x0, y0, x1, y1, ... [px].
    """
    pose = np.asarray(block_pose, np.float64)
    cos, sin = np.cos(pose[..., 2:]), np.sin(pose[..., 2:])
    x = pose[..., :1] + cos * KEYPOINTS[:, 0] - sin * KEYPOINTS[:, 1]
    y = pose[..., 1:2] + sin * KEYPOINTS[:, 0] + cos * KEYPOINTS[:, 1]
    return np.stack([x, y], axis=-1).reshape(*pose.shape[:-1], 2 * len(KEYPOINTS))


def noisy_sensors(state: np.ndarray, noise: Sequence[float], rng: np.random.Generator) -> Observation:
    """What two poor sensors say of ``state [..., 5]`` (as :attr:`PushT.state`): independent Gaussian errors at every step.

    Args:
        state: Agent x, y [px], block x, y [px], block angle [rad].
        noise: Standard deviations: of the agent's position [px], of the block's position [px], of its angle [rad].
        rng: Source of the errors.

    Returns:
        ``agent_pos_noisy [..., 2]`` and ``keypoints_noisy [..., 18]`` float32 px: the key points of a block that is elsewhere,
        not nine independent errors, which would average out.
    """
    state = np.asarray(state, np.float64)
    agent, block, angle = noise
    seen = state + rng.normal(size=state.shape) * np.array([agent, agent, block, block, angle])
    return {
        "agent_pos_noisy": seen[..., :2].astype(np.float32),
        "keypoints_noisy": keypoints(seen[..., 2:]).astype(np.float32),
    }


class PushT(Task):
    """Push the T onto its target.

    Action: where the finger shall go, ``[2]`` px on the board; a PD controller takes it there at 100 Hz. Reward: the share of the
    target that is covered, over 0.95, at most 1; the score of an episode is the largest reward in it. The episode ends with
    success when 95 % of the target is covered, as published, or after 300 steps.

    Args:
        obs: What to observe besides ``agent_pos``: ``state`` (the block's pose), ``keypoints`` (nine points on the block) or
            ``image`` (96 x 96, without the pose).
        render_size: Side of the frames of :meth:`render` [px].
        noise: Observe ``agent_pos_noisy`` and ``keypoints_noisy`` besides, with these deviations (:func:`noisy_sensors`); goes
            with ``obs: keypoints`` only. The errors are a function of the seed; the initial states are those without noise.

    Raises:
        TaskError: For an unknown ``obs``, an unusable ``render_size``, or a ``noise`` that is not three numbers.
    """

    rate = RATE
    max_episode_steps = MAX_EPISODE_STEPS
    render_mode = "rgb_array"

    def __init__(self, obs: Observe = "keypoints", render_size: int = 512, noise: Sequence[float] | None = None) -> None:
        if obs not in get_args(Observe):
            raise TaskError(f"task 'pusht' has no observations '{obs}': {nearest(str(obs), get_args(Observe))}")
        if render_size < 64:
            raise TaskError(f"task 'pusht': render_size {render_size} is too small to see anything; use at least 64")
        if noise is not None and (obs != "keypoints" or len(noise) != 3 or min(noise) < 0):
            raise TaskError(
                f"task 'pusht': noise {list(noise)} with obs '{obs}'; give three deviations, none negative (agent [px], "
                "block [px], angle [rad]), with obs=keypoints"
            )
        self._noise = noise
        self._sensors = np.random.default_rng(0)  # another one in each episode, see reset
        self._obs = obs
        self._render_size = render_size
        self._world = PushTEnv(observation_width=IMAGE_SIZE, observation_height=IMAGE_SIZE)
        self._world._setup()
        goal = self._world.get_goal_pose_body(self._world.goal_pose)
        self._goal = shapely.multipolygons(shapely.polygons(outlines(goal)))
        self._goal_centre = goal.local_to_world(CENTRE)
        self._steps = 0
        self._target: np.ndarray | None = None

        features = [Feature("agent_pos", (2,), unit="px", names=("x", "y"), rate=RATE)]
        if obs == "state":
            features.append(Feature("block_pose", (3,), unit="px,px,rad", names=("x", "y", "angle"), rate=RATE))
        elif obs == "keypoints":
            names = tuple(f"{axis}{i}" for i in range(len(KEYPOINTS)) for axis in "xy")
            features.append(Feature("keypoints", (2 * len(KEYPOINTS),), unit="px", names=names, rate=RATE))
            if noise is not None:
                features.append(Feature("agent_pos_noisy", (2,), unit="px", names=("x", "y"), rate=RATE))
                features.append(Feature("keypoints_noisy", (2 * len(KEYPOINTS),), unit="px", names=names, rate=RATE))
        else:
            features.append(Feature("image", (IMAGE_SIZE, IMAGE_SIZE, 3), dtype="uint8", unit="1", rate=RATE))
        self.observation_features = {f.name: f for f in features}
        self.action_feature = Feature("action", (2,), unit="px", names=("x", "y"), rate=RATE)
        self.observation_space: gymnasium.Space[Any] = gymnasium.spaces.Dict({f.name: _space(f) for f in features})
        self.action_space = gymnasium.spaces.Box(0.0, BOARD, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Start an episode from the published distribution of initial states; see the module's text."""
        super().reset(seed=seed)
        rng = self.np_random
        agent = rng.integers(50, 450, size=2)
        upright = rng.integers(100, 400, size=2)
        angle = rng.uniform(-math.pi, math.pi)  # published: normal with a deviation of 2 pi, the same to 1e-8 on the circle
        turned = np.array([-math.sin(angle) * CENTRE[1], math.cos(angle) * CENTRE[1]])  # CENTRE lies on the T's y axis
        block = upright + CENTRE - turned
        self._sensors = np.random.default_rng(rng.integers(2**63))  # drawn last: the states above are the same with and without
        return self.set_state(np.array([*agent, *block, angle]))

    def set_state(self, state: np.ndarray) -> tuple[Observation, dict[str, Any]]:
        """Start an episode from a given state at rest.

        Args:
            state: ``[5]``: agent x, y [px], block x, y [px], block angle [rad], as in ``data/state`` of the human recordings.

        Returns:
            The observation and info, as :meth:`reset`.
        """
        state = np.asarray(state, np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise TaskError(f"task 'pusht': state {state.tolist()} is not 5 finite numbers (agent x, y, block x, y, angle)")
        self._world._setup()  # a new space: the contacts that the solver remembers must not leak into the next episode
        for shape in self._world.space.shapes:
            shape.collision_type = 1  # gym-pusht counts contacts of type 0 in Python; nothing here reads the count
        agent_x, agent_y, block_x, block_y, angle = state.tolist()
        self._world.agent.position = agent_x, agent_y
        self._world.block.angle = angle
        self._world.block.position = block_x, block_y
        for shape in self._world.space.shapes:
            shape.cache_bb()  # images show where shapes were at the last physics step; there has been none
        self._steps = 0
        self._target = None
        return self._observe(), {"is_success": False, "coverage": self._coverage()}

    @property
    def state(self) -> np.ndarray:
        """``[5]`` float64: agent x, y [px], block x, y [px], block angle [rad] in [0, 2 pi)."""
        world = self._world
        return np.array([*world.agent.position, *world.block.position, world.block.angle % (2 * math.pi)])

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        target_x, target_y = np.clip(np.asarray(action, np.float64), 0.0, BOARD).tolist()
        world, agent, dt = self._world, self._world.agent, self._world.dt
        for _ in range(round(1 / (dt * RATE))):
            (x, y), (vx, vy) = agent.position, agent.velocity
            ax = world.k_p * (target_x - x) + world.k_v * (0.0 - vx)
            ay = world.k_p * (target_y - y) + world.k_v * (0.0 - vy)
            agent.velocity = vx + ax * dt, vy + ay * dt
            world.space.step(dt)
        self._steps += 1
        self._target = np.array([target_x, target_y])
        coverage = self._coverage()
        success = coverage >= SUCCESS_COVERAGE
        reward = min(max(coverage / SUCCESS_COVERAGE, 0.0), 1.0)
        return self._observe(), reward, success, self._steps >= MAX_EPISODE_STEPS, {"is_success": success, "coverage": coverage}

    def render(self) -> np.ndarray:
        """The board with its target, the block, the finger and where the finger is told to go, ``[S, S, 3]`` uint8."""
        scale = self._render_size / BOARD
        frame = np.full((self._render_size, self._render_size, 3), 250, np.uint8)

        def polygon(points: np.ndarray, color: tuple[int, int, int]) -> None:
            # 4 fractional bits keep slow motion smooth
            cv2.fillPoly(frame, [np.round(points * scale * 16).astype(np.int32)], color, cv2.LINE_AA, shift=4)

        def disc(centre: np.ndarray, radius: float, color: tuple[int, int, int], thickness: int = -1) -> None:
            x, y = np.round(centre * scale * 16).astype(int).tolist()
            cv2.circle(frame, (x, y), round(radius * scale * 16), color, thickness, cv2.LINE_AA, shift=4)

        polygon(np.array([[0, 0], [512, 0], [512, 512], [0, 512]]), (205, 209, 217))
        polygon(np.array([[7, 7], [505, 7], [505, 505], [7, 505]]), (250, 250, 250))
        for outline in shapely.get_parts(self._goal):
            polygon(shapely.get_coordinates(outline), (172, 225, 175))
        for outline in outlines(self._world.block):
            polygon(outline, (96, 108, 129))
        disc(np.array(self._world.agent.position), 15, (52, 101, 216))
        if self._target is not None:
            disc(self._target, 6, (220, 62, 54), max(1, round(2 * scale)))
        return frame

    def _observe(self) -> Observation:
        state = self.state
        observation = {"agent_pos": state[:2].astype(np.float32)}
        if self._obs == "state":
            observation["block_pose"] = state[2:].astype(np.float32)
        elif self._obs == "keypoints":
            observation["keypoints"] = keypoints(state[2:]).astype(np.float32)
            if self._noise is not None:
                observation |= noisy_sensors(state, self._noise, self._sensors)
        else:
            observation["image"] = self._image()
        return observation

    def _image(self) -> np.ndarray:
        """``[96, 96, 3]`` uint8, pixel for pixel as gym-pusht renders it, without the copies that take it ten times as long."""
        screen = self._world._draw()
        pixels = np.asarray(screen.get_view("2")).T  # [512, 512] uint32 in memory order, which is blue, green, red, unused
        small = cv2.resize(pixels.view(np.uint8).reshape(*pixels.shape, 4), (IMAGE_SIZE, IMAGE_SIZE))
        return np.ascontiguousarray(small[..., 2::-1])

    def _coverage(self) -> float:
        """Share of the target that the block covers, in [0, 1]."""
        (x, y), (goal_x, goal_y) = self._world.block.local_to_world(CENTRE), self._goal_centre
        if (x - goal_x) ** 2 + (y - goal_y) ** 2 > (2 * RADIUS) ** 2:
            return 0.0
        block = shapely.multipolygons(shapely.polygons(outlines(self._world.block)))
        return float(shapely.area(shapely.intersection(self._goal, block)) / self._goal.area)


def outlines(body: pymunk.Body) -> np.ndarray:
    """Corners of the two rectangles of a T at the pose of ``body``, closed, ``[2, 5, 2]`` px in the board's frame."""
    (x, y), (cos, sin) = body.position, body.rotation_vector
    corners = np.empty_like(CORNERS)
    # In the order of operations of pymunk's local_to_world, so that the corners are the very numbers that gym-pusht uses.
    corners[..., 0] = cos * CORNERS[..., 0] + (-sin) * CORNERS[..., 1] + x
    corners[..., 1] = sin * CORNERS[..., 0] + cos * CORNERS[..., 1] + y
    return corners


def _space(feature: Feature) -> gymnasium.spaces.Box:
    """What gymnasium needs to know; the block's origin can leave the board, so positions are not bounded."""
    if feature.is_image:
        return gymnasium.spaces.Box(0, 255, feature.shape, np.uint8)
    return gymnasium.spaces.Box(-np.inf, np.inf, feature.shape, np.float32)
