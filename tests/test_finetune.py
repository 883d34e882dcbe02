"""Fine-tuning runs: resumed to the bit, stopped by signals and by collapse, and what they leave behind can be used."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toys import Dot

from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.errors import CheckpointError, ConfigError, RobopolicyError
from robopolicy.evaluate.run import SEEDS, evaluate
from robopolicy.policy import Policy, PolicyConfig, load_policy, read_provenance
from robopolicy.rl import finetune
from robopolicy.rl.config import FinetuneConfig
from robopolicy.rl.envs import Ended
from robopolicy.rl.finetune import COLLAPSED, Finetuner, scores
from robopolicy.task import TaskSpec
from robopolicy.train.checkpoint import read_tensors
from robopolicy.train.metrics import read_metrics

POLICY: dict[str, Any] = {
    "n_obs_steps": 2,
    "horizon": 4,
    "n_action_steps": 2,
    "net": {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8},
    "sampler": {"type": "euler", "num_steps": 4},
    "default_normalize": "identity",
}
DPPO = {"type": "dppo", "num_steps": 4, "tuned_steps": 2, "clip": 0.1}


def base(folder: Path, **changes: Any) -> Path:
    features = {"x": Dot.observation_features["x"]}
    torch.manual_seed(0)
    normalizers = {"x": Normalizer(2, "identity"), "action": Normalizer(2, "identity")}
    policy = Policy(parse(PolicyConfig, {**POLICY, **changes}), features, Dot.action_feature, normalizers)
    return policy.save(folder, {"task": {"name": "toys:Dot"}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base"))


def config(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": "dot",
        "base": str(checkpoint),
        "task": {"name": "toys:Dot"},
        "method": DPPO,
        "iterations": 6,
        "env": {"num_envs": 6, "num_chunks": 3},
        "value": {"width": 16, "depth": 1},
        "ppo": {"epochs": 2, "minibatch_size": 9, "value_only_iterations": 1},
        "eval": {"episodes": 0},
        "checkpoint_every": 100,
    }
    for key, section in changes.items():
        value[key] = {**value[key], **section} if key in value and isinstance(section, dict) and key != "method" else section
    return value


def finetuner(value: dict[str, Any], out: Path, resume: bool = False) -> Finetuner:
    return Finetuner(parse(FinetuneConfig, value), out, resume=resume)


def finished(value: dict[str, Any], out: Path, resume: bool = False) -> Finetuner:
    run = finetuner(value, out, resume)
    assert run.run() == 0
    return run


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(sorted((out / "checkpoints").glob("step_*"))[-1] / "finetune")[0]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(out / "metrics.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert metrics(a) == metrics(b)


# --- a run and what it leaves -------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_and_a_policy(checkpoint: Path, tmp_path: Path) -> None:
    run = finished(config(checkpoint, eval={"every": 3, "episodes": 4}), tmp_path)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["step"] for row in rows if "eval/success" in row] == [0, 3, 6]
    assert {"loss/policy", "loss/value", "ratio/kl", "ratio/divergence_from_base", "value/explained_variance"} <= rows[-2].keys()
    assert rows[-2]["train/env_steps"] == run.env_steps <= 6 * 6 * 3 * 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["method"]["clip"] == 0.1
    policy = load_policy(tmp_path)
    assert policy.act({"x": np.zeros((3, 2, 2), np.float32)}, torch.Generator().manual_seed(0)).shape == (3, 2, 2)
    provenance = read_provenance(tmp_path)
    assert provenance["base"]["provenance"]["task"] == {"name": "toys:Dot"}
    assert provenance["task"]["name"] == "toys:Dot"
    assert provenance["env_steps"] == run.env_steps
    before = load_policy(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(policy.encoder.parameters(), before.encoder.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(policy.net.parameters(), before.net.parameters(), strict=True))


def test_an_iteration_in_which_no_episode_ends(checkpoint: Path, tmp_path: Path) -> None:
    finished(config(checkpoint, iterations=1, env={"num_envs": 2, "num_chunks": 1}), tmp_path)
    assert "train/success" not in metrics(tmp_path)[0]


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_before_training_the_policy_is_its_base(tmp_path: Path, prediction: str) -> None:
    """Through the same sampler, and saved, and loaded: frozen network and all."""
    path = "flow" if prediction == "flow" else "vp_cosine"
    sampler = {"type": "ddim", "num_steps": 4}
    checkpoint = base(tmp_path / "base", path={"type": path}, prediction=prediction, sampler=sampler)
    run = finetuner(config(checkpoint), tmp_path / "run")
    run.policy.save(tmp_path / "saved")
    spec, seeds = TaskSpec("toys:Dot"), range(SEEDS["test"], SEEDS["test"] + 8)
    expected = evaluate(load_policy(checkpoint), spec, seeds, progress=False).episodes
    assert run.policy.config.frozen_above == 0.5
    assert evaluate(run.policy, spec, seeds, progress=False).episodes == expected
    assert evaluate(load_policy(tmp_path / "saved"), spec, seeds, progress=False).episodes == expected
    assert len({episode.max_reward for episode in expected}) == 8


def test_a_tuned_policy_is_frozen_where_it_was_not_tuned_and_can_be_tuned_again(checkpoint: Path, tmp_path: Path) -> None:
    first = finished(config(checkpoint), tmp_path / "first").policy
    loaded, before = load_policy(tmp_path / "first"), load_policy(checkpoint)
    x, ctx = torch.randn(5, 4, 2), torch.randn(5, first.encoder.ctx_dim)
    for time, same in ((1.0, True), (0.75, True), (0.5, False), (0.25, False)):
        t = torch.full((5,), time)
        assert torch.equal(loaded.field(x, t, ctx).x0, first.field(x, t, ctx).x0)
        assert torch.allclose(loaded.field(x, t, ctx).x0, before.field(x, t, ctx).x0, atol=0) == same
    again = finetuner(config(tmp_path / "first"), tmp_path / "second")
    assert torch.equal(again.policy.field(x, torch.full((5,), 0.25), ctx).x0, loaded.field(x, torch.full((5,), 0.25), ctx).x0)
    assert again.run() == 0
    second = load_policy(tmp_path / "second")
    for time, same in ((0.75, True), (0.25, False)):
        t = torch.full((5,), time)
        assert torch.equal(second.field(x, t, ctx).x0, loaded.field(x, t, ctx).x0) == same
    with pytest.raises(ConfigError, match="keep the settings of its first fine-tuning"):
        finetuner(config(tmp_path / "first", method={**DPPO, "tuned_steps": 3}), tmp_path / "third")
    with pytest.raises(ConfigError, match="this method tunes it at t = 1"):
        finetuner(config(tmp_path / "first", method={"type": "gaussian"}), tmp_path / "fourth")


def test_training_from_scratch(tmp_path: Path) -> None:
    description = tmp_path / "policy.yaml"
    description.write_text(yaml.safe_dump({"policy": {**POLICY, "default_normalize": "minmax", "n_obs_steps": 1}}))
    value = config(description, task={"name": "toys:Bandit"}, iterations=2, method={"type": "gaussian"})
    value["env"]["num_chunks"] = 2
    run = finished(value, tmp_path / "run")
    assert run.env_steps == 6 * 2 * 2  # one step of each chunk, after which the episode is over
    assert load_policy(tmp_path / "run").action_feature.shape == (2,)
    assert_same_run(tmp_path / "run", finished(value, tmp_path / "again").out)
    with pytest.raises(ConfigError, match="unbounded action space"):
        finetuner({**value, "task": {"name": "walk:Walk"}}, tmp_path / "other")
    description.write_text(yaml.safe_dump({"policy": {**POLICY, "frozen_above": 0.5}}))
    with pytest.raises(ConfigError, match="must have been trained before"):
        finetuner(value, tmp_path / "other")
    description.write_text("name: x\n")
    with pytest.raises(ConfigError, match="no section 'policy'"):
        finetuner(value, tmp_path / "other")


# --- resuming -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [DPPO, {"type": "gaussian"}, {"type": "reinflow", "decay": True}, {"type": "fpo"}, {"type": "policyflow"}],
    ids=lambda m: m["type"],
)
def test_stopping_and_resuming_changes_no_bit(checkpoint: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    ppo = {"desired_kl": 1e-4, "bc": {"weight": 0.1}}  # a learning rate that moves, and noise for imitation
    value = config(checkpoint, method=method, ppo=ppo)
    finished(value, tmp_path / "straight")
    stop_after(3, finetuner(value, tmp_path / "stopped"))
    lengths = tensors(tmp_path / "stopped")["env.chunks"]
    assert lengths.unique().numel() > 1  # in the midst of episodes, not all at the same step
    assert finetuner(value, tmp_path / "stopped", resume=True).iteration == 3
    more = config(checkpoint, method=method, ppo=ppo, env={"num_workers": 2}) if method["type"] == "dppo" else value
    finished(more, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def stop_after(iterations: int, run: Finetuner) -> None:
    """As if the process had been told to stop while it was updating."""
    update = run.ppo.update

    def updating(*args: Any) -> dict[str, float]:
        if run.iteration == iterations - 1:
            run._on_signal(signal.SIGTERM)
        return update(*args)

    run.ppo.update = updating
    assert run.run() == 128 + signal.SIGTERM
    assert run.iteration == iterations


@pytest.fixture
def interruptible() -> Any:
    """Background jobs ignore SIGINT, and so would this process."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupt_during_a_rollout_costs_nothing(checkpoint: Path, tmp_path: Path, num_workers: int) -> None:
    value = config(checkpoint, env={"num_workers": num_workers})
    if num_workers == 0:
        value["checkpoint_every"] = 1
    finished(value, tmp_path / "straight")
    run = finetuner(value, tmp_path / "stopped")
    act, acted = run.head.act, []

    def acting(*args: Any) -> Any:
        acted.append(1)
        if len(acted) == 3 * 3 + 2:  # the second chunk of the fourth roll-out
            os.kill(os.getpid(), signal.SIGINT)
        return act(*args)

    run.head.act = acting
    assert run.run() == 130
    assert run.iteration == 3
    finished(value, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("at", [0, 2])
def test_a_signal_cuts_evaluation_short(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    run = finetuner(config(checkpoint, eval={"every": 2, "episodes": 4}), tmp_path)

    def evaluating(*args: Any, **kwargs: Any) -> Any:
        if run.iteration == at:
            run._on_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(finetune, "evaluate", evaluating)
    assert run.run() == 143
    assert run.checkpoints.steps() == ([at] if at else [])


def test_what_may_not_change(checkpoint: Path, tmp_path: Path) -> None:
    value = config(checkpoint, iterations=1)
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        finetuner(value, tmp_path / "run", resume=True)
    finished(value, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        finetuner(value, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"ppo.lr was 0.0003, now 0.001"):
        finetuner(config(checkpoint, iterations=1, ppo={"lr": 1e-3}), tmp_path / "run", resume=True)
    other = base(tmp_path / "other", net={**POLICY["net"], "width": 24})
    renamed = config(other, iterations=1)
    document = json.loads((checkpoint / "policy.json").read_text())
    assert document["sha256"] != json.loads((other / "policy.json").read_text())["sha256"]
    with pytest.raises(CheckpointError, match="not the base that this run started from"):
        finetuner(renamed, tmp_path / "run", resume=True)
    finished(config(checkpoint, iterations=2, eval={"every": 1}, guard={"z": 9.0}), tmp_path / "run", resume=True)


# --- going wrong --------------------------------------------------------------------------------------------------------------


def feed(monkeypatch: pytest.MonkeyPatch, means: Callable[[int], float]) -> None:
    """The guard sees 40 made-up episodes for each iteration."""
    calls: list[int] = []

    def made_up(*_: Any) -> list[float]:
        calls.append(1)
        return [float(k < 40 * means(len(calls))) for k in range(40)]

    monkeypatch.setattr(finetune, "scores", made_up)


def test_a_collapse_ends_the_run_at_its_best(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = config(checkpoint, iterations=20, checkpoint_every=2, guard={"episodes": 40})
    feed(monkeypatch, lambda k: 0.5 if k < 3 else 0.9 if k == 3 else 0.8 if k < 7 else 0.05)
    run = finetuner(value, tmp_path / "run")
    assert run.run() == COLLAPSED
    assert run.iteration == 7
    assert run.checkpoints.steps() == [3]  # later ones were written, at 4 and 6
    kept = load_policy(tmp_path / "run")
    assert_equal_weights(kept, run.policy)
    short = finished({**value, "iterations": 3}, tmp_path / "short")
    assert_equal_weights(short.policy, kept)
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step_00000003"
    feed(monkeypatch, lambda _: 0.9)
    value["iterations"] = 8
    resumed = finished(value, tmp_path / "run", resume=True)
    assert [row["step"] for row in metrics(resumed.out)] == list(range(9))
    feed(monkeypatch, lambda k: 0.5 if k < 3 else 0.9)
    assert_equal_weights(finished(value, tmp_path / "never").policy, resumed.policy)
    assert len(resumed.guard.history) == 8


def assert_equal_weights(a: Policy, b: Policy) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_collapse_after_a_resume_returns_to_the_best_window(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = config(checkpoint, iterations=4, guard={"episodes": 40})
    feed(monkeypatch, lambda k: 0.9 if k == 2 else 0.8)
    finished(value, tmp_path)
    feed(monkeypatch, lambda _: 0.05)
    run = finetuner({**value, "iterations": 9}, tmp_path, resume=True)
    assert run.run() == COLLAPSED
    assert run.checkpoints.steps() == [2]
    assert_equal_weights(run.policy, load_policy(tmp_path))
    short = finished({**value, "iterations": 2}, tmp_path / "short")
    assert_equal_weights(short.policy, run.policy)


def test_a_collapse_may_be_only_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, lambda k: 0.9 if k < 3 else 0.05)
    finished(config(checkpoint, guard={"episodes": 40, "stop": False}), tmp_path)
    assert "collapse: training episodes scored 0.900 up to iteration 1 and 0.050 now." in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(checkpoint: Path, tmp_path: Path) -> None:
    run = finetuner(config(checkpoint, checkpoint_every=1, ppo={"lr": 1e30, "max_grad_norm": 1e30}), tmp_path)
    with pytest.raises(RobopolicyError):
        run.run()
    for step in run.checkpoints.steps():
        assert all(bool(torch.isfinite(t).all()) for t in read_tensors(run.checkpoints.path(step) / "finetune")[0].values())


def test_the_guard_watches_what_is_rewarded() -> None:
    ended = [Ended(True, 0.9, 7.0, 3), Ended(False, 0.2, -1.0, 9)]
    assert scores(ended, "task") == [7.0, -1.0]
    assert scores(ended, "success") == [1.0, 0.0]
    assert scores(ended, "best") == [0.9, 0.2]
