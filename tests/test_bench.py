"""Latency: the arithmetic on samples, what is measured, and the verb."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import pose_policy
from test_policy import OBSERVATIONS, observations, policy

from robopolicy import cli
from robopolicy.bench import loop
from robopolicy.bench.latency import measure, stages
from robopolicy.bench.machine import busy, machine
from robopolicy.bench.samples import histogram, summarize
from robopolicy.compose.policy import compose
from robopolicy.deploy.clock import Clock
from robopolicy.deploy.export import export
from robopolicy.deploy.interpolate import InterpolationConfig, RotationColumns
from robopolicy.deploy.planner import make_planner
from robopolicy.deploy.safety import Stamp
from robopolicy.errors import EvaluationError
from robopolicy.features import Feature
from robopolicy.robot import Sample, State
from robopolicy.task import TaskSpec

SETTINGS: dict[str, Any] = {"sampler": {"type": "euler", "num_steps": 2}, "n_action_steps": 4}


def test_percentiles_are_observed_values() -> None:
    found = summarize(np.random.default_rng(0).permutation(np.arange(1.0, 1001.0)))
    assert found.percentiles == {"p50": 500.0, "p95": 950.0, "p99": 990.0, "p99.9": 999.0}
    assert (found.n, found.mean, found.max) == (1000, 500.5, 1000.0)
    assert set(summarize(np.array([3.0])).percentiles.values()) == {3.0}


def test_a_rare_outlier_shows_in_the_tail_and_not_in_the_median() -> None:
    values = np.ones(1000)
    values[::500] = 50.0
    found = summarize(values)
    assert found.percentiles["p99"] == 1.0
    assert found.percentiles["p99.9"] == found.max == 50.0


def test_a_histogram_counts_every_value_once() -> None:
    values = np.random.default_rng(1).lognormal(size=500)
    found = histogram(values)
    assert found.counts.sum() == 500
    assert np.allclose(np.diff(np.log(found.edges)), np.log(found.edges[1] / found.edges[0]))
    assert histogram(np.full(7, 2.0)).counts.sum() == 7


def slow(seconds: float) -> Any:
    def stage(state: Any) -> Any:
        time.sleep(seconds)
        return state

    return stage


def test_parts_add_up_to_the_whole_and_waiting_is_no_work() -> None:
    way = [("quick", lambda state: state), ("slow", slow(0.004))]
    found = measure({"a": (way, {}), "b": (way[:1], {})}, calls=60, warmups=1)
    assert all(len(samples["whole"]) == 60 for samples in found.values())
    np.testing.assert_allclose(found["a"]["whole"], found["a"]["quick"] + found["a"]["slow"], rtol=1e-9)
    assert found["a"]["slow"].min() >= 0.004
    assert np.median(found["a"]["cpu"]) < 0.002
    assert np.median(found["b"]["whole"]) < 0.001


def test_calls_at_a_rate_are_not_faster_than_it() -> None:
    begun = time.perf_counter()
    measure({"a": ([("quick", lambda state: state)], {})}, calls=20, warmups=0, period=0.005)
    assert time.perf_counter() - begun >= 0.1


def test_stages_are_the_policy(tmp_path: Path) -> None:
    made, obs = policy(**SETTINGS), observations(1)

    def passed(actor: Any) -> Any:
        state: Any = obs
        with torch.no_grad():
            for _, stage in stages(actor, seed=3):
                state = stage(state)
        return state

    for actor in (export(made, tmp_path / "few", "onnx"), export(policy(), tmp_path / "many", "onnx")):
        np.testing.assert_array_equal(passed(actor), actor.act(obs, np.random.default_rng(3)))
    np.testing.assert_array_equal(passed(made), made.act(obs, torch.Generator().manual_seed(3)))


def test_the_state_of_the_machine_is_recorded() -> None:
    found = machine()
    assert found["kernel"] == os.uname().release
    assert found["affinity"] == sorted(os.sched_getaffinity(0))
    assert {"load", "cpu", "governor", "scheduler", "git", "preemption"} <= set(found)


def test_load_is_real_and_ends() -> None:
    with busy(1):
        time.sleep(0.5)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        ticks = [Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11] for child in children]
        assert max(map(int, ticks)) > 0
    assert not [c for c in children if Path(f"/proc/{c}").exists()]


def test_the_verb_measures_checkpoints_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = policy(**SETTINGS).save(tmp_path / "policy")
    out = tmp_path / "bench"
    arguments = ["bench", "latency", str(checkpoint), "--backend", "torch", "onnx", "--steps", "1", "2", "--calls", "20"]
    assert cli.main([*arguments, "--out", str(out), "--load", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("p99.9", "torch, 1 network call ", "onnx, 2 network calls", "decode", "load", "eval --delay TICKS")
    )
    document = json.loads((out / "latency.json").read_text())
    assert len(document["milliseconds"]) == 4
    row = document["milliseconds"]["onnx, 1 network call"]["whole"]
    assert row["n"] == 20
    assert 0 < row["p50"] <= row["p95"] <= row["p99.9"] <= row["max"]
    assert document["settings"]["busy processes"] == 1
    assert document["runtimes"]["onnxruntime"]
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in (out / "report.html").read_text()

    exported = export(policy(**SETTINGS), tmp_path / "export", "onnx")
    assert cli.main(["bench", "latency", str(exported.folder), "--calls", "5", "--batch", "2"]) == 0
    assert (exported.folder / "bench" / "latency" / "latency.json").exists()
    assert cli.main(["eval", str(exported.folder), "--task", "x:y"]) == 2  # still an export: what is beside it does no harm
    assert "cannot be imported" in capsys.readouterr().err
    assert cli.main(["bench", "latency", str(exported.folder), "--steps", "3"]) == 2
    assert "name the checkpoint" in capsys.readouterr().err


class Still:
    """A robot that stands, and sees what the toy policy sees; the policy's rows last half a second, so that none is late."""

    observation_features = OBSERVATIONS
    action_feature = Feature("action", (2,), unit="m", names=("x", "y"), rate=2.0)
    names = ("x", "y")
    kinematics = None

    def __init__(self, task: str, clock: Clock, **arguments: Any) -> None:
        self.clock = clock

    def reset(self, seed: int | None = None) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def command(self, positions: np.ndarray) -> None: ...

    def state(self) -> State:
        return State(np.zeros(2), Stamp(self.clock.now(), self.clock.now()))

    def observe(self) -> Sample:
        return Sample({name: value[0, 0] for name, value in observations(1).items()}, self.clock.now(), {})

    def targets(self, action: np.ndarray) -> np.ndarray:
        return 1e-3 * np.tanh(action)


def test_the_verb_measures_the_control_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coordinate = {"unit": "m", "lower": -1.0, "upper": 1.0, "velocity": 2.0, "acceleration": 10.0, "jerk": 200.0}
    limits = tmp_path / "limits.yaml"
    coordinates = [{"name": name, **coordinate} for name in Still.names]
    limits.write_text(json.dumps({"coordinates": coordinates, "freshness": {"command": 10.0}}))  # rows of half a second
    checkpoint = policy(**SETTINGS).save(tmp_path / "policy", {"task": {"name": "toys:Dot", "args": {}}})
    folder = export(policy(**SETTINGS), tmp_path / "export", "onnx").folder
    options = ["--robot", "test_bench:Still", "--limits", str(limits), "--rate", "50", "--seconds", "0.5", "--task", "toys:Dot"]
    for actor, more in ((checkpoint, []), (folder, []), (folder, ["--process"])):
        assert cli.main(["bench", "loop", str(actor), *options, *more, "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr().out
        assert all(
            word in printed
            for word in ("lateness", "age", "inference", "missed", "starved", "jump", "jerk         RMS", "safety  ", "running")
        )
        document = json.loads((tmp_path / "out" / "loop.json").read_text())
        report = document["report"]
        assert document["settings"]["inference"] == ("process" if more else "thread")
        assert 0 < report["ticks"] <= 26
        assert report["lateness_ms"]["p50"] >= 0
        assert report["age_ms"]["max"] > 0
        assert set(report["jerk_rms"]) == {"x", "y"}
        assert (tmp_path / "out" / "loop.png").exists()
    assert cli.main(["bench", "loop", str(folder), *options, "--seconds", "0.02"]) == 2
    assert "1 periods are too few to measure; give more --seconds" in capsys.readouterr().err
    assert cli.main(["bench", "loop", str(folder), *options, "--planner", "rtc"]) == 2
    assert "an export has no planner 'rtc'" in capsys.readouterr().err
    settings = ["--planner", "{type: rti, t_start: 0.8}", "--executor", "{type: ensemble, m: 0.1}"]
    assert cli.main(["bench", "loop", str(checkpoint), *options, *settings, "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / "loop.json").read_text())
    assert document["settings"]["planner"] == {"type": "rti", "t_start": 0.8}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--planner", "nope"], "unknown planner 'nope'"),
        (["--planner", "{type: rti, t_strat: 0.8}"], "did you mean 't_start'"),
        (["--executor", "nope"], "unknown executor 'nope'"),
        (["--limits", "nope"], "no preset of safety limits 'nope'"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(option: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "loop", "no/such/policy", *option]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["latency", "loop"])
@pytest.mark.parametrize("option", ["--seconds", "--rate", "--load"])
@pytest.mark.parametrize("value", ["-3", "nan", "inf", "0"])
def test_numbers_that_measure_nothing_are_refused(kind: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    if (option, value) == ("--load", "0"):
        return
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", kind, "no/such/policy", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_network_calls_are_those_of_all_parents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = compose([compose([policy(**SETTINGS), policy(**SETTINGS)]), policy(**SETTINGS)])
    calls = 3 * made.sampler.nfe(made.path)
    assert cli.main(["bench", "latency", str(made.save(tmp_path / "made")), "--backend", "torch", "onnx", "--calls", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"torch, {calls} network calls" in printed
    assert f"onnx, {calls} network calls" in printed
    assert export(made, tmp_path / "export", "onnx").manifest.nfe == made.nfe == calls
    planner = make_planner("plain", made)
    planner.plan(observations(1), None, 0, torch.Generator().manual_seed(0))
    assert planner.calls == calls


def test_a_policy_that_answers_nan_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = policy(**SETTINGS)
    torch.nn.init.constant_(next(made.net.parameters()), torch.nan)
    assert cli.main(["bench", "latency", str(made.save(tmp_path / "made")), "--calls", "5"]) == 2
    assert "NaN or infinity" in capsys.readouterr().err


def test_workers_that_are_no_number_are_told_in_plain_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "no/such/policy", "--workers", "abc"])
    assert "--workers: 'abc' is not a whole number" in capsys.readouterr().err


def test_steps_that_a_head_never_learnt_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provenance = {"teacher": "x", "method": {"type": "same_noise"}, "task": {"name": "toys:Dot", "args": {}}}
    head = policy(**{**SETTINGS, "sampler": {"type": "euler", "num_steps": 1}}).save(tmp_path / "head", provenance)
    assert cli.main(["bench", "latency", str(head), "--steps", "1", "2", "--calls", "5"]) == 2
    assert "its network knows t = 1, and this sampler asks it at 0.5" in capsys.readouterr().err


class Handed(Still):
    """A robot whose actions are poses."""

    action_feature = Feature("action", (10,), names=(*(f"x{i}" for i in range(9)), "gripper"), rate=20.0)


def test_rotations_of_checkpoints_and_exports_are_interpolated_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def built(*arguments: Any) -> None:
        seen.append(arguments[6])
        raise EvaluationError("far enough")

    monkeypatch.setattr(loop, "ControlLoop", built)
    monkeypatch.setattr(loop, "SafetyFilter", lambda *_: None)  # no limits for this hand
    monkeypatch.setattr(Handed, "observation_features", (made := pose_policy()).observation_features)
    for actor in (made, export(made, tmp_path / "export", "onnx")):
        with pytest.raises(EvaluationError, match="far enough"):
            loop.run_loop(actor, TaskSpec("toys:Dot"), robot="test_bench:Handed")
    rotation = RotationColumns(start=3, representation="rot6d")
    assert seen == 2 * [InterpolationConfig(steps=(9,), rotations=(rotation,))]
