"""Defects that a review of the control path found; each test here failed before its mend."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from robots import Planned
from test_control import Cell
from test_engine import OBS, ROW, until

from robopolicy.deploy.clock import FakeClock, quiet
from robopolicy.deploy.control import ControlConfig, ControlLoop
from robopolicy.deploy.engine import Engine, EngineConfig, InlineEngine
from robopolicy.deploy.executor import make_executor
from robopolicy.deploy.safety import SafetyFilter
from sim.arm.robot import ArmModel


def test_warming_up_meets_what_the_loop_will_ask() -> None:
    """Guidance towards a plan in progress costs more than a plan alone; its first time must not be in the loop."""
    planner = Planned()
    engine = Engine(planner, ROW, FakeClock(), torch.Generator())
    engine.start(OBS)
    told = [previous for _, previous, _ in planner.asked]
    assert told[0] is None
    assert all(previous is not None and previous.known[0] == planner.rows for previous in told[1:])
    assert len(told) >= 2
    engine.close()


WITHOUT_TORCH = """
import sys, numpy as np, planners
sys.modules["torch"] = None  # importing it raises
from robopolicy.deploy.chunk import Chunk
from robopolicy.deploy.clock import FakeClock
from robopolicy.deploy.engine import InlineEngine
from robopolicy.deploy.exported import ExportedPlanner
from robopolicy.deploy.process import ProcessPlanner
engine = InlineEngine(planners.Told(), 0.1, FakeClock(), np.random.default_rng(0))
engine.post({"x": np.zeros((1, 1))}, 0.0, None)
first = engine.take()
engine.post({"x": np.zeros((1, 1))}, 0.0, first)
print(int(engine.take().actions[1, 0]), engine.fault)
"""


def test_plans_follow_each_other_where_there_is_no_torch() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], env=environment, capture_output=True, text=True, timeout=120)
    assert found.stdout == "4 None\n", found.stderr


def test_a_slower_loop_takes_its_chunks_later_and_that_is_not_late() -> None:
    cell = Cell()
    assert cell.engine.margin == cell.engine.config.margin == cell.loop.dt
    limits = cell.safety.limits.model_copy(update={"rate": 50.0})
    engine = InlineEngine(cell.planner, ROW, cell.clock, torch.Generator(), delay=0.06)
    loop = ControlLoop(cell.robot, engine, make_executor("latest"), SafetyFilter(limits), cell.clock)
    assert engine.margin == pytest.approx(0.02)
    assert loop.reset() == ()
    loop.run(2.0)
    assert engine.counters["chunks"] >= 4
    assert engine.counters["late"] == 0


def test_what_is_on_its_way_from_before_a_reset_keeps_nobody_busy() -> None:
    planner = Planned()
    engine = Engine(planner, ROW, FakeClock(100.0), torch.Generator())
    engine.start(OBS)
    planner.begun.clear()
    planner.gate.clear()
    engine.post(OBS, 100.0, None)
    assert planner.begun.wait(20)
    engine.reset()
    assert not engine.busy, "the new episode has asked for nothing yet"
    engine.post(OBS, 100.0, None)
    planner.gate.set()
    until(lambda: not engine.busy)
    chunk = engine.take()
    assert chunk is not None
    assert engine.counters["stale"] == 0
    engine.close()


def test_a_starved_robot_asks_at_once() -> None:
    """A plan that came too late must not cost the rows that were meant to be carried out of it."""
    cell = Cell()
    limits = cell.safety.limits.model_copy(update={"freshness": cell.safety.limits.freshness.model_copy(update={"command": 9.0})})
    config = EngineConfig(late="discard")
    engine = InlineEngine(cell.planner, ROW, cell.clock, torch.Generator(), config, delay=0.02)
    loop = ControlLoop(
        cell.robot, engine, make_executor("latest"), SafetyFilter(limits), cell.clock, ControlConfig(replan=12)
    )  # fmt: skip
    assert loop.reset() == ()
    loop.run(0.5)
    engine._pretended = 0.12  # of the plan that is asked for at row 12 of 16
    loop.run(0.4)
    assert engine.counters["discarded"] == 1
    engine._pretended = 0.02
    loop.run(1.0)
    assert 0 < loop.starved < 4 * ROW / loop.dt, "asked in the next row, not 8 rows later"


def test_a_closed_loop_can_be_used_again() -> None:
    cell = Cell(threaded=True)
    cell.loop.close()
    assert cell.loop.reset() == ()
    cell.loop.run(0.1)
    cell.loop.close()
    assert len(cell.rows()) >= 25


def test_one_action_that_is_no_number_does_not_spoil_those_after_it() -> None:
    model = ArmModel("lift")
    start = np.append(model._wanted, 0.04)
    model.reset(start)
    action = model.action_of(start)
    expected = model.targets(action)
    assert np.isfinite(expected).all()
    broken = action.copy()
    broken[0] = np.nan
    model.targets(broken)
    np.testing.assert_allclose(model.targets(action), expected, atol=1e-6)


def test_priorities_are_noted_where_a_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sched_setscheduler", "sched_getaffinity", "sched_setaffinity", "sched_getscheduler"):
        monkeypatch.delattr(os, name, raising=False)
    notes: list[str] = []
    with quiet(50, 0, notes):
        pass
    assert notes == ["priority and processor of control cannot be set on this system"]
    with quiet(None, None, notes):
        pass
    assert len(notes) == 1


def test_jumps_between_plans_are_those_of_all_episodes() -> None:
    cell = Cell()
    for episode in range(2):
        cell.planner.value = np.array((0.1, 0.0), np.float32)
        assert cell.loop.reset() == ()
        cell.loop.run(0.2)
        cell.planner.value = np.array((0.1 + 0.1 * (1 - episode), 0.0), np.float32)  # the first episode's plans jump, by .1
        cell.loop.run(1.0)
    assert cell.loop.report()["boundary_jump"]["max"] == pytest.approx(0.1, abs=1e-6)
    assert cell.loop.report()["boundary_jump"] == cell.loop.report()["boundary_jump"]
