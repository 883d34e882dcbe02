"""`robopolicy compose`: what it prints and writes, that other verbs take the result, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import Dot

from robopolicy.cli import main
from robopolicy.compose.policy import Composed, compose
from robopolicy.compose.search import _alone, simplex
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.chunk import Previous
from robopolicy.deploy.planner import make_planner
from robopolicy.errors import ConfigError
from robopolicy.evaluate.record import load_evaluation
from robopolicy.evaluate.run import SEEDS
from robopolicy.policy import Policy, PolicyConfig, load_policy, read_provenance

TASK = {"name": "toys:Dot", "args": {"max_episode_steps": 5}}
POLICY: dict[str, Any] = {
    "n_obs_steps": 1,
    "horizon": 2,
    "n_action_steps": 2,
    "net": {"type": "mlp", "width": 8, "depth": 1, "time_dim": 4},
    "encoder": {"type": "multimodal", "rgb": {"widths": [16]}},
    "default_normalize": "identity",
}
KINDS: dict[str, Any] = {
    "x": {"path": {"type": "flow"}, "prediction": "flow", "sampler": {"type": "euler", "num_steps": 2}},
    "image": {"path": {"type": "vp_cosine"}, "prediction": "v", "sampler": {"type": "ddim", "num_steps": 2}},
}


def save(folder: Path, observed: str) -> str:
    torch.manual_seed(0)
    features = {observed: Dot.observation_features[observed]}
    normalizers = {name: Normalizer(2, "identity") for name in ("x", "action")}
    policy = Policy(parse(PolicyConfig, {**POLICY, **KINDS[observed]}), features, Dot.action_feature, normalizers)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return str(policy.save(folder, {"task": TASK}))


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("parents")
    return [save(folder / "state", "x"), save(folder / "camera", "image")]


@pytest.fixture(scope="module")
def composed(parents: list[str]) -> str:
    folder = str(Path(parents[0]).parent / "both")
    assert main(["compose", *parents, "--weights", "0.6", "0.4", "--out", folder]) == 0
    return folder


def test_the_result_is_a_policy_that_says_where_it_comes_from(composed: str, parents: list[str]) -> None:
    policy = load_policy(composed)
    assert isinstance(policy, Composed)
    assert policy.config.weights == (0.6, 0.4)
    assert set(policy.observation_features) == {"x", "image"}
    source = read_provenance(composed)
    assert source["task"] == TASK
    assert source["method"]["weights"] == [0.6, 0.4]
    assert [Path(one["checkpoint"]) for one in source["parents"]] == [Path(parent).resolve() for parent in parents]


def test_other_verbs_take_it(composed: str, parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", composed, "--episodes", "3", "--steps", "3", "--out", str(tmp_path / "eval")]) == 0
    assert main(["compare", composed, parents[0], "--episodes", "3", "--out", str(tmp_path / "compare")]) == 0
    assert main(["eval", composed, "--episodes", "3", "--noise", ".5", "--out", str(tmp_path / "less")]) == 0
    assert main(["compose", *parents, "--weights", "0.6", "0.4", "--noise", ".5", "--out", str(tmp_path / "own")]) == 0
    assert load_policy(tmp_path / "own").config.initial_noise == 0.5
    assert main(["eval", str(tmp_path / "own"), "--episodes", "3", "--out", str(tmp_path / "own_less")]) == 0
    less, own = (load_evaluation(tmp_path / name / "eval.json") for name in ("less", "own_less"))
    assert less.episodes == own.episodes
    assert less.settings.initial_noise == own.settings.initial_noise == 0.5
    store = str(tmp_path / "rollouts.zarr")
    assert main(["data", "rollout", composed, "--episodes", "3", "--out", store]) == 0
    tiny = [
        *("env.num_envs=3", "env.num_chunks=2", "iterations=2", "ppo.value_only_iterations=0", "ppo.minibatch_size=6"),
        *(
            "value.width=8",
            "method.num_steps=2",
            "method.tuned_steps=1",
            "eval.episodes=0",
            "eval.test_episodes=0",
            "eval.films=0",
        ),
        *("env.reward.source=task", "ppo.bc.weight=0.1", "ppo.bc.source=base"),
    ]
    tuned = str(tmp_path / "tuned")
    assert main(["finetune", composed, "--method", "dppo", "--out", tuned, *tiny]) == 0
    before, after = load_policy(composed), load_policy(tuned)
    assert isinstance(after, Composed)
    changed = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    assert any(name.startswith("parents.0.net") for name in changed)
    assert any(name.startswith("parents.1.net") for name in changed)
    assert not any("encoder" in name or "normalizers" in name for name in changed)
    capsys.readouterr()
    # what was tuned is composed again, and weights are predicted from what the first composition did
    again = tmp_path / "again"
    assert main(["compose", tuned, parents[1], "--data", store, "--out", str(again)]) == 0
    assert "predicted weights" in capsys.readouterr().out
    assert main(["eval", str(again), "--episodes", "2", "--out", str(tmp_path / "eval_again")]) == 0


def test_a_search_chooses_on_some_seeds_and_tests_on_others(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--points", "3", "--search-episodes", "4", "--episodes", "6", "--on", "score", "--num-envs", "6"]
    assert main(["compose", *parents, "--search", *settings, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "no weights are predicted" in err
    assert "verdict:" in out
    value = json.loads((tmp_path / "compose.json").read_text())
    assert [point["weights"] for point in value["search"]["points"]] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert value["search"]["seeds"] == list(range(SEEDS["search"], SEEDS["search"] + 4))
    assert value["test"]["seeds"] == list(range(SEEDS["test"], SEEDS["test"] + 6))
    scores = [point["mean_max_reward"]["mean"] for point in value["search"]["points"]]
    assert value["weights"] == value["search"]["points"][scores.index(max(scores))]["weights"]
    names = [control["name"] for control in value["test"]["controls"]]
    assert names[:3] == ["parent A, same sampler", "parent B, same sampler", "parent B as it came"]
    assert names[3] in ("parent A, 2x the steps", "parent B, 2x the steps")
    policy = load_policy(tmp_path)
    assert isinstance(policy, Composed)
    assert list(policy.config.weights) == value["weights"]
    page = (tmp_path / "report.html").read_text()
    assert "Against its controls" in page
    assert "verdict" in page or "best single parent" in page
    assert (tmp_path / "eval" / "composition" / "eval.json").exists()


def test_a_scale_of_guidance_is_found_beyond_the_first_parent(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--points", "3", "--search-episodes", "3", "--episodes", "3", "--num-envs", "3"]
    assert main(["compose", *parents, "--rule", "guidance", "--search", *settings, "--out", str(tmp_path)]) == 0
    value = json.loads((tmp_path / "compose.json").read_text())
    assert [point["weights"] for point in value["search"]["points"]] == [[1, 0], [2, -1], [3, -2]]
    assert value["predicted"] is None
    assert not any("equal" in control["name"] for control in value["test"]["controls"])
    assert ("parent A alone" in capsys.readouterr().out) == (value["weights"] == [1, 0])
    assert load_policy(tmp_path).config.rule == "guidance"  # type: ignore[attr-defined]


def test_a_superposition_is_tested_against_its_own_noise(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--rule", "and", "--search", "--search-episodes", "2", "--episodes", "3", "--steps", "4", "--num-envs", "3"]
    assert main(["compose", *parents, *settings, "path.type=vp_cosine", "--out", str(tmp_path)]) == 0
    value = json.loads((tmp_path / "compose.json").read_text())
    assert value["search"] is None
    assert value["sampler"]["num_steps"] == 4
    assert value["path"]["type"] == "vp_cosine"
    assert "mean, same stochastic sampler" in [control["name"] for control in value["test"]["controls"]]
    assert load_policy(tmp_path).config.model_dump()["rule"] == "and"
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"policy  {tmp_path}   and"
    assert "predicted" not in out + err  # it has no weights
    assert value["predicted"] is None


def test_alone_is_alone_also_by_the_stochastic_sampler(parents: list[str]) -> None:
    loaded = [load_policy(parent) for parent in parents]
    both = compose(loaded, rule="and", path=loaded[0].config.path)
    alone = _alone(both, 0)
    assert alone.sampler.eta == 1
    assert alone.sampler.num_steps(alone.path) == both.sampler.num_steps(both.path)
    obs = {name: np.zeros((2, 1, *f.shape), f.dtype) for name, f in both.observation_features.items()}
    own = loaded[0].varied(sampler=alone.config.sampler)
    chunks = [policy.act(obs, torch.Generator().manual_seed(0)) for policy in (alone, own)]
    assert np.array_equal(*chunks)


def test_a_product_and_three_parents(parents: list[str], tmp_path: Path) -> None:
    settings = ["--search", "--points", "2", "--search-episodes", "2", "--episodes", "2", "--num-envs", "2"]
    overrides = ["sampler.type=ddim", "sampler.num_steps=2", "sampler.clip=2.0"]
    assert main(["compose", *parents, parents[0], "--rule", "product", *settings, *overrides, "--out", str(tmp_path)]) == 0
    value = json.loads((tmp_path / "compose.json").read_text())
    assert len(value["search"]["points"]) == 3
    assert sum(value["weights"]) == pytest.approx(3)
    assert load_policy(tmp_path).config.sampler["clip"] == 2.0


def test_found_and_predicted_weights_are_shown_on_one_scale(
    composed: str, parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = str(tmp_path / "rollouts.zarr"), str(tmp_path / "product")
    assert main(["data", "rollout", composed, "--episodes", "3", "--out", store]) == 0
    search = ["--search", "--points", "2", "--search-episodes", "2", "--episodes", "2", "--num-envs", "2", "--data", store]
    assert main(["compose", *parents, "--rule", "product", *search, "--out", out]) == 0
    said = capsys.readouterr().out
    shown = re.search(r"weights found (.*) \(shares (.*)\), predicted for a mean (.*)\n", said)
    assert shown is not None, said
    found, shares, predicted = ([float(word) for word in text.split()] for text in shown.groups())
    assert sum(found) == pytest.approx(2)
    assert sum(shares) == pytest.approx(1)
    assert sum(predicted) == pytest.approx(1, abs=0.011)


def test_weights_in_equal_steps() -> None:
    assert simplex(2, 3) == [(0, 1), (0.5, 0.5), (1, 0)]
    assert len(simplex(3, 5)) == 15
    assert all(sum(row) == pytest.approx(1) for row in simplex(3, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "two checkpoints or more"),
        (["A", "B", "--weights", "1"], "gives 1 for 2 parents"),
        (["A", "B", "--rule", "or", "--weights", "1", "0"], "drop --weights"),
        (["A", "B", "--search", "--weights", "1", "0"], "drop --weights"),
        (["A", "B", "--search", "--seeds", "search"], "chosen on those"),
        (["A", "B", "--search", "--seeds", "300050"], "overlap with search seeds"),
        (["A", "B", "--search", "--points", "1"], "at least 2"),
        (["A", "B", "--points", "3", "--on", "score"], "add --search, or drop --points, --on"),
        (["A", "B", "--search-episodes", "100"], "add --search, or drop --search-episodes"),
        (["A", "B", "--episodes", "200"], "add --search, or drop --episodes"),
        (
            ["A", "B", "--seeds", "test", "--num-envs", "50", "--workers", "0", "--noise-seed", "0"],
            "drop --seeds, --num-envs, --wo",
        ),
        (["A", "B", "--rule", "and", "--search", "--points", "3"], "no weights to try"),
        (["A", "B", "--rule", "or", "--data", "any.zarr"], "rule 'or' has none"),
        (["A", "B", "--rule", "guidance", "--data", "any.zarr"], "found by --search alone"),
        (["A", "B", "--rule", "guidance", "--weights", "1.5", "0.5"], "1 - scale"),
        (["A", "B", "--weights", "0.5", "0.6"], "with sum 1"),
        (["A", "nowhere"], "'nowhere' does not exist"),
        (["A", "B", "sampler.type=jump"], "has no way"),
        (["A", "B", "rulle=and"], "unknown key 'rulle'"),
        (["A", "B", "--data", "nowhere.zarr"], "nowhere.zarr"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"A": parents[0], "B": parents[1]}
    assert main(["compose", *(named.get(a, a) for a in arguments), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("robopolicy compose: ")
    assert message in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compose", "--help"])
    out = capsys.readouterr().out
    assert "robopolicy compose outputs/a outputs/b --search" in out
    assert "300000" in out


def test_a_report_of_before_is_not_taken_for_that_of_the_new_policy(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compose.json").write_text("{}")  # its policy was removed
    assert main(["compose", *parents, "--out", str(tmp_path)]) == 2
    assert "holds the report of another composition" in capsys.readouterr().err
    assert not (tmp_path / "policy.json").exists()


def test_the_page_s_cost_goes_through_every_verb(
    parents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "compose.md").read_text()
    (code,) = re.findall(r"```python file=cost.py\n(.*?)```", page, flags=re.S)
    (tmp_path / "cost.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = re.findall(r"outputs/b (path.type=flow sampler.type=cost:Right sampler.strength=20) --out", page)[0].split()
    out = str(tmp_path / "right")
    assert main(["compose", *parents, *settings, "sampler.num_steps=4", "--out", out]) == 0
    guided = load_policy(out)
    plain = guided.varied(sampler={"type": "euler", "num_steps": 4})
    obs = {"x": torch.zeros(64, 1, 2), "image": torch.zeros(64, 1, 16, 16, 3, dtype=torch.uint8)}
    actions = [policy.act(obs, torch.Generator().manual_seed(0)) for policy in (guided, plain)]
    short, before = (np.clip(0.5 - action[..., 1], 0, None).mean() for action in actions)
    assert short < before / 2, f"{short} below .5 with the cost, {before} without"
    for kind in ("plain", "rti", "bid"):
        assert np.isfinite(make_planner(kind, guided).plan(obs, None, 0, torch.Generator().manual_seed(0))).all()
    identity = make_planner({"type": "rtc", "jacobian": "identity"}, guided)
    for previous in (None, Previous(np.zeros((1, 2, 2), np.float32), np.array([2]))):
        assert np.isfinite(identity.plan({n: v[:1] for n, v in obs.items()}, previous, 1, torch.Generator().manual_seed(0))).all()
    with pytest.raises(ConfigError, match="streaming' walks by itself"):
        make_planner("streaming", guided)
    assert main(["eval", out, "--episodes", "2", "--num-envs", "2"]) == 0
    capsys.readouterr()
    assert main(["eval", out, "--episodes", "2", "--delay", "1", "--executor", "rtc"]) == 2
    said = capsys.readouterr().err
    assert "rtc with jacobian identity" in said
    assert said.count("\n") == 1
    assert main(["export", out]) == 2
    assert capsys.readouterr().err.startswith("robopolicy export: sampler 'cost:Right' walks in a way of its own")
