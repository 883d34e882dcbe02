"""VectorEnv: same results however many workers, nothing left behind however it ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from walk import Walk

from robopolicy.errors import TaskError
from robopolicy.task import TaskSpec
from robopolicy.vector import VectorEnv

WALK = "walk:Walk"


def children() -> set[int]:
    """Living child processes of this one."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def footprint() -> tuple[set[int], int]:
    """Child processes and open file descriptors; shared memory is one of these."""
    gc.collect()
    return children(), len(os.listdir("/proc/self/fd"))


def rollout(env: VectorEnv, seeds: list[int], actions: np.ndarray, chunk: int) -> list[np.ndarray]:
    """Everything that comes out of ``actions [N, T, A]`` taken in chunks."""
    out = list(env.reset(seeds).values())
    for start in range(0, actions.shape[1], chunk):
        step = env.step(actions[:, start : start + chunk])
        out += [*step.obs.values(), *step[1:]]
    return out


@pytest.mark.parametrize(("spec", "scale"), [(TaskSpec(WALK), 1.0), (TaskSpec("sim.pusht:PushT"), 512.0)])
def test_results_do_not_depend_on_the_number_of_workers(spec: TaskSpec, scale: float) -> None:
    actions = (np.random.default_rng(0).uniform(-1, 1, (5, 24, 2)) * scale).astype(np.float32)
    results = []
    for workers in (0, 1, 2, 7):
        with VectorEnv(spec, 5, workers) as env:
            rollout(env, [9, 8, 7, 6, 5], -actions, 3)  # what came before must not matter
            results.append(rollout(env, [1, 2, 3, 4, 5], actions, 8))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chunk=st.integers(1, 25), num_envs=st.integers(1, 4), seed=st.integers(0, 1000))
def test_chunked_stepping_is_stepping_one_by_one(chunk: int, num_envs: int, seed: int) -> None:
    actions = np.random.default_rng(seed).uniform(-2, 2, (num_envs, 25, 2)).astype(np.float32)
    with VectorEnv(TaskSpec(WALK), num_envs) as env:
        env.reset([seed + i for i in range(num_envs)])
        chunks = [env.step(actions[:, start : start + chunk]) for start in range(0, 25, chunk)]
    for i in range(num_envs):
        task = Walk()
        task.reset(seed=seed + i)
        ended, row = False, None
        for t in range(25):
            step, k = chunks[t // chunk], t % chunk
            if ended:
                assert step.reward[i, k] == 0
                assert not step.success[i, k]
            else:
                row, reward, terminated, truncated, info = task.step(actions[i, t])
                ended = terminated or truncated
                assert step.reward[i, k] == reward
                assert step.success[i, k] == info["is_success"]
            assert row is not None
            np.testing.assert_array_equal(step.obs["x"][i, k], row["x"])
            np.testing.assert_array_equal(step.obs["image"][i, k], row["image"])
        assert sum(step.length[i] for step in chunks) == task._steps
        assert chunks[-1].terminated[i] or chunks[-1].truncated[i]


def test_returned_arrays_are_not_overwritten_later() -> None:
    with VectorEnv(TaskSpec(WALK), 2) as env:
        first = env.reset([0, 1])
        kept = first["x"].copy()
        step = env.step(np.ones((2, 3, 2)))
        kept_rows = step.obs["x"].copy()
        env.step(np.ones((2, 3, 2)))
        np.testing.assert_array_equal(first["x"], kept)
        np.testing.assert_array_equal(step.obs["x"], kept_rows)


def test_no_seed_and_inactive_leave_an_environment_alone() -> None:
    with VectorEnv(TaskSpec(WALK), 3) as env:
        env.reset([0, 1, 2])
        step = env.step(np.full((3, 4, 2), 0.1), active=np.array([True, False, True]))
        assert step.length.tolist() == [4, 0, 4]
        again = env.reset([None, None, 2])
        np.testing.assert_array_equal(again["x"][0], step.obs["x"][0, -1])
        alone = Walk()
        alone.reset(seed=1)
        np.testing.assert_array_equal(again["x"][1], alone._observe()["x"])


def test_a_longer_chunk_keeps_what_happened_before_it() -> None:
    with VectorEnv(TaskSpec(WALK), 1, 1) as env:
        env.reset([0])
        assert env.step(np.full((1, 1, 2), 9.0)).terminated[0]
        later = env.step(np.ones((1, 40, 2)))
        assert later.terminated[0]
        assert later.length[0] == 0
        np.testing.assert_array_equal(later.obs["x"][0], np.repeat(env.reset([None])["x"], 40, axis=0))


def test_frames_come_in_the_order_asked() -> None:
    with VectorEnv(TaskSpec(WALK), 3, 2) as env:
        env.reset([0, 1, 2])
        env.step(np.zeros((3, 2, 2)), active=np.array([False, True, True]))
        env.step(np.zeros((3, 1, 2)), active=np.array([False, False, True]))
        assert [frame[0, 0, 0] for frame in env.render([2, 0, 1])] == [3, 0, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda env: env.reset([1, 2]), "2 seeds for 3 environments"),
        (lambda env: env.step(np.zeros((3, 2, 5))), r"expected \(3, T >= 1, 2\)"),
        (lambda env: env.step(np.zeros((3, 0, 2))), r"expected \(3, T >= 1, 2\)"),
        (lambda env: env.step(np.zeros((3, 2))), r"expected \(3, T >= 1, 2\)"),
        (lambda env: env.step(np.zeros((3, 2, 2)), active=np.ones(2)), r"expected \(3,\)"),
        (lambda env: env.step(np.zeros((3, 2, 2))), "environment 2 was never reset"),
        (lambda env: env.step(np.full((3, 2, 2), np.nan), active=np.array([False, True, False])), "environment 1 are not finite"),
    ],
)
def test_wrong_calls_are_explained_and_harmless(call: Any, message: str) -> None:
    with VectorEnv(TaskSpec(WALK), 3) as env:
        env.reset([0, 1, None])
        with pytest.raises(TaskError, match=message):
            call(env)
        assert env.step(np.zeros((3, 2, 2)), active=np.array([True, True, False])).length.tolist() == [2, 2, 0]


@pytest.mark.parametrize(("num_envs", "workers"), [(0, 0), (2, -1)])
def test_impossible_sizes_are_refused(num_envs: int, workers: int) -> None:
    with pytest.raises(TaskError, match="need at least"):
        VectorEnv(TaskSpec(WALK), num_envs, workers)


def test_a_task_that_breaks_its_declaration_is_named() -> None:
    with (
        VectorEnv(TaskSpec(WALK, {"width": 3}), 1) as env,
        pytest.raises(TaskError, match=r"\(3,\) for observation 'x', declared \(2,\)"),
    ):
        env.reset([0])


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("build", "^walk: the floor is missing; put one in$"),
        ("mendable", "^walk: tripped; tie the shoes$"),
        ("step", r"^worker 0 \(environments 0..1\): ZeroDivisionError: the step after the last$"),
        ("die", r"^worker 0 \(environments 0..1\), process \d+, exited with status 7; its output says why$"),
    ],
)
def test_a_failing_worker_is_reported_in_one_line_and_leaves_nothing(fail: str, message: str) -> None:
    before = footprint()

    def use() -> None:
        with VectorEnv(TaskSpec(WALK, {"fail": fail}), 4, 2) as env:
            env.reset([0, 1, 2, 3])
            env.step(np.zeros((4, 5, 2)))

    with pytest.raises(TaskError, match=message) as caught:
        use()
    if fail != "die":
        assert "walk.py" in str(caught.value.__cause__)  # the worker's traceback, for --debug
    del caught  # its frames hold the environment
    assert footprint() == before


def test_a_killed_worker_is_named_and_the_rest_ends_too() -> None:
    before = footprint()
    env = VectorEnv(TaskSpec(WALK), 4, 2)
    env.reset([0, 1, 2, 3])
    os.kill(env._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(TaskError, match=r"worker 1 \(environments 2..3\), process \d+, was killed by SIGKILL; if memory ran out"):
        env.step(np.zeros((4, 5, 2)))
    with pytest.raises(TaskError, match="closed"):
        env.reset([0, 1, 2, 3])
    del env
    assert footprint() == before


def test_nothing_is_left_when_an_environment_is_forgotten() -> None:
    before = footprint()
    env = VectorEnv(TaskSpec(WALK), 2, 2)
    env.reset([0, 1])
    del env
    assert footprint() == before


def test_in_this_process_errors_keep_their_type() -> None:
    with VectorEnv(TaskSpec(WALK, {"fail": "step"}), 3) as env:
        env.reset([0, 1, 2])
        with pytest.raises(ZeroDivisionError):
            env.step(np.zeros((3, 5, 2)))


def test_a_task_in_main_is_refused_by_workers() -> None:
    with pytest.raises(TaskError, match="move its class into a module"):
        VectorEnv(TaskSpec("__main__:Walk"), 1, 1)


def run_script(body: str) -> subprocess.Popen[str]:
    """A separate program that has VectorEnv, numpy and Walk, in a process group of its own."""
    script = f"import os, sys, numpy as np\nfrom robopolicy.task import TaskSpec\nfrom robopolicy.vector import VectorEnv\n{body}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_program_even_in_the_middle_of_a_step(how: signal.Signals) -> None:
    body = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
env = VectorEnv(TaskSpec({WALK!r}, {{"fail": "hang"}} if {how == signal.SIGINT} else {{}}), 2, 2)
env.reset([0, 1])
print(*[w.process.pid for w in env._workers], flush=True)
if {how == signal.SIGINT}:
    env.step(np.zeros((2, 5, 2)))
sys.stdin.read()
"""
    with run_script(body.replace("sys.stdin.read()", "import time; time.sleep(600)")) as program:
        assert program.stdout is not None
        pids = [int(pid) for pid in program.stdout.readline().split()]
        time.sleep(0.2)
        os.killpg(program.pid, how)
        try:
            program.wait(timeout=60)
        finally:
            program.kill()  # leaving the block waits for it without end
        errors = program.stderr.read() if program.stderr is not None else ""
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert errors.count("Traceback") == (1 if how == signal.SIGINT else 0), errors  # the program's own KeyboardInterrupt
    assert "leak" not in errors


def test_workers_import_neither_torch_nor_the_callers_main_module() -> None:
    body = """
print("main")
import torch
env = VectorEnv(TaskSpec("walk:ModuleSpy"), 1, 1)
print(env.reset([0])["x"].tolist())
env.close()
"""
    with run_script(body) as program:
        out, errors = program.communicate(timeout=60)
    assert out.split("\n")[:2] == ["main", "[[0.0, 1.0]]"], (out, errors)
