"""Inference in a process of its own: the same plans to the bit, and whatever happens to it is one clear fault."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planners
import pytest
import torch
from test_engine import until
from test_policy import observations, policy

from robopolicy.deploy.chunk import Previous
from robopolicy.deploy.clock import SystemClock
from robopolicy.deploy.engine import Engine
from robopolicy.deploy.export import export
from robopolicy.deploy.process import ProcessPlanner, open_planner
from robopolicy.errors import CheckpointError, DataError, EvaluationError

NOTHING: dict[str, np.ndarray] = {}


def say(what: str) -> dict[str, np.ndarray]:
    return {"what": np.array(what)}


@pytest.fixture
def told() -> Iterator[ProcessPlanner]:
    planner = ProcessPlanner(planners.Told)
    yield planner
    planner.close()


def alive(pid: int) -> bool:
    """Whether a process that is not our child runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- plans ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: np.random.default_rng(5), lambda: torch.Generator().manual_seed(5)])
def test_noise_is_the_callers(told: ProcessPlanner, make: Any) -> None:
    ours, theirs, here = make(), make(), planners.Told()
    previous = Previous(np.zeros((1, 4, 1), np.float32), np.array([2]))
    for told_of in (None, previous, previous):
        plan = told.plan(NOTHING, told_of, 3, ours)
        assert plan.tolist() == here.plan(NOTHING, told_of, 3, theirs).tolist()
    told.reset()
    assert told.plan(NOTHING, None, 0, ours).ravel()[1:].tolist() == [0, 0, 1]


def test_it_imports_no_more_than_its_planner(told: ProcessPlanner) -> None:
    assert told.rows == 4
    assert told.pid != os.getpid()
    assert told.plan(say("torch"), None, 0, np.random.default_rng(0)).max() == 0, "no use for torch there"


def test_observations_of_any_size_and_order_arrive(told: ProcessPlanner) -> None:
    rng = np.random.default_rng(0)
    for size in (10, 700_000, 3, 3_000_000):  # the memory grows, and what was there before does not shine through
        image = rng.integers(0, 256, (1, 2, size), dtype=np.uint8)
        seen = told.plan({**say("sum"), "image": image[..., ::-1], "x": np.ones((1, 2), np.float32)}, None, 0, rng)
        assert seen[0, 0, 0] == image.sum() + 2
        assert seen[0, 1, 0] == image[0, 0, -1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, ``policy``, and an export of it, ``onnx``."""
    folder, made = tmp_path_factory.mktemp("process"), policy(sampler={"type": "euler", "num_steps": 2})
    made.save(folder / "policy")
    export(made, folder / "onnx", "onnx")
    return folder


@pytest.mark.parametrize("kind", ["policy", "onnx", "openvino", "torchscript"])
def test_a_policy_plans_there_as_here(kind: Any, folder: Path) -> None:
    if not (folder / kind).exists():
        export(policy(sampler={"type": "euler", "num_steps": 2}), folder / kind, kind)
    make = functools.partial(open_planner, folder / kind, "rti" if kind == "policy" else "plain")
    here: Any = make()
    there = ProcessPlanner(make)
    ours: Any = torch.Generator().manual_seed(1) if kind in ("policy", "torchscript") else np.random.default_rng(1)
    theirs = torch.Generator().manual_seed(1) if kind in ("policy", "torchscript") else np.random.default_rng(1)
    try:
        assert there.rows == here.rows
        previous = None
        for seed in range(3):
            obs = observations(1, seed)
            plan, expected = there.plan(obs, previous, 1, ours), here.plan(obs, previous, 1, theirs)
            np.testing.assert_array_equal(plan, expected)
            assert plan.dtype == expected.dtype
            previous = Previous(expected, np.array([len(expected[0]) - 2]))
    finally:
        there.close()


def test_what_cannot_be_opened_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        open_planner(folder / "nowhere")
    with pytest.raises(EvaluationError, match="an export has no planner 'rtc'"):
        open_planner(folder / "onnx", "rtc")
    with pytest.raises(EvaluationError, match="--steps 3"):
        open_planner(folder / "onnx", steps=3)
    planner: Any = open_planner(folder / "policy", steps=3)
    assert planner.policy.sampler.nfe(planner.policy.path) == 3
    with pytest.raises(EvaluationError, match="use a function of a module"):
        ProcessPlanner(lambda: planners.Told())


# ---- faults --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (planners.refuses, DataError, "no such policy; name another"),
        (planners.dies, EvaluationError, "exited with status 7"),
        (planners.hangs, EvaluationError, "gave no answer for 2 s and was killed"),
    ],
)
def test_what_happens_at_the_start_is_said(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ProcessPlanner(make, start_limit=2.0 if make is planners.hangs else 60.0)


def test_an_exception_is_told_and_the_next_plan_comes(told: ProcessPlanner) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(EvaluationError, match=r"inference: ValueError: no weights$") as caught:
        told.plan(say("fail"), None, 0, rng)
    assert "planners.py" in str(caught.value.__cause__), "the traceback comes along"
    with pytest.raises(DataError, match="check that sensor"):
        told.plan(say("refuse"), None, 0, rng)
    assert told.fault is None
    assert told.plan(NOTHING, None, 2, rng)[0, 2, 0] == 2


@pytest.mark.parametrize("what", ["die", "hang"])
def test_death_and_hanging_are_faults_that_stay(what: str) -> None:
    planner, rng = ProcessPlanner(planners.Told, limit=1.0), np.random.default_rng(0)
    planner.plan(NOTHING, None, 0, rng)
    begin = time.monotonic()
    with pytest.raises(EvaluationError, match="exited with status 3" if what == "die" else "no answer for 1 s and was killed"):
        planner.plan(say(what), None, 0, rng)
    assert time.monotonic() - begin < 30
    for again in (lambda: planner.plan(NOTHING, None, 0, rng), planner.reset):
        with pytest.raises(EvaluationError, match="status 3" if what == "die" else "no answer"):
            again()
    until(lambda: not alive(planner.pid))
    planner.close()
    planner.close()


def test_a_stopped_process_is_one_that_hangs() -> None:
    planner, rng = ProcessPlanner(planners.Told, limit=1.0), np.random.default_rng(0)
    planner.plan(NOTHING, None, 0, rng)
    os.kill(planner.pid, signal.SIGSTOP)
    with pytest.raises(EvaluationError, match="gave no answer"):
        planner.plan({"image": np.zeros(5_000_000, np.uint8)}, None, 0, rng)  # more than a pipe holds
    until(lambda: not alive(planner.pid))


def test_the_engine_has_the_fault_before_it_asks_again(told: ProcessPlanner) -> None:
    clock = SystemClock()
    engine = Engine(told, 0.1, clock, torch.Generator().manual_seed(0))
    engine.start({"x": np.zeros((1, 2), np.float32)})
    engine.post({"x": np.zeros((1, 2), np.float32)}, clock.now(), None)
    until(lambda: not engine.busy)
    assert engine.take() is not None
    assert engine.fault is None
    os.kill(told.pid, signal.SIGKILL)
    until(lambda: engine.fault is not None)
    assert "was killed by SIGKILL; if memory ran out" in str(engine.fault)
    engine.reset()
    assert engine.fault is not None, "a new episode does not bring it back"
    engine.close()


# ---- the end -------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_not_for_it(told: ProcessPlanner) -> None:
    rng = np.random.default_rng(0)
    told.plan(NOTHING, None, 0, rng)
    assert os.getsid(told.pid) == told.pid, "Ctrl-C in the terminal does not get there"
    os.kill(told.pid, signal.SIGINT)
    assert told.plan(NOTHING, None, 5, rng)[0, 2, 0] == 5


CALLER = """
import os, sys, numpy as np, planners
from robopolicy.deploy.process import ProcessPlanner
planner = ProcessPlanner(planners.Told)
print(planner.pid, flush=True)
planner.plan({"what": np.array(sys.argv[1])}, None, 0, np.random.default_rng(0))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("what", ["", "hang"])
def test_it_does_not_outlive_its_caller(what: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", CALLER, what], stdout=subprocess.PIPE, env=environment)
    assert caller.stdout is not None
    pid = int(caller.stdout.readline())
    assert alive(pid)
    if what == "hang":
        time.sleep(0.5)  # it may have begun to; either way it must end
        caller.kill()
    assert caller.wait(60) == -signal.SIGKILL
    until(lambda: not alive(pid))
    caller.stdout.close()


def test_closing_ends_it(told: ProcessPlanner) -> None:
    told.close()
    assert not alive(told.pid)
    with pytest.raises(EvaluationError, match="was closed; make a new planner"):
        told.plan(NOTHING, None, 0, np.random.default_rng(0))
