"""Worlds that stand in for an arm: what they measure, keep and record."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from robopolicy.deploy.clock import FakeClock
from robopolicy.deploy.limits import SafetyLimits, WorkspaceConfig, load_limits
from robopolicy.errors import TaskError
from robopolicy.robot import Measured
from sim.arm.robot import ArmModel, SimArm
from sim.arm.task import ArmTask
from sim.driver import LOOKAHEAD, CommandError, Driver
from sim.virtual import ArmWorld, World, make_world


@pytest.mark.parametrize("name", ["reach", "lift", "stack", "arm_pusht"])
def test_what_is_measured_is_observed_as_the_task_observes_it_to_the_bit(name: str) -> None:
    robot, model = SimArm(name, FakeClock(0.0)), ArmModel(name)
    task = robot.task
    rng = np.random.default_rng(0)
    for seed in range(3):
        obs, _ = task.reset(seed=seed)
        for _ in range(10):
            measured = Measured(task.positions, task.velocities, task.poses())
            assert_equal(model.observe(measured), obs)
            obs, *_ = task.step(rng.uniform(task.action_space.low, task.action_space.high))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def test_a_missing_pose_or_picture_is_named() -> None:
    still = np.zeros(8)
    with pytest.raises(TaskError, match="input 'cube' is missing; found cup"):
        ArmModel("lift").observe(Measured(still, still, {"cup": np.zeros(7)}))
    seeing = ArmModel("lift", obs=("qpos", "image"), image_size=32)
    with pytest.raises(TaskError, match=r"'front' must have shape \(32, 32, 3\), found \(16, 16, 3\)"):
        seeing.observe(Measured(still, still, {"front": np.zeros((16, 16, 3), np.uint8)}))
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    assert (seeing.observe(Measured(still, still, {"front": picture}))["image"] == picture).all(), "needs no poses"


def test_other_tasks_are_not_of_the_arm() -> None:
    with pytest.raises(TaskError, match="task 'pusht' is not one of our arm"):
        ArmModel("pusht")


def test_a_robot_follows_its_targets_and_actions_are_searched_from_where_it_was_reset() -> None:
    clock = FakeClock(0.0)
    robot = SimArm("lift", clock)
    robot.reset(100_000)
    assert isinstance(robot.task, ArmTask)
    here = robot.state().positions
    action = np.array([*(robot.task.ee_pos + np.array([0.0, 0.02, 0.0])), 0.0, 0.05])
    targets = [robot.targets(action) for _ in range(5)][-1]
    assert np.abs(targets[:7] - here[:7]).max() < 0.2
    robot.command(targets)
    clock.time += 1.0
    assert robot.state().positions == pytest.approx(targets, abs=2e-3)
    assert robot.task.ee_pos == pytest.approx(action[:3], abs=2e-3)


# ---- worlds and their driver -------------------------------------------------------------------------------------------------

LIMITS = load_limits("arm")
ARM = np.arange(7)


@pytest.fixture(scope="module")
def world() -> ArmWorld:
    return ArmWorld("lift")


class Rig:
    """A driver on a fake clock, and a stream of commands to it."""

    def __init__(self, world: World, limits: SafetyLimits = LIMITS, rate: float = 250.0) -> None:
        self.clock, self.rate = FakeClock(5.0), rate
        self.driver = Driver(world, limits, self.clock, rate=rate)
        self.driver.reset(100_000)
        self.begin = world.positions.copy()

    def stream(self, path: Callable[[float], np.ndarray], seconds: float) -> None:
        """``path(time)`` of the joints."""
        start = self.clock.time
        for k in range(round(seconds * self.rate)):
            self.driver.stream(ARM, path(k / self.rate))
            self.wait(start + (k + 1) / self.rate)

    def wait(self, until: float) -> None:
        while self.clock.time < until:
            self.clock.time = min(until, self.clock.time + 0.01)
            self.driver.advance()

    def worst(self, key: str) -> float:
        return float(self.driver.record.worst[key][0])


def test_physics_keeps_up_with_the_clock_and_gives_time_up_when_it_cannot(world: ArmWorld) -> None:
    rig = Rig(world)
    rig.clock.time += 0.05
    assert rig.driver.advance() == 20
    assert rig.driver.advance() == 0
    assert rig.driver.real_time_factor == 1.0
    rig.clock.time += 1.0
    assert rig.driver.advance() == 1, "a second late: no burst"
    assert rig.driver.real_time_factor < 0.1
    assert rig.driver.report()["lost_s"] == pytest.approx(0.9975, abs=1e-6)


def test_physics_that_is_late_sees_each_command_when_it_came(world: ArmWorld) -> None:
    """On a busy machine physics is stepped now and then, commands come all the time: the arm must not jerk for it."""
    found = []
    for late in (0, 3, 8):  # commands between two looks of physics at the clock
        rig = Rig(world, rate=100.0)
        for k in range(100):
            rig.driver.stream(ARM, rig.begin[:7] + 0.3 * np.sin(np.pi * k / 100) ** 2 * np.eye(7)[0])
            rig.clock.time += 0.01
            if late == 0 or k % late == 0:
                rig.driver.advance()
        found.append({key: rig.worst(key) for key in ("velocity", "acceleration", "jerk")})
    assert found[0]["jerk"] < 0.5
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("rate", [100.0, 500.0])
def test_a_burst_of_commands_is_no_leap_and_is_made_up_for(world: ArmWorld, rate: float) -> None:
    """Held up for 0.12 s on their way, commands come at once: each is within the limits, so the arm must be. No lag stays."""
    found = []
    for held in (0, 0.12):
        rig = Rig(world, rate=100.0)
        start, sent, burst = rig.clock.time, 0, round(held * rate)
        for k in range(round(1.5 * rate)):
            rig.wait(start + k / rate)
            if not 0 < (k - round(0.4 * rate)) <= burst:
                for j in range(sent, k + 1):
                    rig.driver.stream(ARM, rig.begin[:7] + 0.4 * np.sin(np.pi * j / rate / 1.5) ** 2 * np.eye(7)[0])
                sent = k + 1
        assert rig.driver.reflex == ""
        assert rig.driver._due - rig.clock.time == pytest.approx(LOOKAHEAD, abs=5e-3), "as soon as without the burst"
        found.append({key: rig.worst(key) for key in ("velocity", "acceleration")})
    smooth, burst_ = found
    assert smooth["velocity"] == pytest.approx(0.4 * np.pi / 1.5 / 2.2, rel=0.15), "physics has 400 Hz"
    assert burst_["velocity"] < 1.5 * smooth["velocity"]
    assert burst_["acceleration"] < 2.0


def test_streamed_targets_are_reached_and_the_record_knows_how_fast(world: ArmWorld) -> None:
    rig = Rig(world)
    rig.stream(lambda t: rig.begin[:7] + 0.3 * np.sin(np.pi * t) ** 2 * np.eye(7)[0], 1.0)
    rig.wait(rig.clock.time + 0.3)
    assert world.positions[:7] == pytest.approx(rig.begin[:7], abs=1e-3)
    speed, acceleration, jerk = 0.3 * np.pi, 0.6 * np.pi**2, 1.2 * np.pi**3  # of 0.3 sin^2(pi t)
    assert rig.worst("velocity") == pytest.approx(speed / 2.2, rel=0.1), "servos smooth it"
    assert rig.worst("command_velocity") == pytest.approx(speed / 2.2, rel=0.01)
    assert rig.worst("command_acceleration") == pytest.approx(acceleration / 15, rel=0.01)
    assert rig.worst("command_jerk") == pytest.approx(jerk / 600, rel=0.01)
    assert acceleration / 15 * 0.8 < rig.worst("acceleration") < acceleration / 15 * 1.3
    assert rig.worst("jerk") < 0.5
    assert rig.worst("position") < 0, "room left"
    assert rig.driver.record.worst["velocity"][1] == "joint1"
    report = rig.driver.report()
    assert json.loads(json.dumps(report)) == report
    assert report["time"] - 0.5 < report["commanded_at"] < report["moved_at"] < report["time"]


def test_the_record_sees_what_breaks_the_limits(world: ArmWorld) -> None:
    """Every entry of the record can fail: an arm driven past what the limits say is caught."""
    low = {"velocity": 0.1, "acceleration": 0.1, "jerk": 1.0}
    tight = LIMITS.model_copy(
        update={
            "coordinates": tuple(
                c if c.tracking is None else c.model_copy(update=low | {"lower": at - 0.01, "upper": at + 0.01})
                for c, at in zip(LIMITS.coordinates, Rig(world).begin, strict=True)
            ),
            "workspace": WorkspaceConfig(lower=(0.0, -0.01, 0.5), upper=(0.3, 0.01, 0.6), table=0.3),
        }
    )
    rig = Rig(world, tight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.driver.REFLEX_SPEED", 100.0)
        rig.stream(lambda t: rig.begin[:7] + 0.2 * t * np.eye(7)[2], 0.5)
    for key in ("velocity", "acceleration", "jerk", "command_velocity"):
        assert rig.worst(key) > 1.0, key
    assert rig.worst("position") == pytest.approx(0.09, abs=0.02)
    assert rig.worst("workspace") > 0.1
    assert rig.worst("table") > 0.03


def test_what_pushes_back_is_told_from_what_is_carried(world: ArmWorld) -> None:
    world.reset(100_000)
    expert = world.task.expert(np.random.default_rng(0))
    told = []
    for _ in range(200):
        lifted = world.poses()["cube"][2] > 0.03
        told.append((world.positions[7] < 0.05, lifted, world.pushing))
        world.task.step(expert.act())
        if world.task.goal_met():
            break
    assert not any(pushing for closed, _, pushing in told if not closed)
    assert any(pushing for closed, lifted, pushing in told if closed and not lifted)  # what it grips lies on the table
    assert sum(lifted for *_, lifted, _ in told) > 3
    assert not any(pushing for _, lifted, pushing in told if lifted)


def test_what_an_arm_does_that_pushes_is_not_how_it_moves_freely(world: ArmWorld) -> None:
    """It is driven into the table."""
    rig = Rig(world)
    rig.stream(lambda t: rig.begin[:7] + 0.3 * t**2 * np.eye(7)[1], 2.0)
    assert rig.driver.record.pushed is not None
    assert rig.driver.report()["pushed_at"] == pytest.approx(rig.clock.time, abs=0.01)
    for key in ("acceleration", "jerk"):
        assert rig.worst(f"free_{key}") < 0.3 < 0.5 < rig.worst(key)
    assert rig.worst("command_table") > 0.05 > rig.worst("table") + 0.02, "commands lead into it"
    assert rig.worst("command_workspace") > rig.worst("workspace") > rig.worst("free_workspace")
    told = rig.begin[:7] + 0.3 * 2.0**2 * np.eye(7)[1]
    rig.driver.clear_record()
    rig.stream(lambda t: told - 0.2 * t * np.eye(7)[1], 0.25)
    assert "free_velocity" not in rig.driver.record.worst, "it lies on the table"
    rig.stream(lambda t: told - (0.05 + t) * np.eye(7)[1], 1.0)
    assert rig.worst("free_velocity") == pytest.approx(1.0 / 2.2, rel=0.05), "it has left the table for long enough"
    rig.driver.reset(100_000)
    assert rig.driver.record.pushed is None


def test_the_panda_pushes_against_the_table_and_not_when_its_fingers_meet() -> None:
    world = make_world("panda")
    world.reset(0)
    begin = world.positions.copy()
    for k in range(300):
        world.drive(np.append(begin[:7], 0.0))
        world.step()
        assert not world.pushing, k
    for k in range(400):
        world.drive(begin + 0.002 * k * np.eye(8)[1])
        world.step()
    assert world.pushing
    world.close()


def test_a_jump_trips_the_reflex_and_the_arm_stands_until_it_is_reset(world: ArmWorld) -> None:
    rig = Rig(world)
    rig.stream(lambda t: rig.begin[:7], 0.1)
    rig.driver.stream(ARM, rig.begin[:7] + 0.15 * np.eye(7)[3])
    assert "joint4 was told to move 0.15 rad" in rig.driver.reflex
    rig.stream(lambda t: rig.begin[:7] + 0.05, 0.2)
    assert world.positions[:7] == pytest.approx(rig.begin[:7], abs=1e-3)
    assert rig.driver.record.counts["reflexes"] == 1
    rig.driver.reset_reflex()
    rig.stream(lambda t: rig.begin[:7] + 0.05 * min(1.0, 4 * t), 0.5)
    assert rig.driver.reflex == ""
    assert world.positions[:7] == pytest.approx(rig.begin[:7] + 0.05, abs=2e-3)


def test_too_fast_a_stream_trips_the_reflex(world: ArmWorld) -> None:
    rig = Rig(world)
    rig.stream(lambda t: rig.begin[:7] + 4.0 * t * np.eye(7)[4], 0.1)  # rated: 2.6 rad/s, 1.6 times that is 4.16
    assert rig.driver.reflex == ""
    rig = Rig(world)
    rig.stream(lambda t: rig.begin[:7] + 4.5 * t * np.eye(7)[4], 0.1)
    assert "joint5" in rig.driver.reflex


def test_what_no_controller_takes_is_refused_and_counted(world: ArmWorld) -> None:
    rig = Rig(world)
    with pytest.raises(CommandError, match="6 values for 7 joints"):
        rig.driver.stream(ARM, rig.begin[:6])
    with pytest.raises(CommandError, match="not finite"):
        rig.driver.stream(ARM, np.full(7, np.nan))
    with pytest.raises(CommandError, match="not finite"):
        rig.driver.grip(np.inf)
    with pytest.raises(CommandError, match="must increase"):
        rig.driver.follow(ARM, np.array([0.2, 0.1]), np.tile(rig.begin[:7], (2, 1)))
    assert rig.driver.record.counts["refused"] == 4


def test_trajectories_and_the_gripper(world: ArmWorld) -> None:
    rig = Rig(world)
    goal = rig.begin[:7] + 0.2 * np.eye(7)[0]
    rig.driver.follow(ARM[::-1], np.array([0.25, 0.5]), np.array([(rig.begin[:7] + goal)[::-1] / 2, goal[::-1]]))
    rig.driver.grip(0.03)
    rig.wait(rig.clock.time + 0.25)
    assert world.positions[0] == pytest.approx(rig.begin[0] + 0.1, abs=0.03), "half way, and the servos' lag"
    rig.wait(rig.clock.time + 0.6)
    assert world.positions[:7] == pytest.approx(goal, abs=1e-3)
    assert world.positions[7] == pytest.approx(0.03, abs=1e-3)
    assert rig.driver.reflex == ""


def test_after_a_reset_what_still_streams_for_where_the_arm_was_is_ignored(world: ArmWorld) -> None:
    rig = Rig(world)
    old = rig.begin[:7] + 0.02
    rig.stream(lambda t: old, 0.1)
    rig.driver.reset(100_000)  # to the same place: the old target is near, and must not pull
    rig.stream(lambda t: old, 0.1)
    rig.stream(lambda t: old + 0.5, 0.1)
    assert world.positions[:7] == pytest.approx(rig.begin[:7], abs=1e-3)
    assert rig.driver.reflex == ""
    assert rig.driver.record.counts["ignored"] == 50
    rig.stream(lambda t: rig.begin[:7] + 0.01, 0.2)
    assert world.positions[:7] == pytest.approx(rig.begin[:7] + 0.01, abs=1e-3)


def test_limits_of_another_arm_are_refused(world: ArmWorld) -> None:
    with pytest.raises(CommandError, match="the limits are for joint2"):
        Driver(world, LIMITS.model_copy(update={"coordinates": LIMITS.coordinates[1:]}), FakeClock())
    with pytest.raises(TaskError, match="no world 'amr'"):
        make_world("amr")


@pytest.mark.usefixtures("renderer")
def test_pictures_show_a_snapshot_and_leave_the_world_alone(world: ArmWorld) -> None:
    rig = Rig(world)
    eye = world.eye("front", 48, 64)
    before = rig.driver.snapshot()
    first = eye(before.picture)
    rig.stream(lambda t: rig.begin[:7] + 0.4 * t, 0.5)
    after = rig.driver.snapshot()
    assert first.shape == (48, 64, 3)
    assert (eye(after.picture) != first).any()
    assert (eye(before.picture) == first).all()
    assert (world.snapshot() == after.picture).all()
    with pytest.raises(TaskError, match="no camera 'back'"):
        world.eye("back", 48, 64)


def test_the_panda_of_robosuite_holds_its_arm_and_follows() -> None:
    panda = make_world("panda")
    panda.reset(0)
    begin = panda.positions.copy()
    assert len(panda.joint_names) == len(panda.joints().positions) == 9
    assert set(panda.poses()) == {"cube"}
    panda.drive(begin)
    for _ in range(250):
        panda.step()
    assert panda.positions[:7] == pytest.approx(begin[:7], abs=2e-3), "gravity is compensated"
    goal = np.append(begin[:7] + 0.05, 0.06)
    panda.drive(goal)
    for _ in range(250):
        panda.step()
    assert panda.positions[:7] == pytest.approx(goal[:7], abs=2e-3)
    assert panda.positions[7] == pytest.approx(0.06, abs=5e-3)
    panda.close()
