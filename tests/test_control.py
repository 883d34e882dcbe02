"""The control loop on a fake clock, deterministic and faster than time; and once, loosely, in real time."""

import gc
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from robots import RATE, Planned, Point

from robopolicy.deploy.clock import FakeClock, SystemClock
from robopolicy.deploy.control import ControlConfig, ControlLoop
from robopolicy.deploy.engine import Engine, InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.interpolate import InterpolationConfig, RotationColumns
from robopolicy.deploy.limits import SafetyLimits, load_limits
from robopolicy.deploy.safety import Mode, Reason, SafetyFilter
from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.features import Feature
from robopolicy.robot import Sample
from sim.arm.robot import SimArm

LIMITS = SafetyLimits.model_validate(
    {
        "coordinates": [
            {"name": name, "unit": "m", "lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0}
            for name in "ab"
        ]
    }
)


class Cell:
    """A point robot under a policy that wants to be at ``value``."""

    def __init__(self, delay: float = 0.02, threaded: bool = False, **config: Any) -> None:
        self.clock, self.planner = FakeClock(50.0), Planned()
        self.robot, self.safety = Point(self.clock), SafetyFilter(LIMITS)
        args = (self.planner, 1 / RATE, self.clock, torch.Generator())
        self.engine = Engine(*args) if threaded else InlineEngine(*args, delay=delay)
        self.loop = ControlLoop(
            self.robot, self.engine, make_executor("latest"), self.safety, self.clock, ControlConfig(**config)
        )  # fmt: skip
        assert self.loop.reset() == ()

    def rows(self) -> np.ndarray:
        return self.loop.log.rows()


def test_a_policy_is_carried_out() -> None:
    cell = Cell()
    cell.loop.run(2.0)
    rows = cell.rows()
    assert len(rows) == 500
    assert cell.robot.at == pytest.approx([0.1, 0.0], abs=1e-6)
    assert (rows["mode"] == 1).all()  # running
    assert (np.diff(rows["deadline"]) > 0).all()
    assert (np.diff(rows["start"]) > 0).all()
    assert rows["start"] == pytest.approx(rows["start"][0] + np.arange(500) * 0.004, abs=1e-9)
    assert [time for time, _ in cell.robot.sent] == pytest.approx(rows["start"])
    assert (rows["executed"] == np.array([sent for _, sent in cell.robot.sent])).all()
    report = cell.loop.report()
    assert (report["missed"], report["skipped"], report["starved"]) == (0.0, 0, 0.0)
    # A chunk is asked for every 8 rows and comes 20 ms later: what is carried out is between 20 and 420 ms old.
    assert 20 <= report["age_ms"]["p50"] <= 420
    assert report["age_ms"]["max"] == pytest.approx(420, abs=5)
    assert report["engine"]["chunks"] == pytest.approx(2.0 / 0.4, abs=2)
    assert report["engine"]["late"] == 0


def test_the_output_keeps_the_limits_when_the_policy_does_not() -> None:
    cell = Cell(replan=2)
    cell.loop.run(0.1)  # near targets first: far ones begin slowly
    for value in ([5.0, -5.0], [-5.0, 5.0], [5.0, 5.0]):
        cell.planner.value = np.array(value, np.float32)
        cell.loop.run(1.2)
    sent = np.array([positions for _, positions in cell.robot.sent])
    assert np.abs(np.diff(sent, 1, axis=0)).max() <= 1.0 * 0.004 * (1 + 1e-9)
    assert np.abs(np.diff(sent, 2, axis=0)).max() <= 5.0 * 0.004**2 * (1 + 1e-6)
    assert np.abs(np.diff(sent, 3, axis=0)).max() <= 100.0 * 0.004**3 * (1 + 1e-6)
    assert 0.9 < np.abs(sent).max() <= 0.95 + 1e-6


def test_a_plan_that_is_no_number_is_a_fault() -> None:
    cell = Cell(replan=2, max_starved=50)
    cell.loop.run(0.1)
    cell.planner.value = np.array([np.nan, 0.0], np.float32)
    cell.loop.run(1.0)
    assert cell.safety.mode is Mode.STOPPED
    assert "NaN" in str(cell.safety.cause)
    assert np.isfinite(cell.robot.at).all()


@pytest.mark.parametrize(("overrun", "mode"), [("skip", 1), ("decelerate", 2)])
def test_a_stall_skips_periods_and_is_counted(overrun: str, mode: int) -> None:
    cell = Cell(overrun=overrun)
    cell.loop.run(0.5)
    send = cell.robot.command
    stalls = [0.0] * 30 + [0.0125] + [0.0] * 30  # three periods and a bit

    def slow(positions: np.ndarray) -> None:
        cell.clock.time += stalls.pop() if stalls else 0.0
        send(positions)

    cell.robot.command = slow  # type: ignore[method-assign]
    cell.loop.run(0.5)
    assert cell.loop.skipped == 2  # of the three, the one after the stall began late but within its period
    assert cell.loop.missed == 2  # the period that took too long, and the one that begins after skipped ones
    rows = cell.rows()[125:]
    assert len(rows) == 123, "half a second is half a second, whatever was skipped"
    late = np.flatnonzero(rows["skipped"])
    assert rows["skipped"][late].tolist() == [2]
    assert rows["mode"][late].tolist() == [mode]
    assert (np.diff(rows["number"]) >= 1).all()
    assert rows["start"][late + 1] == pytest.approx(rows["deadline"][late + 1])


@pytest.mark.parametrize("starved", ["hold", "decelerate"])
def test_without_a_plan_the_arm_holds_and_the_watchdog_stops_it(starved: str) -> None:
    cell = Cell(threaded=True, starved=starved, max_starved=100)
    cell.loop.run(0.004)  # the first plan is there
    cell.planner.gate.clear()  # inference hangs from now on
    cell.loop.run(0.6)
    held = cell.robot.at
    assert held == pytest.approx([0.1, 0.0], abs=1e-3), "the first chunk is carried out to its end"
    cell.loop.run(0.3)
    rows = cell.rows()
    begin = int(np.argmax(rows["starved"]))
    assert rows["start"][begin] == pytest.approx(rows["start"][0] + 16 / RATE, abs=0.005)
    assert (rows["starved"][begin:] == 1).all()
    assert rows["mode"][begin + 5] == (1 if starved == "hold" else 2)
    cell.loop.run(1.0)
    assert cell.safety.mode is Mode.STOPPED
    assert "watchdog" in str(cell.safety.cause)
    assert cell.loop.starved == 100
    assert len(cell.rows()) < 225 + 110, "the loop ends when the arm has been stopped for good"
    cell.planner.gate.set()
    cell.loop.close()
    assert cell.robot.stopped


def test_too_many_missed_periods_in_a_row_stop_the_arm() -> None:
    cell = Cell(max_missed=5)
    send = cell.robot.command

    def slow(positions: np.ndarray) -> None:
        cell.clock.time += 0.005
        send(positions)

    cell.robot.command = slow  # type: ignore[method-assign]
    cell.loop.run(1.0)
    assert cell.safety.mode is Mode.STOPPED
    assert "5 periods in a row" in str(cell.safety.cause)


def test_an_exception_in_inference_stops_the_arm_at_once() -> None:
    cell = Cell(threaded=True)
    cell.loop.run(0.2)
    cell.planner.error = RuntimeError("out of memory")
    cell.engine.post({"pos": np.zeros((2, 2), np.float32)}, cell.clock.now(), None)
    end = time.monotonic() + 20
    while cell.engine.fault is None and time.monotonic() < end:
        time.sleep(0.001)
    cell.loop.run(0.004)
    assert cell.safety.mode is Mode.STOPPED
    assert "out of memory" in str(cell.safety.cause)
    cell.loop.close()


def test_slow_inference_does_not_slow_control() -> None:
    cell = Cell(threaded=True)
    cell.loop.run(0.004)
    cell.planner.gate.clear()
    cell.engine.post({"pos": np.zeros((2, 2), np.float32)}, cell.clock.now(), None)
    opener = threading.Timer(10.0, cell.planner.gate.set)  # so that a loop that waits fails, and does not hang
    opener.start()
    begin = time.monotonic()
    cell.loop.run(0.5)
    assert time.monotonic() - begin < 8.0
    assert len(cell.rows()) == 126
    opener.cancel()
    cell.planner.gate.set()
    cell.loop.close()


def test_a_new_episode_begins_anew() -> None:
    cell = Cell()
    cell.loop.run(1.0)
    cell.planner.value = np.array([-0.1, 0.0], np.float32)
    assert cell.loop.reset(seed=1) == ()
    assert cell.robot.at.tolist() == [0.0, 0.0]
    cell.loop.run(0.2)
    rows = cell.rows()
    second = rows[rows["episode"] == rows["episode"].max()]
    assert len(second) == 50
    assert second["target"][:, 0].max() <= 1e-6, "no plan of the old episode is carried out"


def jump_free(sent: list[tuple[float, np.ndarray]]) -> bool:
    """No set point breaks the limits of the filter on the way from the one before."""
    positions = np.array([position for _, position in sent])
    return bool(np.abs(np.diff(positions, 3, axis=0)).max() <= 100.0 * 0.004**3 * (1 + 1e-6))


@pytest.mark.parametrize("end", ["holding", "braking", "estop"])
def test_a_reset_from_any_end_begins_where_the_robot_is(end: str) -> None:
    cell = Cell()
    cell.planner.value = np.array([0.9, 0.0], np.float32)
    cell.loop.run(0.6)
    if end == "holding":
        cell.robot.age = 0.3
        cell.loop.run(0.02)
        assert cell.safety.mode is Mode.HOLDING
        cell.robot.age = 0.0
    else:
        cell.safety.stop() if end == "braking" else cell.safety.estop()
        cell.loop.run(0.008)
        assert not cell.safety.still
    refused = cell.loop.reset()
    assert jump_free(cell.robot.sent), "it stands before it is reset"
    assert [reason.kind for reason in refused] == (["estopped"] if end == "estop" else [])
    cell.robot.sent.clear()
    cell.loop.run(0.1)
    if end == "estop":
        return
    assert jump_free(cell.robot.sent)
    assert np.abs(cell.robot.sent[0][1]).max() < 1e-4, "the robot was brought to 0"


@pytest.mark.parametrize("method", ["state", "observe", "targets", "command"])
def test_an_exception_in_a_period_stops_the_arm_smoothly(method: str) -> None:
    cell = Cell()
    cell.planner.value = np.array([0.9, 0.0], np.float32)
    cell.loop.run(0.6)
    works, calls = getattr(cell.robot, method), []

    def broken(*args: Any) -> Any:
        calls.append(args)
        if method != "command" or len(calls) == 1:  # a robot that takes no command at all cannot be braked
            raise OSError("bus")
        return works(*args)

    setattr(cell.robot, method, broken)
    with pytest.raises(OSError, match="bus"):
        cell.loop.run(0.5)
    assert cell.safety.still
    assert cell.robot.stopped
    assert "bus" in str(cell.safety.cause)
    assert method == "command" or jump_free(cell.robot.sent)
    assert cell.robot.at == pytest.approx(cell.safety.set_point)
    cell.robot.stopped = False
    cell.loop.close()
    assert cell.robot.stopped, "closing needs no measurement"


def test_a_robot_that_takes_no_commands_is_stopped_and_the_engine_closed() -> None:
    cell = Cell(threaded=True)
    cell.planner.value = np.array([0.9, 0.0], np.float32)
    cell.loop.run(0.6)

    def broken(_: np.ndarray) -> None:
        raise OSError("bus")

    cell.robot.command = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="bus"):
        cell.loop.close()
    assert cell.robot.stopped
    assert cell.engine._thread is None


def test_a_start_from_an_old_measurement_is_refused() -> None:
    cell = Cell()
    cell.loop.run(0.2)
    cell.robot.age = 0.2
    assert [str(reason) for reason in cell.loop.reset()] == ["stale state: 0.2, limit 0.15"]


def test_why_the_policy_cannot_begin_is_told_as_the_robot_knows_it() -> None:
    cell = Cell()
    robot: Any = cell.robot
    robot.explained = lambda said: f"{said} (as the robot says)"
    robot.observe = lambda: Sample({}, cell.clock.now(), {}, Reason("stuck", "camera", 2.0, 1.0))
    with pytest.raises(EvaluationError, match=r"cannot begin: stuck camera: 2, limit 1 \(as the robot says\); .* restart that"):
        cell.loop.run(0.5)


def test_stale_measurements_hold_the_arm() -> None:
    cell = Cell()
    cell.loop.run(0.2)
    cell.robot.age = 0.2
    cell.loop.run(0.02)
    assert cell.safety.mode is Mode.HOLDING
    assert cell.safety.events["stale"] == 1


def test_a_closed_loop_leaves_the_arm_standing() -> None:
    cell = Cell()
    cell.planner.value = np.array([0.9, 0.0], np.float32)
    cell.loop.run(0.6)
    moving = np.array([sent for _, sent in cell.robot.sent])
    assert abs(moving[-1, 0] - moving[-2, 0]) > 1e-4
    cell.loop.close()
    sent = np.array([positions for _, positions in cell.robot.sent])
    assert np.abs(np.diff(sent, 3, axis=0)).max() <= 100.0 * 0.004**3 * (1 + 1e-6)
    assert abs(sent[-1, 0] - sent[-2, 0]) < 1e-5
    assert cell.robot.stopped


def test_what_does_not_fit_is_refused() -> None:
    clock = FakeClock()
    robot, engine = Point(clock), InlineEngine(Planned(), 0.05, clock, torch.Generator())
    other = SafetyLimits.model_validate({"coordinates": [LIMITS.coordinates[0].model_dump()]})
    with pytest.raises(ConfigError, match="the robot takes a, b, the safety limits are for a"):
        ControlLoop(robot, engine, make_executor("latest"), SafetyFilter(other), clock)


def test_plans_that_become_older_than_the_limits_let_through_are_refused() -> None:
    class Long(Planned):
        rows = 64

    clock = FakeClock()
    engine = InlineEngine(Long(), 1 / RATE, clock, torch.Generator())
    config = ControlConfig(replan=32)
    loop = ControlLoop(Point(clock), engine, make_executor("latest"), SafetyFilter(LIMITS), clock, config)
    with pytest.raises(ConfigError, match="raise it, or make"):
        loop.reset()


def test_rotations_of_the_policy_stay_rotations() -> None:
    """Half a turn about z, as a quaternion: entry by entry it would lead through zero."""
    quaternion = Feature("action", (4,), "float32", "1", ("x", "y", "z", "w"), RATE)
    columns = InterpolationConfig(rotations=(RotationColumns(start=0, representation="quat_xyzw"),))
    cell = Cell(replan=2)
    cell.robot.action_feature = quaternion
    cell.planner.value = np.array([0.0, 0.0, 0.0, 1.0], np.float32)
    cell.robot.targets = lambda action: 0.1 * action[2:]  # type: ignore[method-assign]
    loop = ControlLoop(
        cell.robot, cell.engine, make_executor("latest"), cell.safety, cell.clock, ControlConfig(replan=2), columns
    )
    assert loop.reset() == ()
    loop.run(0.2)
    cell.planner.value = np.array([0.0, 0.0, 1.0, 0.05], np.float32) / np.float32(np.hypot(1, 0.05))
    loop.run(0.5)
    actions = loop.log.rows()["action"]
    assert np.linalg.norm(actions, axis=1) == pytest.approx(1.0, abs=1e-6)
    assert (np.abs(actions[:, 2] - 0.5) < 0.2).any(), "it was between the two"


def test_a_start_outside_the_limits_is_refused() -> None:
    cell = Cell()
    cell.robot.reset = lambda seed=None: setattr(cell.robot, "at", np.array([0.0, 1.3]))  # type: ignore[method-assign]
    assert [str(reason) for reason in cell.loop.reset()] == ["start_outside b: 1.3, limit 1"]


def test_the_arm_goes_where_the_policy_says_but_not_into_the_table() -> None:
    clock = FakeClock(10.0)
    robot = SimArm("lift", clock)
    safety = SafetyFilter(load_limits("arm"), robot.kinematics)

    class Down(Planned):
        def plan(self, obs: Any, *_: Any) -> np.ndarray:
            return np.tile(np.array([0.5, 0.1, -0.1, 0.3, 0.08], np.float32), (1, self.rows, 1))

    engine = InlineEngine(Down(), 0.05, clock, torch.Generator(), delay=0.03)
    loop = ControlLoop(robot, engine, make_executor("latest"), safety, clock, ControlConfig())
    assert loop.reset(100_000) == ()
    loop.run(4.0)
    rows = loop.log.rows()
    heights = np.array([robot.kinematics.points(q)[0, 2] for q in rows["executed"]])
    assert heights.min() > 0.004 - 1e-3
    assert robot.task.ee_pos == pytest.approx([0.5, 0.1, 0.008], abs=0.005)
    assert safety.mode is Mode.RUNNING
    assert np.abs(rows["state"] - rows["executed"])[:, :7].max() < 0.1, "the servos keep up"
    twice = SimArm("lift", FakeClock(10.0))
    twice.reset(100_000)
    robot.reset(100_000)
    assert (twice.state().positions == robot.state().positions).all()


def test_in_real_time_periods_are_kept_and_everything_is_put_back() -> None:
    clock = SystemClock()
    robot, safety, planner = Point(clock), SafetyFilter(LIMITS.model_copy(update={"rate": 100.0})), Planned()
    engine = Engine(planner, 1 / RATE, clock, torch.Generator())
    config = ControlConfig(fifo=10, max_missed=1000)
    loop = ControlLoop(robot, engine, make_executor("latest"), safety, clock, config)
    assert loop.reset() == ()
    interval = sys.getswitchinterval()
    loop.run(1.5)
    assert gc.isenabled()
    assert sys.getswitchinterval() == interval
    report = loop.report()
    assert report["ticks"] + report["skipped"] >= 150  # more where the last period stalled
    assert report["lateness_ms"]["p50"] < 100.0  # loosely: this machine may be busy
    assert report["engine"]["chunks"] >= 2, "the first plan, and those of the loop"
    loop.close()
    assert not any(thread.name == "inference" for thread in threading.enumerate())
