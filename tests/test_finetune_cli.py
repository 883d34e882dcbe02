"""`robopolicy finetune`: what it configures, what it says, what it leaves behind; and the page that describes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toys import Dot

from robopolicy.cli import main
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.evaluate.record import load_evaluation
from robopolicy.evaluate.run import SEEDS
from robopolicy.policy import Policy, PolicyConfig
from robopolicy.rl import diagnose, finetune
from robopolicy.rl.config import preset
from robopolicy.rl.guard import Collapse
from robopolicy.train.metrics import read_metrics

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "finetune.md").read_text()
POLICY = {
    "n_obs_steps": 1,
    "horizon": 2,
    "n_action_steps": 2,
    "net": {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8},
    "sampler": {"type": "euler", "num_steps": 2},
    "default_normalize": "identity",
}
TINY = [
    "env.num_envs=6",
    "env.num_chunks=4",
    "env.reward.source=task",
    "iterations=4",
    "ppo.value_only_iterations=1",
    "ppo.minibatch_size=12",
    "value.width=16",
    "method.num_steps=2",
    "eval.every=2",
    "eval.episodes=6",
    "eval.test_episodes=8",
    "eval.films=2",
]


def save(folder: Path) -> Path:
    torch.manual_seed(0)
    normalizers = {"x": Normalizer(2, "identity"), "action": Normalizer(2, "identity")}
    policy = Policy(parse(PolicyConfig, POLICY), {"x": Dot.observation_features["x"]}, Dot.action_feature, normalizers)
    return policy.save(folder, {"task": {"name": "toys:Dot", "args": {"max_episode_steps": 7}}})


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(save(tmp_path / "base"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["finetune", *arguments, "--print-config"]) == 0
    value: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return value


# -- configuration -----------------------------------------------------------------------------------------------------------


def test_defaults_lie_below_the_preset_and_the_preset_below_the_command_line(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed(capsys, base, "--method", "fpo", "--preset", "paper_square", "method.clip=0.5", "seed=3")
    assert config["method"]["clip"] == 0.5  # the command line
    assert config["method"]["huber_delta"] == 1.0  # the preset
    assert config["method"]["perturb_std"] == 0.0  # the default
    assert config["env"]["num_chunks"] == 100
    assert config["seed"] == 3
    assert config["base"] == base


def test_method_preset_name_and_task_have_defaults(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, base)
    assert config["method"]["type"] == "dppo"
    assert config["method"].items() >= preset("dppo", "cpu")["method"].items()
    assert config["name"] == "Dot_dppo"
    assert config["task"] == {"name": "toys:Dot", "args": {"max_episode_steps": 7}}


def test_the_task_can_be_changed(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, base, "--task-arg", "max_episode_steps=5")
    assert config["task"] == {"name": "toys:Dot", "args": {"max_episode_steps": 5}}
    assert printed(capsys, base, "--task", "sparse_reach")["task"] == {"name": "sparse_reach", "args": {}}


def test_a_method_of_ones_own_needs_no_preset(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = "robopolicy.rl.heads.reinflow:ReinFlow"
    assert printed(capsys, base, "--method", path)["method"]["type"] == path
    assert main(["finetune", base, "--method", path, "--preset", "cpu"]) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        ([], "give either a checkpoint"),
        (["ppo.lr=1"], "is an override; name the checkpoint first"),
        ([".", "--method", "dpo"], "did you mean 'dppo'?"),
        ([".", "--resume", "x"], "--resume goes alone"),
        (["--resume", "x", "--preset", "cpu"], "--resume goes alone"),
    ],
)
def test_errors_come_before_torch_is_imported(arguments: list[str], text: str) -> None:
    program = f"import sys; from robopolicy.cli import main; code = main({['finetune', *arguments]!r}); "
    done = subprocess.run(
        [sys.executable, "-c", program + "sys.exit(99 if 'torch' in sys.modules else code)"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["ppo.lrr=1"], "unknown key 'ppo.lrr': did you mean 'lr'?"),
        (["method.clipp=1"], "did you mean 'clip'?"),
        (["--preset", "papr"], "did you mean 'paper'?"),
        (["--task", "toys:Dott"], "task 'toys:Dott' cannot be imported"),
        (["--task-arg", "radius=1"], "takes no argument 'radius'"),
    ],
)
def test_other_errors_are_one_line(base: str, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", base, *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not list(Path("outputs").rglob("checkpoints"))


def test_presets_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--list-presets"]) == 0
    listed = capsys.readouterr().out
    for text in ("dppo paper_furniture", "fpo cpu", "arXiv 2505.22094", "policyflow paper", "gaussian cpu"):
        assert text in listed
    assert main(["finetune", "--list-presets", "--method", "fpo"]) == 0
    assert "dppo paper" not in capsys.readouterr().out


# -- runs --------------------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_paired_test_films_and_a_report(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("outputs/Dot_reinflow")
    assert main(["finetune", base, "--method", "reinflow", *TINY]) == 0
    said = capsys.readouterr().out
    assert f"robopolicy eval {out}" in said
    assert f"robopolicy compare {base} {out} --task toys:Dot --task-arg max_episode_steps=7" in said
    assert "B - A on 8 shared seeds (200000 to 200007)" in said
    before, after = (load_evaluation(out / "test" / name / "eval.json") for name in ("base", "result"))
    assert before.seeds.tolist() == after.seeds.tolist() == list(range(SEEDS["test"], SEEDS["test"] + 8))
    assert before.policy == base
    assert before.settings.sampler is not None
    assert before.settings.sampler["type"] == "euler"  # its own
    assert after.settings.sampler is not None
    assert after.settings.sampler["type"] == "ddim"
    comparison = json.loads((out / "test" / "comparison.json").read_text())
    assert comparison["run"]["iterations"] == comparison["run"]["checkpoint"] == 4
    assert comparison["run"]["env_steps"] > 100
    report = (out / "report.html").read_text()
    assert report.count("data:video/mp4") == 4
    assert report.index("before: ") < report.index("after: ")
    assert report.count("seed 200000,") == 2
    for text in ("Before and after", "McNemar", 'class="band"', "explained variance", "after all of its iterations", "4 of 4"):
        assert text in report, text
    assert "http" not in re.sub(r'xmlns="[^"]*"|base64,[^"]*', "", report)
    assert main(["eval", str(out), "--episodes", "8", "--num-envs", "8"]) == 0  # every other verb takes the result
    assert load_evaluation(out / "eval" / "Dot_200000_8" / "eval.json").successes.tolist() == after.successes.tolist()


def test_tensorboard_has_success_against_environment_steps_and_keeps_it_over_a_resume(base: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, quick = Path("run"), ["method.tuned_steps=1", "eval.test_episodes=0", "eval.films=0"]
    assert main(["finetune", base, "--out", str(out), *TINY, *quick]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "iterations": 6}))
    assert main(["finetune", "--resume", str(out)]) == 0
    events = EventAccumulator(str(out / "tensorboard" / "env_steps"))
    events.Reload()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "eval/success" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for key in ("eval/success", "eval/success_low", "eval/success_high"):
        points = [(event.step, event.value) for event in events.Scalars(key)]
        assert points == [(int(row["train/env_steps"]), pytest.approx(row[key])) for row in rows]


def test_a_finished_run_can_be_resumed_which_makes_the_report_again(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("run")
    assert main(["finetune", base, "--out", str(out), *TINY, "method.tuned_steps=1", "eval.films=0"]) == 0
    first = capsys.readouterr().out
    (out / "report.html").unlink()
    assert main(["finetune", "--resume", str(out)]) == 0
    assert capsys.readouterr().out == first
    assert "data:video" not in (out / "report.html").read_text()
    assert main(["finetune", "--resume", str(out)]) == 0
    assert "iterations are done and tested; raise iterations in" in capsys.readouterr().out


def test_runs_of_train_and_finetune_are_told_apart(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path("run")
    assert main(["finetune", base, "--out", str(out), *TINY, "method.tuned_steps=1", "eval.films=0"]) == 0
    assert main(["train", "--resume", str(out)]) == 2
    assert "is a run of finetune: go on with robopolicy finetune --resume" in capsys.readouterr().err
    (out / "config.yaml").write_text("name: x\ndata: {path: y, observations: [x]}\n")
    assert main(["finetune", "--resume", str(out)]) == 2
    assert "is a run of train" in capsys.readouterr().err


def test_a_task_that_does_not_fit_leaves_no_config(base: str) -> None:
    assert main(["finetune", base, "--out", "other", "--task", "reach", *TINY, "method.tuned_steps=1"]) == 2
    assert not Path("other/config.yaml").exists()


def test_a_signal_leaves_a_report_without_a_test(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_log, calls = finetune.Finetuner._log, []

    def stop_after(self: finetune.Finetuner, *rest: Any) -> None:
        save_log(self, *rest)
        calls.append(self.iteration)
        if self.iteration == 3:
            self.stop_signal = 2

    monkeypatch.setattr(finetune.Finetuner, "_log", stop_after)
    assert main(["finetune", base, "--out", "run", *TINY, "method.tuned_steps=1"]) == 130
    assert "stopped; continue with: robopolicy finetune --resume run" in capsys.readouterr().out
    assert not Path("run/test").exists()
    report = Path("run/report.html").read_text()
    assert "stopped by a signal" in report
    assert "3 of 4" in report
    assert "before: " not in report


def test_a_collapse_has_an_exit_code_of_its_own(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watch:
        history: list[Any] = []
        best: tuple[float, float, int] | None = None

        def __init__(self, config: Any) -> None: ...

        def __call__(self, iteration: int, scores: Any) -> Collapse | None:
            if iteration == 2:
                self.best = (0.9, 0.1, 2)
            return Collapse(0.9, 2, 0.1) if iteration == 4 else None

    monkeypatch.setattr(finetune, "Guard", Watch)
    assert main(["finetune", base, "--out", "run", *TINY, "method.tuned_steps=1"]) == 3
    said = capsys.readouterr()
    assert "collapse: " in said.err
    assert "iteration 4, " in said.out
    assert "step_00000002" in said.out
    report = Path("run/report.html").read_text()
    assert "its policy collapsed; the last checkpoint is that of iteration 2" in report
    assert "Before and after" in report
    run = json.loads(Path("run/test/comparison.json").read_text())["run"]
    assert run["checkpoint"] == 2


def test_findings_are_told_on_the_way_and_in_the_report(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnose, "RATIO_MAX", 1.0)
    assert main(["finetune", base, "--out", "run", *TINY, "method.tuned_steps=1", "eval.test_episodes=0", "eval.films=0"]) == 0
    assert capsys.readouterr().err.count("warning: iteration 2: a ratio of new to old policy reached") == 1
    assert "iteration 2: a ratio of new to old policy reached" in Path("run/report.html").read_text()
    assert not Path("run/test").exists()


# -- the page ----------------------------------------------------------------------------------------------------------------


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}[^\n]*\n(.*?)```", PAGE, flags=re.S)


def test_the_commands_of_the_page_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lift_diffusion", "lift_flow"):
        save(tmp_path / "outputs" / name)
    (scratch,) = blocks("yaml")
    Path("scratch.yaml").write_text(scratch)
    commands = [line.split() for block in blocks("console") for line in block.strip().splitlines()]
    assert len(commands) == 6
    for _, verb, *arguments in commands:
        if "--resume" not in arguments:
            assert main([verb, *arguments, "--print-config"]) == 0


def test_the_scratch_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (scratch,) = blocks("yaml")
    Path("scratch.yaml").write_text(scratch)
    assert main(["finetune", "scratch.yaml", "--method", "fpo", "--out", "run", *TINY, "iterations=2", "eval.films=0"]) == 0
    assert Path("run/report.html").exists()
    assert main(["eval", "run", "--episodes", "4"]) == 0


def test_the_python_of_the_page_runs(base: str) -> None:
    save(Path("outputs/lift_flow"))
    (code,) = blocks("python")
    tiny = '"iterations": 2, "env": {"num_envs": 4, "num_chunks": 4}, "eval": {"episodes": 4, "test_episodes": 6, "films": 0}}'
    short = code.replace('{"name": "lift"}', '{"name": "toys:Dot"}').replace('"iterations": 100}', tiny)
    assert short.count("toys:Dot") == short.count("test_episodes") == 1
    names: dict[str, Any] = {}
    exec(short, names)
    assert names["code"] == 0
    assert names["comparison"].shared == 6
    assert Path("outputs/mine/report.html").exists()
