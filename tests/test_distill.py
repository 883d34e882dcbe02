"""`robopolicy distill`: from every kind of teacher, by every method, to a policy that every verb takes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from toys import Dot

from robopolicy.cli import main
from robopolicy.compose.policy import compose
from robopolicy.compose.superpose import SUPERPOSE
from robopolicy.config import load_yaml, parse
from robopolicy.data.episodes import Episodes
from robopolicy.distill.config import DistillConfig
from robopolicy.distill.methods.base import Models, Samples
from robopolicy.distill.methods.reflow import Reflow
from robopolicy.distill.methods.registry import METHODS
from robopolicy.distill.observations import recorded_data
from robopolicy.distill.report import MARGIN, non_inferiority
from robopolicy.distill.student import settings, untrained, warm_start
from robopolicy.distill.teacher import Teacher
from robopolicy.distill.trainer import Distiller
from robopolicy.errors import CheckpointError, ConfigError
from robopolicy.evaluate.paired import compare
from robopolicy.evaluate.record import load_evaluation
from robopolicy.evaluate.run import evaluate
from robopolicy.policy import Policy, PolicyConfig, load_policy, read_provenance
from robopolicy.task import TaskSpec
from robopolicy.train.bc import Trainer
from robopolicy.train.experiment import Experiment
from robopolicy.train.metrics import read_metrics

TASK = {"name": "toys:Dot", "args": {"max_episode_steps": 7}}
FEATURES = {"x": Dot.observation_features["x"], "image": Dot.observation_features["image"], "action": Dot.action_feature}
POLICY: dict[str, Any] = {
    "n_obs_steps": 2,
    "horizon": 4,
    "n_action_steps": 2,
    "net": {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8, "dropout": 0.1},
    "encoder": {"type": "state"},
    "sampler": {"type": "euler", "num_steps": 3},
}
SHORT = ["train.batch_size=16", "train.warmup_steps=2", "train.checkpoint_every=4", "train.log_every=2", "train.device=cpu"]
SHORT += ["pairs.num=64", "pairs.held_out=16", "eval.num_envs=4"]
DIFFUSION = {"path": {"type": "vp_cosine"}, "prediction": "eps", "sampler": {"type": "ddim", "num_steps": 3}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations that drive the dot to the middle."""
    path = tmp_path_factory.mktemp("data") / "dot.zarr"
    rng, episodes = np.random.default_rng(0), Episodes.create(path, FEATURES)
    for seed in range(8):
        task, rows = Dot(), {name: [] for name in FEATURES}
        obs, _ = task.reset(seed=seed)
        for _ in range(9):
            action = np.clip(-2 * obs["x"] + 0.3 * rng.normal(size=2), -1, 1).astype(np.float32)
            for name, value in {**obs, "action": action}.items():
                rows[name].append(value)
            obs, *_ = task.step(action)
        episodes.append({name: np.stack(values) for name, values in rows.items()})
    return path


def train(store: Path, out: Path, policy: dict[str, Any] | None = None, observations: tuple[str, ...] = ("x",)) -> Path:
    value = {
        "name": "dot",
        "task": TASK,
        "data": {"path": str(store), "observations": list(observations), "val_fraction": 0.25},
        "policy": {**POLICY, **(policy or {})},
        "train": {"steps": 6, "batch_size": 16, "warmup_steps": 2, "device": "cpu", "lr": 1e-2},
    }
    assert Trainer(parse(Experiment, value), out).run() == 0
    return out


@pytest.fixture(scope="module")
def teacher(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train(store, tmp_path_factory.mktemp("teacher") / "flow"))


@pytest.fixture
def config(teacher: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """The config that a command line means."""

    def of(*arguments: str, method: str = "same_noise", checkpoint: str = teacher) -> DistillConfig:
        capsys.readouterr()
        assert main(["distill", checkpoint, "--method", method, *SHORT, *arguments, "--print-config"]) == 0
        return parse(DistillConfig, yaml.safe_load(capsys.readouterr().out))

    return of


# -- every method, every teacher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_in_a_policy_that_acts(
    method: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / method
    assert main(["distill", teacher, "--method", method, "--steps", "8", "--eval", "6", "--out", str(out), *SHORT]) == 0
    calls = 2 if method == "mip" else 1
    said = capsys.readouterr().out
    assert f"3 a chunk by the teacher, {calls} by the student" in said
    assert "6 paired seeds" in said
    student = load_policy(out)
    assert student.sampler.nfe(student.path) == calls
    result = evaluate(student, TaskSpec(name=TASK["name"], kwargs=TASK["args"]), range(5), num_envs=5, progress=False)
    assert len(result.episodes) == 5
    about = read_provenance(out)
    assert about["method"]["type"] == method
    assert about["teacher"]["path"] == teacher
    assert about["teacher"]["provenance"]["experiment"] == "dot"
    assert about["teacher"]["calls"] > 0
    assert about["task"] == TASK
    assert any("val/same_noise" in row for row in read_metrics(out / "metrics.jsonl"))
    assert json.loads((out / "distill.json").read_text())["calls"]["student"] == calls
    assert json.loads((out / "test" / "comparison.json").read_text())["policies"][1]["policy"] == str(out)


def frozen(store: Path, out: Path) -> Path:
    """What `finetune` leaves: no data of its own, a frozen network for early steps, other settings."""
    base = train(store, out / "base", DIFFUSION)
    tuned = load_policy(base).varied(frozen_above=0.5, sampler={"type": "ddim", "num_steps": 4, "eta": 1.0})
    with torch.no_grad():
        for parameter in tuned.net.parameters():
            parameter.mul_(1.1)
    tuned.save(out / "tuned", {"task": TASK})
    (out / "tuned" / "config.yaml").write_text(yaml.safe_dump({"name": "tuned", "base": str(base), "method": {"type": "dppo"}}))
    return out / "tuned"


def composed(store: Path, out: Path) -> Path:
    parents = [load_policy(train(store, out / "a", DIFFUSION)), load_policy(train(store, out / "b"))]
    compose(parents, weights=[0.25, 0.75]).save(out / "both", {"task": TASK})
    return out / "both"


def pixels(store: Path, out: Path) -> Path:
    encoder = {"type": "multimodal", "rgb": {"widths": [16], "keypoints": 4, "dim": 4}}
    return train(store, out / "pixels", {"encoder": encoder}, ("x", "image"))


def ancestral(store: Path, out: Path) -> Path:
    return train(store, out / "ddpm", {**DIFFUSION, "sampler": {"type": "ddpm", "num_steps": 5}})


@pytest.mark.parametrize(("make", "calls"), [(frozen, 4), (composed, 6), (pixels, 3), (ancestral, 5)])
@pytest.mark.parametrize("method", ["same_noise", "ctm"])
def test_teachers_of_every_kind(make: Any, calls: int, method: str, store: Path, tmp_path: Path) -> None:
    source = make(store, tmp_path)
    extra = ["--data", str(store)] if make is composed else []
    out = tmp_path / "student"
    assert main(["distill", str(source), *extra, "--method", method, "--steps", "4", "--out", str(out), *SHORT]) == 0
    assert json.loads((out / "distill.json").read_text())["calls"] | {"spent": 0} == {"teacher": calls, "student": 1, "spent": 0}
    student = load_policy(out)
    task = Dot()
    obs, _ = task.reset(seed=0)
    seen = {name: np.repeat(obs[name][None, None], 2, axis=1) for name in student.observation_features}
    assert set(seen) == set(load_policy(source).observation_features)
    assert student.act(seen, torch.Generator().manual_seed(0)).shape == (1, 2, 2)


@pytest.fixture(scope="module")
def superposed(store: Path, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("and")
    other = load_policy(train(store, folder / "other", DIFFUSION))
    both = compose([load_policy(teacher), other], rule="and", sampler={"type": SUPERPOSE, "mode": "and", "num_steps": 6})
    return str(both.save(folder / "both", {"task": TASK}))


@pytest.mark.parametrize("method", ["reflow", "regression", "mip"])
def test_of_a_superposition_its_own_samples_are_learnt(
    method: str, superposed: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / method
    arguments = ["--method", method, "--steps", "4", "--data", str(store), "--eval", "4", "--out", str(out), *SHORT]
    assert main(["distill", superposed, *arguments]) == 0
    said = capsys.readouterr().out
    assert "12 a chunk by the teacher" in said
    assert "same noise" not in said  # the first noise alone does not say where it ends
    rows = read_metrics(out / "metrics.jsonl")
    assert any("val/loss" in row for row in rows)
    assert not any("val/same_noise" in row for row in rows)
    config = parse(DistillConfig, load_yaml(out / "config.yaml"))
    own = Distiller(config, tmp_path / "again")
    assert np.array_equal(own.pairs.clean, Distiller(config, out, resume=True).pairs.clean)  # kept, and of the arguments alone
    policy = own.teacher.policy
    ctx = own.teacher.encode({"x": torch.zeros(1, 2, 2)}).expand(200, -1)
    noise = torch.zeros(200, policy.config.horizon, policy.action_transform.dim)
    chunks = own.teacher.sample(ctx, noise, torch.Generator().manual_seed(0))
    assert float(chunks.std(0).mean()) > 0.01  # one noise, many chunks: nothing that a map could copy
    assert load_policy(out).sampler.num_steps(load_policy(out).path) == {"reflow": 10, "regression": 1, "mip": 2}[method]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "distil it by --method reflow"),
        (["--method", "ctm"], "distil it by --method reflow"),
        (["--method", "reflow", "--teacher-sampler", "{type: euler, num_steps: 10}"], "would be the plain mean"),
        (["--method", "reflow", "policy.sampler.num_steps=1"], "a student of one step is the mean"),
        (["--method", "reflow", "--teacher-sampler", f"{{type: '{SUPERPOSE}', mode: or}}"], "rule 'and'"),
    ],
)
def test_a_superposition_is_never_taught_as_the_mean(
    arguments: list[str], text: str, superposed: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["distill", superposed, *arguments, "--steps", "2", "--data", str(store), "--out", str(out), *SHORT]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_reflow_learns_the_distribution_of_draws_and_not_their_mean(teacher: str) -> None:
    """Few chunks that the noise beside them says nothing of: the two sides of a coin. What stands beside which is not learnt by
    heart."""
    config = load_policy(teacher).config
    policy = untrained(config.model_copy(update={"net": {**config.net, "width": 64}}), load_policy(teacher), 0)
    torch.manual_seed(0)
    optimizer, generator = torch.optim.Adam(policy.parameters(), 5e-3), torch.Generator().manual_seed(0)
    obs = {"x": torch.zeros(256, 2, 2)}
    method = Reflow(Reflow.Config())
    clean = (torch.randint(0, 2, (256, 1, 1), generator=generator) * 2.0 - 1).expand(-1, 4, 2) + 0.0
    batch = Samples(obs, torch.randn(256, 4, 2, generator=generator), clean, None)
    draws = cast("Teacher", SimpleNamespace(draws=True))
    for _ in range(600):
        optimizer.zero_grad()
        method.loss(batch, Models(policy, policy, draws), generator).backward()
        optimizer.step()
    noise, sizes = torch.randn(256, 4, 2, generator=generator), []
    for sampler in (Reflow.OF_DRAWS["sampler"], {"type": "euler", "num_steps": 1}):
        made = policy.varied(sampler=sampler).eval()
        with torch.no_grad():
            sizes.append(float(made.walk(made.start(noise), made.encode(made.observe(obs))).x0.mean((1, 2)).abs().mean()))
    assert sizes[0] > 0.8
    assert sizes[1] < 0.4  # one step gives the mean, which is 0


def test_a_sampler_with_a_walk_of_its_own_is_not_asked_for_its_field(
    teacher: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "walks.py").write_text(
        "from robopolicy.generative.sampler import Euler\n\n\nclass Own(Euler):\n"
        "    def sample(self, field, ctx, x_init, **walk):\n        return super().sample(field, ctx, x_init, **walk)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = load_policy(teacher).varied(sampler={"type": "walks:Own", "num_steps": 2})
    own = str(made.save(tmp_path / "own", {"task": TASK}))
    for method in ("ctm", "consistency", "meanflow", "shortcut"):
        arguments = ["--data", str(store), "--method", method, "--steps", "2", "--out", str(tmp_path / method)]
        assert main(["distill", own, *arguments, *SHORT]) == 2
        assert "asks for the field alone" in capsys.readouterr().err
    arguments = ["--data", str(store), "--steps", "2", "--out", str(tmp_path / "same")]
    assert main(["distill", own, *arguments, *SHORT]) == 0


def test_a_student_can_be_a_teacher(teacher: str, tmp_path: Path) -> None:
    for source, out in ((teacher, "first"), (str(tmp_path / "first"), "second")):
        assert main(["distill", source, "--steps", "4", "--out", str(tmp_path / out), *SHORT]) == 0
    assert json.loads((tmp_path / "second" / "distill.json").read_text())["calls"]["teacher"] == 1


def test_finetune_and_train_take_a_student(teacher: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", teacher, "--method", "reflow", "--steps", "4", "--out", str(tmp_path / "s"), *SHORT]) == 0
    arguments = ["env.num_envs=4", "env.num_chunks=2", "iterations=1", "ppo.minibatch_size=4", "value.width=8", "eval.episodes=0"]
    arguments += [
        "eval.test_episodes=0",
        "eval.films=0",
        "env.reward.source=task",
        "ppo.bc.weight=1",
        "ppo.bc.source=demonstrations",
    ]
    out = ["--out", str(tmp_path / "rl")]
    assert main(["finetune", str(tmp_path / "s"), "--method", "reinflow", *out, *arguments, "ppo.lr=1e-5"]) == 0
    student, tuned = load_policy(tmp_path / "s"), load_policy(tmp_path / "rl")
    seen = {"x": np.random.default_rng(0).normal(size=(16, 2, 2)).astype(np.float32)}
    few, many = (
        torch.as_tensor(p.act(seen, torch.Generator().manual_seed(0)))
        for p in (student, student.varied(sampler=tuned.config.sampler))
    )
    after = torch.as_tensor(tuned.act(seen, torch.Generator().manual_seed(0)))
    spread = float(many.std())
    assert float((after - many).abs().max()) < 0.1 * spread  # one small iteration hardly moves it
    assert float((few - many).square().mean().sqrt()) < 0.5 * spread  # and the walk in many steps is one that it knows
    assert main(["train", "--resume", str(tmp_path / "s")]) == 2
    assert "distill --resume" in capsys.readouterr().err
    assert main(["distill", "--resume", str(tmp_path / "rl")]) == 2
    assert "is a run of finetune" in capsys.readouterr().err
    assert main(["distill", "--resume", teacher]) == 2
    assert "is a run of train" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["same_noise", "regression", "mip"])
def test_a_student_is_not_walked_where_it_was_never_trained(
    method: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, other = str(tmp_path / "s"), str(tmp_path / "other")
    assert main(["distill", teacher, "--method", method, "--steps", "2", "--out", student, *SHORT]) == 0
    own = ["--episodes", "2", "--num-envs", "2"]
    assert main(["eval", student, *own]) == 0  # by its own steps it acts
    both = ["compose", student, teacher, "sampler.type=euler"]
    two = str(tmp_path / "two")
    assert main(["compose", student, student, "--out", two]) == 0
    for command in (
        ["finetune", student],
        [*both, "sampler.num_steps=4", "--out", other],
        ["finetune", two],
        *([["eval", student, *own, "--steps", "3"], ["export", student, "--steps", "3"]] if method == "same_noise" else []),
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert f"was distilled by {method}" in capsys.readouterr().err
    assert main([*both, "sampler.num_steps=1", "--out", other]) == 0


# -- the start ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net",
    [
        {"type": "mlp", "width": 16, "depth": 2, "time_dim": 8},
        {"type": "dit", "width": 16, "depth": 2, "heads": 2, "time_dim": 8},
        {"type": "unet1d", "down_dims": [8, 16], "groups": 4, "time_dim": 8},
    ],
)
def test_a_student_of_a_flow_teacher_starts_as_its_teacher_whatever_the_gap(net: dict[str, Any], teacher: str) -> None:
    original = load_policy(teacher)
    config = parse(PolicyConfig, {**original.config.model_dump(mode="json"), "net": net})
    torch.manual_seed(0)
    normalizers = {name: original.normalizer(name) for name in original.normalizers}
    source = Policy(config, original.observation_features, original.action_feature, normalizers).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    changes = {"target_time": True, "sampler": {"type": "jump"}}
    student = untrained(parse(PolicyConfig, settings(source, changes)), source, seed=1).eval()
    x, t, ctx = torch.randn(5, 4, 2), torch.rand(5), torch.randn(5, source.ctx_dim)
    assert not torch.allclose(student.field(x, t, ctx).x0, source.field(x, t, ctx).x0, atol=1e-3)
    copied = warm_start(student, source)
    assert {f"net.{name}" for name, _ in source.net.named_parameters()} <= set(copied)
    for to in (None, t * 0.5, torch.zeros(5)):
        for ours, theirs in zip(student.field(x, t, ctx, to), source.field(x, t, ctx), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_another_network_starts_fresh_and_normalisers_are_the_teachers(config: Any, tmp_path: Path, teacher: str) -> None:
    run = Distiller(config("policy.net.width=24"), tmp_path)
    source = load_policy(teacher)
    assert run.policy.net.leave.weight.abs().max() == 0  # as a fresh network has it
    for name in source.normalizers:
        assert run.policy.normalizer(name).equal(source.normalizer(name))
    same = Distiller(config(), tmp_path / "same")
    assert torch.equal(same.policy.net.leave.weight, source.net.leave.weight)
    cold = Distiller(config("warm_start=false"), tmp_path / "cold")
    assert cold.policy.net.leave.weight.abs().max() == 0
    assert same.policy.config.net["dropout"] == 0


def test_observations_are_found_through_the_base_of_a_tuned_teacher(store: Path, tmp_path: Path, config: Any) -> None:
    tuned = frozen(store, tmp_path)
    assert recorded_data(tuned)["path"] == str(store)
    assert config(checkpoint=str(tuned)).data.observations == ("x",)
    alone = load_policy(tuned).save(tmp_path / "alone")
    with pytest.raises(ConfigError, match="data rollout TEACHER"):
        recorded_data(alone)
    (alone / "config.yaml").write_text("base: /nowhere\n")
    with pytest.raises(ConfigError, match="which is not there"):
        recorded_data(alone)


def test_pairs_are_the_teachers_and_are_kept(config: Any, tmp_path: Path, teacher: str) -> None:
    run = Distiller(config(), tmp_path)
    pairs = run.pairs
    spent = run.teacher.calls
    assert spent == 64 * 3
    source = Teacher(load_policy(teacher))
    obs = {name: torch.from_numpy(value) for name, value in pairs.vectors.items()}
    assert torch.equal(source.sample(source.encode(obs), torch.from_numpy(pairs.noise)), torch.from_numpy(pairs.clean))
    window = run.data.train.batch(pairs.window[:5])["obs"]["x"]
    assert np.array_equal(window, pairs.vectors["x"][:5])
    again = Distiller(config(), tmp_path)
    assert np.array_equal(again.pairs.clean, pairs.clean)
    assert again.teacher.calls == 0  # read, not asked again
    other = Distiller(config("seed=1"), tmp_path)
    assert not np.array_equal(other.pairs.noise, pairs.noise)
    spoilt = Distiller(config("pairs.obs_noise=0.1"), tmp_path / "noise").pairs
    moved = spoilt.vectors["x"] - run.data.train.batch(spoilt.window)["obs"]["x"]
    half_range = float(1 / source.policy.normalizer("x").scale.mean())
    assert 0.05 < moved.std() / half_range < 0.2


@pytest.mark.parametrize("method", METHODS)
def test_a_student_of_a_teacher_with_less_noise_starts_from_as_little(
    method: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    options = ["--teacher-noise", ".5", "--method", method, "--steps", "2", "--eval", "3", "--out", str(out)]
    assert main(["distill", teacher, *options, *SHORT]) == 0
    assert "A, the teacher, ran as it was copied: noise of scale 0.5\n" in capsys.readouterr().out
    start = 0.0 if method in ("regression", "mip") else 0.5
    assert load_policy(out).config.initial_noise == start
    pairs = Distiller(parse(DistillConfig, load_yaml(out / "config.yaml")), out, resume=True).pairs
    obs = {name: torch.from_numpy(value) for name, value in pairs.vectors.items()}
    noise, clean = torch.from_numpy(pairs.noise), torch.from_numpy(pairs.clean)
    less = Teacher(load_policy(teacher).varied(initial_noise=0.5))
    assert torch.equal(less.sample(less.encode(obs), noise), clean)
    whole = Teacher(load_policy(teacher))
    assert not torch.allclose(whole.sample(whole.encode(obs), noise), clean, atol=1e-3)
    scales = [load_evaluation(out / "test" / who / "eval.json").settings.initial_noise for who in ("teacher", "student")]
    assert scales == [0.5, start]  # the verdict is against the teacher that was copied


def test_the_scale_of_the_noise_is_part_of_what_pairs_are_kept_for(config: Any, tmp_path: Path) -> None:
    kept = {}
    for noise in ("null", "0.5"):
        run = Distiller(config(f"teacher_noise={noise}"), tmp_path)  # in one folder
        kept[noise] = run.pairs
        assert run.teacher.calls > 0
    assert np.array_equal(kept["null"].noise, kept["0.5"].noise)
    assert not np.array_equal(kept["null"].clean, kept["0.5"].clean)


def test_a_student_of_less_noise_is_not_asked_from_more(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    assert main(["distill", teacher, "teacher_noise=.5", "--steps", "2", "--out", str(out), *SHORT]) == 0
    assert f"next: robopolicy distill --resume {out} --eval 400" in capsys.readouterr().out
    assert main(["distill", "--resume", str(out), "--eval", "3"]) == 0
    own = ["--episodes", "2", "--num-envs", "2"]
    assert main(["eval", str(out), *own, "--noise", ".4"]) == 0
    for command in (
        ["eval", str(out), *own, "--noise", "1"],
        ["export", str(out), "--noise", ".6"],
        ["compose", teacher, str(out), "sampler.num_steps=1", "--out", str(tmp_path / "both")],
        ["distill", str(out), "--teacher-noise", "1", "--out", str(tmp_path / "again"), *SHORT],
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert "distilled by same_noise from noise of scale 0.5" in capsys.readouterr().err


def test_a_composition_asks_its_students_for_no_more_than_they_know(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    students = [str(tmp_path / name) for name in ("a", "b")]
    for out in students:
        assert main(["distill", teacher, "teacher_noise=.5", "--steps", "2", "--out", out, *SHORT]) == 0
    both, more = str(tmp_path / "both"), str(tmp_path / "more")
    assert main(["compose", *students, "--out", both]) == 0
    assert main(["compose", both, students[0], "--out", more]) == 0
    own = ["--episodes", "2", "--num-envs", "2"]
    for composition in (both, more):
        assert main(["eval", composition, *own, "--noise", ".4"]) == 0
        for extra, said in ((["--noise", "1"], "from noise of scale 0.5"), (["--steps", "3"], "keep its 1 step(s)")):
            capsys.readouterr()
            assert main(["eval", composition, *own, *extra]) == 2
            error = capsys.readouterr().err
            assert f"'{composition}', of which '" in error
            assert f"'{students[0]}" in error
            assert "' was distilled by same_noise" in error
            assert said in error


# -- running -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["same_noise", "consistency", "ctm", "meanflow", "shortcut", "mip"])
def test_stopping_and_resuming_changes_no_bit(method: str, config: Any, tmp_path: Path) -> None:
    settings = config("train.steps=10", method=method)
    straight, stopped = Distiller(settings, tmp_path / "straight"), Distiller(settings, tmp_path / "stopped")
    assert straight.run() == 0
    while stopped.step < 5:
        stopped.train_step()
    stopped.save()
    resumed = Distiller(settings, tmp_path / "stopped", resume=True)
    assert (resumed.step, resumed.teacher.calls) == (5, stopped.teacher.calls)
    assert resumed.run() == 0
    first, second = straight.training_tensors(), resumed.training_tensors()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert resumed.teacher.calls == straight.teacher.calls


def test_training_brings_the_student_closer_and_the_average_gets_no_gradient(config: Any, tmp_path: Path) -> None:
    run = Distiller(config("train.steps=80", "train.lr=0.01", "pairs.num=512", "warm_start=false", method="ctm"), tmp_path)
    before = run.validate()["val/same_noise"]
    assert run.run() == 0
    assert run.validate()["val/same_noise"] < 0.9 * before
    assert all(parameter.grad is None for parameter in run.ema.parameters())


def test_another_teacher_under_the_same_run_is_noticed(store: Path, config: Any, tmp_path: Path) -> None:
    source = train(store, tmp_path / "teacher")
    settings = config("train.steps=4", checkpoint=str(source))
    assert Distiller(settings, tmp_path / "run").run() == 0
    policy = load_policy(source)
    with torch.no_grad():
        next(policy.net.parameters()).add_(1)
    policy.save(source / "checkpoints" / "step_00000009")
    with pytest.raises(CheckpointError, match="was trained on other data"):
        Distiller(settings, tmp_path / "run", resume=True)


def test_ctrl_c_saves_and_resume_ends_the_run(teacher: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = [sys.executable, "-m", "robopolicy.cli", "distill", teacher, "--steps", "100000", "--out", str(out), *SHORT]
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while not (out / "checkpoints" / "last").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert f"robopolicy distill --resume {out}" in said
    document = load_yaml(out / "config.yaml")
    done = int(read_provenance(out)["step"])
    document["train"]["steps"] = done + 3
    (out / "config.yaml").write_text(yaml.safe_dump(document))
    assert main(["distill", "--resume", str(out)]) == 0
    assert read_provenance(out)["step"] == done + 3


# -- what is said ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give either a teacher"),
        (["nowhere"], "'nowhere' does not exist"),
        (["train.lr=1"], "is an override; name the teacher first"),
        (["TEACHER", "--method", "same_nose"], "did you mean 'same_noise'?"),
        (["TEACHER", "--resume", "x"], "--resume goes alone"),
        (["TEACHER", "method.stps=1"], "unknown key 'stps'"),
        (["TEACHER", "policy.path.type=vp_cosine"], "students live on the linear path"),
        (["TEACHER", "policy.horizon=8"], "are not the teacher's"),
        (["TEACHER", "policy.normalize_per_step=true"], "must be the teacher's"),
        (["TEACHER", "--data", "nowhere.zarr"], "nowhere.zarr"),
        (["TEACHER", "--teacher-sampler", "{type: ddim, eta: 1.0}"], "draws noise on the way"),
        (["TEACHER", "--teacher-sampler", "{type: eular}"], "did you mean 'euler'?"),
        (["TEACHER", "--teacher-noise", "0"], "'teacher_noise': Input should be greater than 0"),
        (["TEACHER", "teacher_noise=little"], "'teacher_noise': Input should be a valid number"),
        (["--resume", "x", "--teacher-noise", ".5"], "--resume goes alone"),
        (["TEACHER", "data.observations=[image]"], "the teacher needs x"),
    ],
)
def test_bad_input_is_one_line_that_says_how_to_mend_it(
    arguments: list[str], text: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    assert main(["distill", *(teacher if a == "TEACHER" else a for a in arguments), *out]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_method_says_what_the_student_is_and_the_command_line_has_the_last_word(config: Any) -> None:
    mip = config("method.second=0.2", method="mip")
    assert mip.policy.sampler["times"] == [1.0, 0.2]
    assert (mip.policy.prediction, mip.policy.initial_noise, mip.warm_start) == ("x0", 0.0, False)
    ctm = config("policy.sampler.num_steps=2", "train.precision=auto", "--steps", "77", method="ctm")
    assert (ctm.policy.target_time, ctm.policy.sampler["num_steps"], ctm.train.steps) == (True, 2, 77)
    assert ctm.train.precision == "auto"
    assert ctm.policy.net["dropout"] == 0.0


def test_non_inferiority_is_stated_three_ways(teacher: str) -> None:
    spec = TaskSpec(str(TASK["name"]), {"max_episode_steps": 7})
    done = evaluate(load_policy(teacher), spec, range(40), num_envs=40, progress=False)

    def result(successes: int) -> str:
        both = []
        for count in (20, successes):
            episodes = [e.model_copy(update={"success": i < count}) for i, e in enumerate(done.episodes)]
            both.append(done.model_copy(update={"episodes": tuple(episodes)}))
        return non_inferiority(compare(both))

    assert result(20).startswith("no verdict")
    assert result(30).startswith("not worse by 2%")
    assert result(5).startswith("worse by more than 2%")


def test_pairs_without_a_disagreement_settle_a_margin_only_when_there_are_enough(teacher: str) -> None:
    """A student that is worse by 2 % agrees with its teacher on 97 seeds with a probability of .98^97 = .14, on 200 of .018."""
    spec = TaskSpec(str(TASK["name"]), {"max_episode_steps": 7})
    done = evaluate(load_policy(teacher), spec, range(1), num_envs=1, progress=False)

    def result(pairs: int) -> str:
        episodes = tuple(done.episodes[0].model_copy(update={"seed": seed}) for seed in range(pairs))
        return non_inferiority(compare([done.model_copy(update={"episodes": episodes})] * 2))

    assert result(97).startswith("no verdict")
    assert result(200).startswith("not worse by 2%")


def test_few_episodes_are_no_proof_that_a_student_is_worse(teacher: str) -> None:
    """Four of four lost: the approximate interval is clear of the margin, the exact test says p = .125."""
    spec = TaskSpec(str(TASK["name"]), {"max_episode_steps": 7})
    done = evaluate(load_policy(teacher), spec, range(4), num_envs=4, progress=False)
    all_or_none = [tuple(e.model_copy(update={"success": success}) for e in done.episodes) for success in (True, False)]
    comparison = compare([done.model_copy(update={"episodes": episodes}) for episodes in all_or_none])
    assert comparison.pairs[0].success.high < -MARGIN
    assert comparison.pairs[0].mcnemar.p_value == 0.125
    assert non_inferiority(comparison).startswith("no verdict")
