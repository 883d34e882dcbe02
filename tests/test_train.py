"""Training: resumes to the bit, saves on signals, survives kill -9 and a full disk, refuses to diverge."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from robopolicy.config import parse
from robopolicy.data.episodes import Episodes
from robopolicy.data.store import WriteLock
from robopolicy.errors import CheckpointError, ConfigError, DataError, RobopolicyError
from robopolicy.features import Feature
from robopolicy.policy import load_policy
from robopolicy.train.bc import Trainer, batch_indices, clip_gradients, learning_rate, to_tensors, use_bf16
from robopolicy.train.ema import EMAConfig, averaged
from robopolicy.train.experiment import Experiment, TrainConfig
from robopolicy.train.metrics import read_metrics
from robopolicy.train.run import changed_keys

FEATURES = {
    "position": Feature("position", (2,), unit="m", rate=10.0),
    "image": Feature("image", (16, 16, 3), "uint8", rate=10.0),
    "action": Feature("action", (2,), unit="m", rate=10.0),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "toy.zarr"
    rng = np.random.default_rng(0)
    episodes = Episodes.create(path, FEATURES)
    for length in (20, 31, 25, 40):
        position = np.cumsum(rng.normal(size=(length, 2)), axis=0).astype(np.float32)
        image = rng.integers(0, 255, (length, 16, 16, 3), dtype=np.uint8)
        episodes.append({"position": position, "image": image, "action": position + 1})
    return path


def config(store: Path, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": "toy",
        "data": {"path": str(store), "observations": ["position"], "val_fraction": 0.25},
        "policy": {
            "horizon": 8,
            "n_action_steps": 4,
            "net": {"type": "mlp", "width": 16, "depth": 1, "dropout": 0.1},
            "obs_noise": 0.01,
        },
        "train": {"steps": 12, "batch_size": 8, "warmup_steps": 2, "checkpoint_every": 4, "log_every": 2, "device": "cpu"},
    }
    for key, section in changes.items():
        value[key] = {**value.get(key, {}), **section} if isinstance(section, dict) else section
    return value


def trainer(value: dict[str, Any], out: Path, resume: bool = False) -> Trainer:
    return Trainer(parse(Experiment, value), out, resume=resume)


def assert_equal(a: Trainer, b: Trainer) -> None:
    first, second = a.training_tensors(), b.training_tensors()
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in first)
    assert "ema.n_averaged" in first


VARIANTS: dict[str, dict[str, Any]] = {
    "state flow mlp": {},
    "image flow unet": {
        "data": {"observations": ["position", "image"]},
        "policy": {
            "net": {"type": "unet1d", "down_dims": [8, 16], "groups": 4, "time_dim": 8},
            "encoder": {"type": "multimodal", "rgb": {"widths": [16, 16], "crop": 0.75}},
        },
    },
    "diffusion dit, relative actions": {
        "policy": {
            "path": {"type": "vp_cosine"},
            "prediction": "eps",
            "sampler": {"type": "ddim"},
            "net": {"type": "dit", "width": 16, "depth": 1, "heads": 2},
            "action": {"type": "relative", "reference": ["position"]},
            "normalize_per_step": True,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopping_and_resuming_changes_no_bit(store: Path, tmp_path: Path, variant: str, precision: str) -> None:
    value = config(store, **VARIANTS[variant])
    value["train"]["precision"] = precision
    straight = trainer(value, tmp_path / "straight")
    assert straight.run() == 0
    stopped = trainer(value, tmp_path / "stopped")
    while stopped.step < 7:  # neither at a checkpoint nor at the end of an epoch
        stopped.train_step()
    stopped.save()
    resumed = trainer(value, tmp_path / "stopped", resume=True)
    assert resumed.step == 7
    assert_equal(stopped, resumed)
    assert resumed.run() == 0
    assert_equal(straight, resumed)


def test_the_best_table_and_metrics_survive_a_resume(store: Path, tmp_path: Path) -> None:
    first = trainer(config(store), tmp_path)
    first.best = [(0.5, 0.6, 3), (0.25, 0.9, 2)]
    first.run()
    again = trainer(config(store, train={**config(store)["train"], "steps": 16}), tmp_path, resume=True)
    assert again.best == [(0.5, 0.6, 3), (0.25, 0.9, 2)]
    again.run()
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16]


def test_a_resumed_run_keeps_the_precision_it_began_with(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(config(store), tmp_path)
    first.train_step()
    first.save()
    monkeypatch.setattr("robopolicy.train.bc.use_bf16", lambda *_: not first.bf16)
    assert trainer(config(store), tmp_path, resume=True).bf16 == first.bf16


def test_every_epoch_visits_every_window_once_and_in_its_own_order() -> None:
    cache: dict[int, np.ndarray] = {}
    epochs = [np.concatenate([batch_indices(e * 5 + i, 50, 10, 3, cache) for i in range(5)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert list(epochs[0]) != list(epochs[1])
    assert len(batch_indices(4, 49, 10, 3, cache)) == 10


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    schedule = TrainConfig(steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(step, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert np.all(np.diff(rates[10:]) <= 0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def test_the_average_follows_its_definition() -> None:
    weights = torch.nn.Linear(1, 1, bias=False)
    settings = EMAConfig(max_decay=0.9)
    ema = averaged(weights, settings)
    expected = None
    for step in range(200):
        torch.nn.init.constant_(weights.weight, float(step))
        ema.update_parameters(weights)
        decay = settings.decay(step)
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert settings.decay(0) == 0.0
    assert settings.decay(10**6) == 0.9


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_mend(store: Path, tmp_path: Path) -> None:
    run = trainer(config(store), tmp_path)
    with torch.no_grad():
        next(run.policy.net.parameters()).fill_(float("nan"))
    with pytest.raises(RobopolicyError, match=r"diverged at step 2.*lower train\.lr"):
        run.run()


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(store: Path, tmp_path: Path) -> None:
    run = trainer(config(store), tmp_path)
    run.train_step()
    run.save()
    with torch.no_grad():
        next(run.policy.net.parameters()).fill_(float("nan"))
    run.train_step()
    with pytest.raises(RobopolicyError, match="not finite"):
        run.save()
    assert run.checkpoints.steps() == [1]


def test_the_best_evaluations_have_checkpoints(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {**config(store), "task": {"name": "lift"}, "eval": {"episodes": 1, "every": 5}}
    run = trainer(value, tmp_path)

    def evaluated() -> dict[str, float]:
        run.best = [(1.0, 1.0, 5)]
        return {"eval/success": 1.0}

    monkeypatch.setattr(run, "_evaluate", evaluated)
    run.run()
    assert run.checkpoints.steps() == [5, 12]


def test_bf16_does_not_round_what_the_policy_shall_learn(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def loss(
        _net: object, _path: object, _kind: object, x0: torch.Tensor, ctx: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        seen.append(x0)
        return (ctx * 0).sum()

    monkeypatch.setattr("robopolicy.policy.denoising_loss", loss)
    features = {"pose": Feature("pose", (7,)), "action": Feature("action", (7,))}
    rng = np.random.default_rng(0)
    path = tmp_path / "poses.zarr"
    with Episodes.create(path, features) as episodes:
        episodes.append({name: rng.normal(size=(30, 7)).astype(np.float32) for name in features})
    value = config(store, data={"path": str(path), "observations": ["pose"], "val_fraction": 0.0})
    pose = {"start": 0, "rotation": "quat_xyzw", "reference": ["pose"]}
    value["policy"]["action"] = {"type": "relative", "poses": [pose]}
    run = trainer(value, tmp_path / "run")
    batch = to_tensors(run.data.train.batch(np.arange(8)), run.device)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            run.policy.loss(batch, run.generator)
    assert torch.equal(*seen)


def test_a_full_disk_in_training_warns_and_training_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(config(store), tmp_path)
    write = run.checkpoints.write

    def full_at_eight(step: int, parts: Any) -> Path:
        if step == 8:
            raise CheckpointError("checkpoint of step 8 could not be written: No space left on device")
        return write(step, parts)

    monkeypatch.setattr(run.checkpoints, "write", full_at_eight)
    assert run.run() == 0
    assert "No space left on device" in capsys.readouterr().err
    assert run.checkpoints.steps() == [12]


def test_a_run_is_neither_overwritten_nor_resumed_on_other_data(store: Path, tmp_path: Path) -> None:
    trainer(config(store), tmp_path).run()
    with pytest.raises(ConfigError, match="already holds a run"):
        trainer(config(store), tmp_path)
    with pytest.raises(CheckpointError, match="other data"):
        trainer(config(store, data={**config(store)["data"], "max_episodes": 2}), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"policy\.net\.width was 16, now 32"):
        trainer(
            config(store, policy={**config(store)["policy"], "net": {"type": "mlp", "width": 32, "depth": 1, "dropout": 0.1}}),
            tmp_path,
            resume=True,
        )
    with pytest.raises(CheckpointError, match=r"train\.lr was 0\.0001, now 0\.1"):
        trainer(config(store, train={**config(store)["train"], "lr": 0.1}), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        trainer(config(store), tmp_path / "new", resume=True)


def test_a_run_of_an_older_version_is_resumed_with_the_defaults_of_new_keys(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ("policy.target_time", "policy.loss.prefix", "policy.loss.staircase")
    complete = Trainer._recipe
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_recipe", lambda self: {k: v for k, v in complete(self).items() if k not in new})
        old = trainer(config(store), tmp_path)
        while old.step < 5:
            old.train_step()
        old.save()
    resumed = trainer(config(store), tmp_path, resume=True)
    assert_equal(old, resumed)
    note = "older version, which knew no policy.loss.prefix, policy.loss.staircase, policy.target_time; the defaults"
    assert note in capsys.readouterr().err
    changed = config(store, policy={**config(store)["policy"], "loss": {"prefix": 2}})
    with pytest.raises(CheckpointError, match=r"policy\.loss\.prefix was 0, now 2"):
        trainer(changed, tmp_path, resume=True)
    assert "data.action was None" in changed_keys({}, parse(Experiment, config(store)), ()), "not all have a default"


def test_the_saved_policy_acts_as_the_average_did(store: Path, tmp_path: Path) -> None:
    run = trainer(config(store), tmp_path)
    run.run()
    obs = {"position": np.random.default_rng(1).normal(size=(3, 2, 2)).astype(np.float32)}
    loaded = load_policy(tmp_path)
    first = loaded.act(obs, torch.Generator().manual_seed(0))
    second = run.ema.module.eval().act(obs, torch.Generator().manual_seed(0))
    assert first.shape == (3, 4, 2)
    np.testing.assert_array_equal(first, second)


def _start(value: dict[str, Any], folder: Path) -> tuple[subprocess.Popen[str], Path]:
    (folder / "toy.yaml").write_text(yaml.safe_dump(value))
    out = folder / "run"
    command = [sys.executable, "-m", "robopolicy.cli", "train", str(folder / "toy.yaml"), "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "last").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, out


def _long(store: Path) -> dict[str, Any]:
    return config(store, train={**config(store)["train"], "steps": 100_000, "checkpoint_every": 10})


def test_a_signal_during_an_evaluation_does_not_wait_for_it(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = config(store, task={"name": "pusht"}, eval={"episodes": 5, "every": 6})
    run = trainer(value, tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the evaluation went on")

    monkeypatch.setattr("robopolicy.train.bc.evaluate", interrupted)
    assert run.run() == 143
    assert run.checkpoints.steps()[-1] == 6


def test_two_runs_cannot_share_a_folder(store: Path, tmp_path: Path) -> None:
    run = trainer(config(store), tmp_path)
    lock = WriteLock(tmp_path)
    with pytest.raises(DataError, match="written by another process"):
        run.run()
    lock.release()
    assert run.run() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_with_its_code(store: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    process, out = _start(_long(store), tmp_path)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert f"--resume {out}" in stdout
    assert trainer(_long(store), out, resume=True).step > 0


def test_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(store: Path, tmp_path: Path) -> None:
    process, out = _start(_long(store), tmp_path)
    process.kill()
    process.communicate(timeout=60)
    resumed = trainer(_long(store), out, resume=True)
    assert resumed.step % 10 == 0
    straight = trainer(_long(store), tmp_path / "straight")
    while straight.step < resumed.step:
        straight.train_step()
    assert_equal(straight, resumed)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    torch.manual_seed(0)
    mine, reference = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    for a, b in zip(mine.parameters(), reference.parameters(), strict=True):
        a.grad = torch.randn(a.shape)
        b.grad = a.grad.clone()
    norm = clip_gradients(list(mine.parameters()), max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm))
    for a, b in zip(mine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bf16_is_left_to_networks_that_gain_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert use_bf16("auto", cpu, 5_000_000)
    assert not use_bf16("auto", cpu, 300_000)
    assert use_bf16("bf16", cpu, 300_000)
    assert not use_bf16("fp32", cpu, 5_000_000)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not use_bf16("auto", cpu, 5_000_000)
