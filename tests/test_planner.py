"""Planners, and evaluation under delay: shapes, anchors, memory, and what each does where the answer is known."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robopolicy.cli import main
from robopolicy.compose.policy import compose
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.chunk import Previous
from robopolicy.deploy.delayed import evaluate_delayed, replan_interval
from robopolicy.deploy.export import export
from robopolicy.deploy.planner import BID, PLANNERS, RTI, Planner, Streaming, make_planner
from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.evaluate.record import load_evaluation
from robopolicy.evaluate.run import evaluate
from robopolicy.features import Feature
from robopolicy.policy import Policy, PolicyConfig
from robopolicy.task import TaskSpec

DOT = TaskSpec("toys:Dot", {"max_episode_steps": 23})
KINDS = sorted(PLANNERS)


def policy(seed: int = 0, std: float = 0.1, **changes: Any) -> Policy:
    """One that observes the position of a dot and commands displacements, with random weights."""
    value = {
        "n_obs_steps": 2,
        "horizon": 9,
        "n_action_steps": 4,
        "sampler": {"type": "euler", "num_steps": 4},
        "net": {"type": "mlp", "width": 16, "depth": 1},
        "encoder": {"type": "state"},
    }
    config = parse(PolicyConfig, {**value, **changes})
    rng = np.random.default_rng(seed)
    rows = config.horizon if config.normalize_per_step else 1
    normalizers = {
        "x": Normalizer.fit(rng.normal(0, 0.5, size=(50, 2))),
        "action": Normalizer.fit(rng.normal(0.2, 0.5, size=(50, 2 * rows)), "meanstd"),
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = Policy(config, {"x": Feature("x", (2,))}, Feature("action", (2,), rate=10.0), normalizers)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=std)
    return made.eval()


def trained_for(kind: str, **changes: Any) -> Policy:
    losses = {"rtc_trained": {"prefix": 4}, "streaming": {"staircase": 0.5, "stairs": 2}}
    return policy(loss=losses.get(kind, {}), **changes)


def seen(batch: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, 2, 2)).astype(np.float32)}


def generators(batch: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(batch)]


def previous(known: list[int], seed: int = 2, rows: int = 8) -> Previous:
    actions = np.random.default_rng(seed).normal(0.2, 0.5, size=(len(known), rows, 2)).astype(np.float32)
    return Previous(actions, np.array(known))


RELATIVE = {"action": {"type": "relative", "reference": ["x"]}, "normalize_per_step": True}


DIFFUSION = {"path": {"type": "vp_cosine"}, "prediction": "eps", "sampler": {"type": "ddim", "num_steps": 4, "clip": 3.0}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, RELATIVE, DIFFUSION], ids=["absolute", "relative", "diffusion"])
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.inference_mode])
def test_every_planner_plans_all_rows_from_now_on(kind: str, changes: dict[str, Any], outside: type) -> None:
    planner = make_planner(kind, trained_for(kind, **changes))
    with outside():
        first = planner.plan(seen(), None, 2, generators())
        planner.reset([1])
        second = planner.plan(seen(), previous([5, 0, 8]), 2, generators())
    for actions in (first, second):
        assert actions.shape == (3, 8, 2)
        assert actions.dtype == np.float32
        assert np.abs(actions).max() < 50
    assert planner.calls > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delay", [0, 2])
def test_without_a_previous_plan_it_is_a_plain_sample(kind: str, delay: int) -> None:
    made = trained_for(kind)
    expected = make_planner("plain", made).plan(seen(), None, 0, generators())
    planner = make_planner({"type": kind, "samples": 1, "keep": 1} if kind == "bid" else kind, made)
    for before in (None, previous([0, 0, 0])):
        planner.reset()
        np.testing.assert_allclose(planner.plan(seen(), before, delay, generators()), expected, atol=1e-5)
    np.testing.assert_array_equal(expected[:, :4], made.act(seen(), generators()))


@pytest.mark.parametrize("changes", [{}, RELATIVE], ids=["absolute", "relative"])
def test_what_is_carried_out_is_anchored_to_the_new_observation(changes: dict[str, Any]) -> None:
    """Encoded against the observation of now, decoded against it again, known rows are what they were, in units."""
    made = policy(**changes)
    planner, before, obs = make_planner("rtc", made), previous([8, 5, 1]), made.observe(seen())
    old = planner._old(before, obs, np.array([3, 1, 0]))
    again = made.decode(old.chunk, obs, slice(1, None))
    for row, known in enumerate(before.known):
        np.testing.assert_allclose(again[row, :known], before.actions[row, :known], atol=1e-5)
        np.testing.assert_allclose(again[row, known:], np.broadcast_to(before.actions[row, known - 1], (8 - known, 2)), atol=1e-5)
    assert old.settled.tolist() == [3, 1, 0]


@pytest.mark.parametrize("kind", ["rtc", "rtc_trained"])
def test_settled_rows_come_out_near_what_they_were(kind: str) -> None:
    made, before = trained_for(kind, sampler={"type": "euler", "num_steps": 20}), previous([8, 8, 8])
    plain = make_planner("plain", made).plan(seen(), None, 0, generators())
    planned = make_planner(kind, made).plan(seen(), before, 4, generators())
    settled = np.abs(planned - before.actions)[:, :4].mean()
    assert settled < 0.35 * np.abs(plain - before.actions)[:, :4].mean()
    if kind == "rtc_trained":
        assert settled < 1e-5


@pytest.mark.parametrize("family", [{}, DIFFUSION], ids=["flow", "diffusion"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_the_identity_jacobian_never_moves_settled_rows_past_the_old_chunk(family: dict[str, Any], steps: int) -> None:
    sampler = {**family.get("sampler", {"type": "euler"}), "num_steps": steps}
    made, before = policy(**{**family, "sampler": sampler}), previous([8, 8, 8])
    identity = {"type": "rtc", "jacobian": "identity"}
    if steps == 1:
        with pytest.raises(ConfigError, match=r"5 times the way to the old chunk"):
            make_planner(identity, made)
        identity |= {"limit": 1.0}
    plain = make_planner("plain", made).plan(seen(), None, 0, generators())
    planned = make_planner(identity, made).plan(seen(), before, 4, generators())
    ended, unmoved = (np.abs(chunk - before.actions)[:, :4].mean((1, 2)) for chunk in (planned, plain))
    assert (ended < 0.5 * unmoved).all()


def test_a_one_step_policy_finds_the_noise_of_what_is_carried_out() -> None:
    """The chunk that is carried out came from some noise; the planner comes near to it, and stays within the policy's range."""
    made = policy(sampler={"type": "euler", "num_steps": 1}, std=0.3)
    target = make_planner("plain", made).plan(seen(), None, 0, [torch.Generator().manual_seed(s) for s in (50, 51, 52)])
    before = Previous(target, np.array([8, 8, 8]))

    def distance(setting: dict[str, Any]) -> float:
        planned = make_planner({"type": "rtc", "schedule": "ones", **setting}, made).plan(seen(), before, 4, generators())
        return float(np.square(planned - target).mean())

    one = distance({"candidates": 1, "iterations": 0})
    assert distance({"candidates": 16, "iterations": 0}) < 0.8 * one
    assert distance({"candidates": 1, "iterations": 5}) < 0.3 * one


def test_rti_takes_few_steps_from_the_guess_and_all_from_the_start() -> None:
    made = policy()
    planner = make_planner({"type": "rti", "steps": 2, "t_start": 0.01, "noise": 0.0}, made)
    before = previous([8, 8, 8])
    planned = planner.plan(seen(), before, 0, generators())
    assert planner.calls == 2
    np.testing.assert_allclose(planned, before.actions, atol=0.05)  # so late that hardly anything changes
    plain = make_planner("plain", made).plan(seen(), None, 0, generators())
    full = make_planner({"type": "rti", "steps": 4, "t_start": 1.0}, made).plan(seen(), before, 0, generators())
    np.testing.assert_allclose(full, plain, atol=1e-5)


def test_rti_starts_earlier_where_the_observation_has_changed() -> None:
    made, still, before = policy(), seen(), previous([8, 8, 8])
    planner = make_planner({"type": "rti", "t_start": 0.05, "t_change": 10.0, "quiet": 0.05, "noise": 0.0}, made)
    assert isinstance(planner, RTI)
    moved = {"x": still["x"].copy()}
    moved["x"][1] += 5.0
    planner.plan(still, before, 0, generators())
    planned = planner.plan(moved, before, 0, generators())
    plain = make_planner("plain", made).plan(moved, None, 0, generators())
    np.testing.assert_allclose(planned[1], plain[1], atol=1e-5)  # nothing is left of the guess
    assert np.abs(planned[0] - before.actions[0]).max() < 0.3
    assert np.abs(plain[0] - before.actions[0]).max() > 0.5


def test_rti_lets_a_discrete_channel_flip() -> None:
    made, before = policy(), Previous(np.full((3, 8, 2), 1.2, np.float32), np.array([8, 8, 8]))
    planned = make_planner({"type": "rti", "t_start": 0.01, "noise": 0.0, "columns": [1], "limit": 0.1}, made).plan(
        seen(), before, 0, generators()
    )
    np.testing.assert_allclose(planned[:, :, 0], 1.2, atol=0.05)
    assert planned[:, :, 1].max() < 0.6
    with pytest.raises(ConfigError, match="columns"):
        make_planner({"type": "rti", "columns": [2]}, made)


def test_streaming_rows_stand_on_their_stairs_at_every_plan() -> None:
    made = trained_for("streaming")
    planner = make_planner({"type": "streaming", "steps": 1}, made)
    assert isinstance(planner, Streaming)
    heard: list[Tensor] = []
    inner = made.net.forward
    made.net.forward = lambda x, t, ctx: (heard.append(t), inner(x, t, ctx))[1]  # type: ignore[method-assign]
    planned = planner.plan(seen(), None, 2, generators())
    assert planner.calls == 4
    for _ in range(3):
        heard.clear()
        before = Previous(np.concatenate([planned[:, 2:], np.zeros((3, 2, 2), np.float32)], axis=1), np.array([6, 6, 6]))
        planned = planner.plan(seen(), before, 2, generators())
        assert planner.calls == 1
        assert heard[0].tolist() == [[0, 25, 25, 50, 50, 75, 75, 100, 100]] * 3  # row 0 is before now


def test_streaming_rows_enter_with_the_policy_s_own_noise() -> None:
    planner = make_planner("streaming", trained_for("streaming").varied(initial_noise=0.0))
    chunks = []
    for seed in range(2):
        planner.reset()
        draws = [torch.Generator().manual_seed(10 * seed + row) for row in range(3)]
        planner.plan(seen(), None, 0, draws)
        chunks.append(planner.plan(seen(), previous([6, 6, 6]), 0, draws))
    np.testing.assert_array_equal(*chunks)


def test_streaming_with_equal_levels_is_an_ordinary_policy() -> None:
    """One group of all rows: a plan takes the whole chunk from pure noise to clean, whatever was in the buffer."""
    made = trained_for("streaming", n_obs_steps=1, horizon=8)
    planner = make_planner({"type": "streaming", "group": 8, "steps": 4}, made)
    obs = {"x": seen()["x"][:, :1]}
    planned = planner.plan(obs, previous([8, 8, 8]), 0, generators())
    np.testing.assert_allclose(planned, make_planner("plain", made).plan(obs, None, 0, generators()), atol=1e-5)


def test_bid_takes_what_is_coherent() -> None:
    made, before = policy(), previous([8, 8, 8])
    planner = make_planner({"type": "bid", "samples": 32, "contrast": 0.0}, made)
    assert isinstance(planner, BID)
    planned = planner.plan(seen(), before, 0, generators())
    assert planner.calls == 32 * 4
    plain = make_planner("plain", made).plan(seen(), None, 0, generators())

    def incoherence(actions: np.ndarray) -> np.ndarray:
        return (np.square(actions - before.actions).sum(-1) * 0.9 ** np.arange(8)).sum(1)

    assert (incoherence(planned) <= incoherence(plain) + 1e-5).all()
    assert incoherence(planned).mean() < 0.8 * incoherence(plain).mean()
    with pytest.raises(ConfigError, match="keep fewer"):
        make_planner({"type": "bid", "samples": 2}, made)


def test_what_a_robot_draws_depends_on_no_other_robot() -> None:
    made = policy(sampler={"type": "ddpm", "num_steps": 4, "clip": None})
    together = make_planner("bid", made).plan(seen(), previous([8, 5, 0]), 2, generators())
    for row in range(3):
        obs, before = {"x": seen()["x"][row : row + 1]}, previous([8, 5, 0])
        own = Previous(before.actions[row : row + 1], before.known[row : row + 1])
        alone = make_planner("bid", made).plan(obs, own, 2, [generators()[row]])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_plan_that_is_no_number_is_not_hidden(kind: str, steps: int) -> None:
    made = trained_for(kind, sampler={"type": "euler", "num_steps": steps})
    planner = make_planner(kind, made)
    planner.plan(seen(), None, 2, generators())
    torch.nn.init.constant_(next(made.net.parameters()), torch.nan)
    assert np.isnan(planner.plan(seen(), previous([8, 8, 8]), 2, generators())).any()


@pytest.mark.parametrize("rule", ["convex", "and", "or"])
@pytest.mark.parametrize("kind", KINDS)
def test_compositions_are_planned_for_or_refused_with_a_reason(rule: Any, kind: str) -> None:
    made = compose([trained_for(kind), trained_for(kind, **DIFFUSION)], rule=rule)
    if rule != "convex" and kind in ("rtc", "rtc_trained", "streaming"):
        with pytest.raises(ConfigError, match="rule convex or product"):
            make_planner(kind, made)
        return
    planner = make_planner(kind, made)
    actions = planner.plan(seen(), None, 0, generators())
    if kind == "plain":
        np.testing.assert_array_equal(actions[:, :4], made.act(seen(), generators()))
    assert np.isfinite(planner.plan(seen(), previous([5, 0, 8]), 2, generators())).all()


def test_planners_that_need_training_say_so() -> None:
    with pytest.raises(ConfigError, match=r"policy\.loss\.prefix"):
        make_planner("rtc_trained", policy())
    with pytest.raises(ConfigError, match=r"policy\.loss\.staircase"):
        make_planner("streaming", policy())
    delta = policy(action={"type": "delta", "reference": ["x"]})
    with pytest.raises(ConfigError, match="type relative"):
        make_planner("rtc", delta)
    make_planner("plain", delta)
    with pytest.raises(ConfigError, match="rti"):
        make_planner("rtj", policy())


# ------------------------------------------------------------------------------------------------------------------------- delay


def test_without_delay_it_is_an_ordinary_evaluation() -> None:
    made, seeds = policy(), range(7)
    expected = evaluate(made, DOT, seeds, num_envs=7, progress=False)
    for executor in ("latest", "receding"):
        delayed = evaluate_delayed(made, DOT, seeds, delay=0, executor=executor, num_envs=7, progress=False)
        assert delayed.evaluation.episodes == expected.episodes
        assert delayed.realtime.starved == 0
        assert delayed.realtime.calls == pytest.approx(4 / 4, rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("executor", ["latest", "ensemble", "receding"])
def test_the_same_seed_gives_the_same_episode_for_any_workers_and_other_seeds(kind: str, executor: str) -> None:
    def run(seeds: list[int], workers: int = 0) -> dict[int, float]:
        made = trained_for(kind)
        done = evaluate_delayed(
            made, DOT, seeds, delay=3, planner=kind, executor=executor, num_envs=3, num_workers=workers, progress=False
        )
        return {e.seed: e.total_reward for e in done.evaluation.episodes}

    first = run([0, 1, 2, 3, 4])
    assert len(set(first.values())) == 5
    others = run([4, 0, 2])  # in other rows of the batch, which rounds differently
    assert others == pytest.approx({seed: first[seed] for seed in (0, 2, 4)}, rel=1e-4)
    if kind == "rtc":
        assert run([0, 1, 2, 3, 4], workers=2) == first


class _Clockwork(Planner):
    """Plans the number of the tick for every row, from the observation's count; records what it was given."""

    needs_previous = True

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.given: list[Previous | None] = []

    def plan(self, obs: Any, previous: Previous | None, delay: Any, generator: Any) -> np.ndarray:
        self.calls = 1
        self.given.append(previous)
        tick = obs["x"][:, -1, 1]
        return (tick[:, None] + np.arange(self.rows))[:, :, None].astype(np.float32)

    def _plan(self, *_: Any) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("delay", [0, 1, 3, 4])
def test_rows_are_carried_out_at_their_time_whatever_the_delay(delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions are the number of their tick: who goes on says 0, 1, 2, ...; who waits repeats the last while thinking."""
    features = {"x": Feature("x", (2,))}
    config = parse(
        PolicyConfig, {"n_obs_steps": 1, "horizon": 9, "n_action_steps": 4, "net": {"type": "mlp", "width": 8, "depth": 1}}
    )
    normalizers = {name: Normalizer.fit(np.random.default_rng(0).normal(size=(9, n))) for name, n in (("x", 2), ("action", 1))}
    made = Policy(config, features, Feature("action", (1,)), normalizers)
    clockwork = _Clockwork(made)
    monkeypatch.setattr("robopolicy.deploy.delayed.planner_of", lambda *_: clockwork)
    spec = TaskSpec("toys:Script", {"max_episode_steps": 30})
    said: dict[str, list[float]] = {}
    monkeypatch.setattr(
        "robopolicy.deploy.delayed._jerk", lambda episodes, rate: said.update(actions=episodes[0][:, 0].tolist()) or 0.0
    )
    went_on = evaluate_delayed(made, spec, [0], delay=delay, progress=False)
    assert said["actions"] == list(range(30))
    assert went_on.realtime.jump_p95 == 0
    assert went_on.realtime.starved == 0
    plans = clockwork.given[1:]
    assert all(p is not None and p.actions[0, 0, 0] == 4 * (k + 1) for k, p in enumerate(plans))
    assert all(p is not None and p.known[0] == 5 for p in plans)
    waited = evaluate_delayed(made, spec, [0], delay=delay, executor="receding", progress=False)
    period = 4 + delay
    observed = [0 if k < 4 else 4 + (k - 4) // period * period for k in range(30)]
    expected = []
    for k in range(30):
        if k < 4:
            expected.append(k)
        else:
            since = (k - 4) % period
            expected.append(expected[-1] if since < delay else observed[k] + since - delay)
    assert said["actions"] == expected
    assert waited.realtime.starved == pytest.approx(sum(a == b for a, b in itertools.pairwise(expected)) / 30)


def test_the_replan_interval() -> None:
    assert [replan_interval(d, 4, 20) for d in (0, 4, 6, 8)] == [4, 4, 6, 8]
    assert [replan_interval(d, 8, 15) for d in (0, 6, 7)] == [8, 8, 7]  # at 7 the plans overlap by one row: 7 + 7 < 15
    assert replan_interval(8, 8, 15) == 8  # one inference at a time, though the chunk is over a tick too soon
    assert replan_interval(0, 1, 1) == 1
    made = policy()
    with pytest.raises(EvaluationError, match="delay <= replan"):
        evaluate_delayed(made, DOT, [0], delay=5, replan=3, progress=False)
    with pytest.raises(EvaluationError, match="delay"):
        evaluate_delayed(made, DOT, [0], delay=-1, progress=False)


def test_the_eval_verb_injects_a_delay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy().save(tmp_path / "policy", {"task": {"name": "toys:Dot", "args": {}}})
    command = ["eval", str(tmp_path / "policy"), "--delay", "2", "--episodes", "3", "--out", str(tmp_path / "out")]
    assert main([*command, "--executor", "rtc"]) == 0
    assert "boundary jump" in capsys.readouterr().out
    assert len(load_evaluation(tmp_path / "out" / "eval.json").episodes) == 3
    figures = json.loads((tmp_path / "out" / "realtime.json").read_text())
    assert (figures["delay"], figures["planner"]) == (2, {"type": "rtc"})
    assert main([*command, "--executor", "rtcc"]) == 2
    assert "did you mean 'rtc'" in capsys.readouterr().err


def test_exports_bear_a_delay_where_plans_know_of_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, origin = policy(), {"task": {"name": "toys:Dot", "args": {}}}
    made.save(tmp_path / "policy", origin)
    export(made, tmp_path / "onnx", "onnx", checkpoint=tmp_path / "policy")
    figures = []
    for folder in ("policy", "onnx"):
        command = ["eval", str(tmp_path / folder), "--delay", "2", "--episodes", "3", "--out", str(tmp_path / "out")]
        for executor in ("latest", "pause", "{type: ensemble, m: 0.1}"):
            assert main([*command, "--executor", executor]) == 0
            figures.append(json.loads((tmp_path / "out" / "realtime.json").read_text()))
    for ours, theirs in zip(figures[:3], figures[3:], strict=True):
        assert theirs == {k: v if isinstance(v, dict) else pytest.approx(v, rel=1e-2) for k, v in ours.items()}
    capsys.readouterr()
    assert main([*command, "--executor", "rti"]) == 2
    assert "use plain (executors pause, latest and ensemble), or its checkpoint" in capsys.readouterr().err


def test_a_planner_is_refused_by_the_name_that_it_was_asked_for() -> None:
    for name in ("rtc", "rtc_trained", "streaming"):
        with pytest.raises(ConfigError, match=f"planner '{name}' guides what the policy sees"):
            make_planner(name, compose([policy(), policy()], rule="and"))


def test_rti_of_a_head_that_knows_other_times_only_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = {"teacher": "x", "method": {"type": "same_noise"}}
    task = {"task": {"name": "toys:Dot", "args": {}}}
    one = policy(sampler={"type": "euler", "num_steps": 1})
    one.save(tmp_path / "head", {**head, **task})
    parents = [{"checkpoint": "a", "provenance": {}}, {"checkpoint": "b", "provenance": head}]
    compose([one, one]).save(tmp_path / "composed", {"parents": parents, **task})
    policy().save(tmp_path / "teacher", task)
    for folder, executor, said in (
        ("head", "{type: rti, steps: 1}", "at t = 0.7, and its network was distilled for t = 1 only"),
        ("head", "{type: rti, steps: 1, t_start: 1.0}", ""),
        ("head", "{type: rti, steps: 3, t_start: 1.0}", ""),
        ("head", "rtc", ""),
        ("composed", "rti", "of which 'b' at t = 0.7, 0.467, 0.233, and"),
        ("teacher", "rti", ""),
    ):
        assert main(["eval", str(tmp_path / folder), "--delay", "1", "--episodes", "2", "--executor", executor]) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
        assert len(notes) == bool(said)
        assert said in "".join(notes)


@pytest.mark.parametrize(
    ("asked", "planner", "executor", "replan"),
    [
        (["{type: rti, columns: [1], t_change: 0.5}"], {"type": "rti", "columns": [1], "t_change": 0.5}, "latest", 4),
        (["{type: rtc_identity, limit: 2}", "--replan", "3"], {"type": "rtc", "jacobian": "identity", "limit": 2}, "latest", 3),
        (["{type: ensemble, m: 0.1}"], {"type": "plain"}, {"type": "ensemble", "m": 0.1}, 2),
    ],
)
def test_settings_of_planner_and_executor_are_given_in_the_shell(
    asked: list[str], planner: dict[str, Any], executor: Any, replan: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy().save(tmp_path, {"task": {"name": "toys:Dot", "args": {}}})
    command = ["eval", str(tmp_path), "--delay", "2", "--episodes", "2", "--executor"]
    assert main([*command, *asked]) == 0
    (found,) = (tmp_path / "eval").glob("*/realtime.json")  # beside the policy, in a folder that the settings name
    figures = json.loads(found.read_text())
    assert (figures["planner"], figures["replan"]) == (planner, replan)
    assert figures["executor"] == ({"type": executor} if isinstance(executor, str) else executor)
    capsys.readouterr()
    for wrong, message in (("{type: rti, colums: [1]}", "colums"), ("[rti]", "give a name"), ("{m: 1}", "unknown executor")):
        assert main([*command, wrong]) == 2
        assert message in capsys.readouterr().err
