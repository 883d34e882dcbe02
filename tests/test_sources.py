"""Sources by themselves: what a policy and the way home want, period by period."""

from typing import Any

import numpy as np
import pytest
import torch
from robots import RATE, Planned, Point

from robopolicy.deploy.clock import FakeClock, Tick
from robopolicy.deploy.engine import InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.home import HomeSource
from robopolicy.deploy.limits import SafetyLimits
from robopolicy.deploy.safety import Stamp
from robopolicy.deploy.sources import ControlConfig, Idle, PolicySource, Seats, Target
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.robot import Sample, State

HZ = 100
AXIS = {"unit": "m", "lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0}
LIMITS = SafetyLimits.model_validate({"rate": HZ, "coordinates": [{"name": name, **AXIS} for name in "ab"]})
SPEED = 0.2 * 0.5 * 2.0  # ramp, scale, velocity


def state(*positions: float) -> State:
    return State(np.array(positions), Stamp(0.0))


def tick(k: int) -> Tick:
    return Tick(k, k / HZ, k / HZ, 0)


def test_nobody_wants_nothing() -> None:
    idle = Idle()
    assert idle.begin(0.0, state(0.0, 0.0)) == ()
    assert idle.ready(0.0)
    assert idle.target(tick(0), state(0.0, 0.0)) == Target()


# ---- home --------------------------------------------------------------------------------------------------------------------


def go_home(home: HomeSource, at: tuple[float, float], follows: Any, seconds: float = 30.0) -> tuple[list[Target], Target]:
    """All targets, and the last, for an arm whose position after each period is ``follows(position, target)``."""
    here, seen = np.array(at), []
    assert home.begin(0.0, State(here, Stamp(0.0))) == ()
    for k in range(round(seconds * HZ)):
        target = home.target(tick(k), State(here, Stamp(k / HZ)))
        seen.append(target)
        if target.over is not None:
            break
        here = np.asarray(follows(here, target.positions))
    return seen, seen[-1]


def test_the_way_home_is_straight_slow_and_ends_at_rest() -> None:
    home = HomeSource(np.array([0.4, -0.2]), LIMITS)
    seen, last = go_home(home, (-0.4, 0.2), lambda here, wanted: wanted)
    way = np.array([target.positions for target in seen])
    assert str(last.over) == "home reached"
    assert way[-1] == pytest.approx([0.4, -0.2])
    steps = np.diff(way, axis=0)
    assert np.abs(steps).max() * HZ == pytest.approx(SPEED, rel=1e-2), "the ramp's speed, at the fastest"
    assert steps[:, 1] == pytest.approx(-0.5 * steps[:, 0]), "straight"
    assert np.abs(steps[0]).max() * HZ < 0.05 * SPEED, "from rest"
    moving = [t for t in seen if t.velocity is not None]
    assert len(moving) == pytest.approx(1.5 * 0.8 / SPEED * HZ, abs=2)
    speeds = np.array([t.velocity for t in moving])
    assert speeds[1:-1] == pytest.approx((steps[1 : len(moving) - 1] + steps[: len(moving) - 2]) * HZ / 2, abs=1e-3)
    assert len(seen) - len(moving) == pytest.approx(0.3 * HZ, abs=2), "it stands there for a moment"
    assert not home.report()


def test_at_home_there_is_no_way_to_go() -> None:
    seen, last = go_home(HomeSource(np.array([0.4, -0.2]), LIMITS), (0.4, -0.2), lambda here, wanted: wanted)
    assert str(last.over) == "home reached"
    assert len(seen) < HZ


def test_the_target_waits_for_an_arm_that_lags_and_goes_on_with_it() -> None:
    stuck = iter(range(10_000))

    def follows(here: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return here if 150 < next(stuck) < 280 else wanted

    seen, last = go_home(HomeSource(np.array([0.4, 0.0]), LIMITS), (-0.4, 0.0), follows)
    assert str(last.over) == "home reached"
    way = np.array([target.positions for target in seen])[:, 0]
    assert way[280] - way[150] <= 0.5 * SPEED + 0.01, "it leads by half a second of way, no more"
    assert np.diff(way).min() >= -1e-12


@pytest.mark.parametrize(("until", "said"), [(0.0, "home_lag"), (0.35, "home_missed a: 0.05, limit 0.02")])
def test_an_arm_that_does_not_come_is_given_up(until: float, said: str) -> None:
    seen, last = go_home(
        HomeSource(np.array([0.4, 0.0]), LIMITS), (0.0, 0.0), lambda here, wanted: np.minimum(wanted, [until, 1.0])
    )
    assert str(last.over).startswith(said)
    assert len(seen) < 10 * HZ


def test_a_gripper_that_holds_something_is_not_waited_for() -> None:
    blocked = LIMITS.model_copy(
        update={"coordinates": (LIMITS.coordinates[0], LIMITS.coordinates[1].model_copy(update={"tracking": None}))}
    )
    follows = lambda here, wanted: np.maximum(wanted, [-1.0, 0.3])  # noqa: E731
    _, last = go_home(HomeSource(np.array([0.4, 0.0]), blocked), (-0.4, 0.5), follows)
    assert str(last.over) == "home reached"
    _, last = go_home(HomeSource(np.array([0.4, 0.0]), LIMITS), (-0.4, 0.5), follows)
    assert "home_lag" in str(last.over)


def test_an_arm_that_passes_home_has_not_arrived() -> None:
    home = HomeSource(np.array([0.0, 0.0]), LIMITS)
    assert home.begin(0.0, state(0.0, 0.0)) == ()
    swing = [home.target(tick(k), state(0.1 * np.sin(k / 5), 0.0)) for k in range(150)]
    assert all(target.over is None for target in swing)


def test_a_home_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"home: b 0\.97 is outside"):
        HomeSource(np.array([0.0, 0.97]), LIMITS)
    with pytest.raises(ConfigError, match="home has 3 positions; give one for each of a, b"):
        HomeSource(np.zeros(3), LIMITS)
    with pytest.raises(ConfigError, match="home: a nan"):
        HomeSource(np.array([np.nan, 0.0]), LIMITS)
    for bad in (state(np.nan, 0.0), state(0.0)):
        assert [r.kind for r in HomeSource(np.zeros(2), LIMITS).begin(0.0, bad)] == ["state_not_finite"]


# ---- policy ------------------------------------------------------------------------------------------------------------------


class Seated(Point):
    """Remembers where episodes began, and what was observed with a camera."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.begun: list[np.ndarray] = []
        self.observed = 0

    def seat(self, positions: np.ndarray) -> None:
        self.begun.append(positions)

    def observe(self) -> Sample:
        self.observed += 1
        return Sample({"pos": np.full(2, self.observed, np.float32)}, self._clock.now(), {"camera": Stamp(self._clock.now())})


class Cell:
    def __init__(self, delay: float = 0.02, **config: Any) -> None:
        self.clock, self.planner = FakeClock(5.0), Planned()
        self.robot = Seated(self.clock)
        self.engine = InlineEngine(self.planner, 1 / RATE, self.clock, torch.Generator(), delay=delay)
        executor = make_executor("latest")
        self.source = PolicySource(self.robot, self.engine, executor, LIMITS, ControlConfig(**config))
        self.source.prepare()

    def begin(self) -> None:
        assert self.source.begin(self.clock.now(), self.robot.state()) == ()
        while not self.source.ready(self.clock.now()):
            self.clock.time += 1 / HZ

    def target(self) -> Target:
        self.clock.time += 1 / HZ
        return self.source.target(Tick(0, self.clock.time, self.clock.time, 0), self.robot.state())


def test_an_episode_begins_where_the_robot_is_and_with_what_it_sees_then() -> None:
    cell = Cell()
    assert isinstance(cell.robot, Seats)
    cell.robot.at[:] = 0.3, 0.1
    cell.robot.observed = 7
    cell.begin()
    assert cell.robot.begun == [pytest.approx([0.3, 0.1])]
    obs, previous, _ = cell.planner.asked[-1]
    assert obs["pos"].tolist() == [[[8.0, 8.0], [8.0, 8.0]]], "the history is filled with the first"
    assert previous is None
    for _ in range(60):
        cell.target()
    obs, previous, _ = cell.planner.asked[-1]
    assert (np.diff(obs["pos"][0, :, 0]) == 1.0).all(), "the last two"
    assert previous is not None


def test_the_first_plan_counts_from_when_it_is_there() -> None:
    cell = Cell(delay=0.6)  # longer than half of the plan
    cell.begin()
    begun = cell.clock.now()
    assert cell.source.ready(begun), "and stays"
    targets = [cell.target() for _ in range(30)]
    assert [t.age for t in targets] == pytest.approx([k / HZ for k in range(1, 31)])
    assert not any(t.starved for t in targets)
    assert all(t.positions == pytest.approx([0.1, 0.0], abs=1e-7) for t in targets)
    assert targets[0].stamps is not None
    assert targets[0].stamps["camera"].came <= begun


def test_nothing_of_the_last_episode_is_carried_into_the_next() -> None:
    cell = Cell(delay=0.1, max_starved=1000)
    cell.begin()
    for _ in range(45):
        cell.target()
    cell.source.end()
    cell.planner.value = np.array([-0.5, 0.0], np.float32)
    cell.engine._pretended = 0.9  # so that only what was asked for before could come
    assert cell.source.begin(cell.clock.now(), cell.robot.state()) == ()
    for _ in range(50):
        cell.clock.time += 1 / HZ
        assert not cell.source.ready(cell.clock.now())
    cell.clock.time += 0.45
    assert cell.source.ready(cell.clock.now())
    assert cell.target().positions == pytest.approx([-0.5, 0.0])
    assert cell.source.starved == 0


def test_without_a_plan_it_says_so_and_in_the_end_that_it_is_over() -> None:
    cell = Cell(max_starved=20)
    cell.begin()
    cell.engine._pretended = 100.0
    targets = [cell.target() for _ in range(16 * HZ // round(RATE) + 25)]
    starved = [t.starved for t in targets]
    assert starved.index(True) == pytest.approx(16 * HZ / RATE, abs=1)
    assert str(next(t.over for t in targets if t.over is not None)) == "watchdog no plan for 20 periods"
    assert targets[starved.index(True)].positions is not None, "the last action is held"
    assert cell.source.report()["starved"] >= 20


def test_the_report_has_the_latency_of_the_last_plans_only() -> None:
    cell = Cell()
    cell.begin()
    for _ in range(300):
        cell.engine.latency.add(0.5)
    assert cell.source.report()["inference_ms"]["p50"] == pytest.approx(500.0)
    assert cell.source.report()["inference_ms"]["p50"] == cell.source.report()["inference_ms"]["max"]


def test_a_planner_that_is_dead_is_a_refusal() -> None:
    cell = Cell()
    cell.planner.fault = RuntimeError("killed by signal 9")  # type: ignore[attr-defined]  # as of a ProcessPlanner
    asked = len(cell.planner.asked)
    assert [str(r) for r in cell.source.begin(0.0, cell.robot.state())] == ["inference killed by signal 9"]
    assert len(cell.planner.asked) == asked


def test_an_action_without_a_rate_is_refused() -> None:
    robot = Point(FakeClock())
    robot.action_feature = Feature("action", (2,), "float32", "m", ("a", "b"))
    engine = InlineEngine(Planned(), 1 / RATE, FakeClock(), torch.Generator())
    with pytest.raises(ConfigError, match="action 'action' has no rate"):
        PolicySource(robot, engine, make_executor("latest"), LIMITS)
