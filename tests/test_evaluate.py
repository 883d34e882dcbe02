"""Running policies on seeds, recording what came out, filming it, and comparing it."""

import io
import json
import math
import shlex
import shutil
from pathlib import Path
from typing import ClassVar

import av
import gymnasium
import numpy as np
import pytest
import torch

from robopolicy.cli import main
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.deploy.delayed import evaluate_delayed
from robopolicy.errors import DataError, EvaluationError, TaskError
from robopolicy.evaluate.film import encode_mp4, film_rollouts, replay, write_animation
from robopolicy.evaluate.paired import align, compare, write_comparison
from robopolicy.evaluate.record import Episode, Evaluation, Rollout, Settings, TaskRecord, load_evaluation
from robopolicy.evaluate.report import reproduce
from robopolicy.evaluate.run import SEEDS, evaluate, noise_generator, rollout
from robopolicy.features import Feature
from robopolicy.policy import Policy, PolicyConfig, load_policy, read_provenance
from robopolicy.task import Task, TaskSpec
from robopolicy.vector import VectorEnv


class Slide(Task):
    """A point on a line that is to be brought to 0; observes its position and the number of steps taken."""

    rate = 10.0
    max_episode_steps = 12
    drift: ClassVar[float] = 0.0  # a test sets this to make replays go wrong

    def __init__(self, unit: str = "m", can_render: bool = True, ends: bool = True) -> None:
        self.observation_features = {"x": Feature("x", (1,), unit=unit), "count": Feature("count", (1,), unit="1")}
        self.action_feature = Feature("action", (1,), unit="m")
        self.observation_space = gymnasium.spaces.Dict({n: gymnasium.spaces.Box(-9, 99, (1,)) for n in self.observation_features})
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,))
        self.can_render, self.ends = can_render, ends
        self.x, self.count = 0.0, 0

    def _observe(self):
        return {"x": np.array([self.x], np.float32), "count": np.array([self.count], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.count = float(self.np_random.uniform(-1, 1)), 0
        return self._observe(), {"is_success": False}

    def step(self, action):
        self.x += float(np.clip(action[0], -1, 1)) + self.drift
        self.count += 1
        success = abs(self.x) < 0.05
        return (
            self._observe(),
            1 - min(1.0, abs(self.x)),
            success and self.ends,
            self.count >= self.max_episode_steps,
            {"is_success": success},
        )

    def render(self):
        if not self.can_render:
            raise TaskError("no renderer: install libegl1")
        frame = np.zeros((33, 65, 3), np.uint8)
        frame[:, int(np.clip(32 + 30 * self.x, 0, 64))] = 255
        return frame


class Pull:
    """Pulls towards 0 by ``gain`` of the distance, with noise; remembers what it was shown."""

    def __init__(self, gain=0.4, noise=0.05, n_obs_steps=3, n_action_steps=2):
        task = Slide()
        self.observation_features, self.action_feature = task.observation_features, task.action_feature
        self.n_obs_steps, self.n_action_steps = n_obs_steps, n_action_steps
        self.gain, self.noise = gain, noise
        self.seen = []

    def act(self, obs, generator):
        self.seen.append({name: value.copy() for name, value in obs.items()})
        noise = np.stack([torch.randn(self.n_action_steps, 1, generator=g).numpy() for g in generator])
        return (-self.gain * obs["x"][:, -1:] + self.noise * noise).astype(np.float32)


SLIDE = TaskSpec("test_evaluate:Slide")
TEST = range(SEEDS["test"], SEEDS["test"] + 23)


def quick(policy, seeds=TEST, spec=SLIDE, **kwargs):
    return evaluate(policy, spec, seeds, **{"num_envs": 5, "progress": False, **kwargs})


def made_up(seeds, successes, scores=None, policy="p", task="slide"):
    scores = np.where(successes, 1.0, 0.4) if scores is None else scores
    return Evaluation(
        policy=policy,
        task=TaskRecord(name=task),
        settings=Settings(noise_seed=0, n_obs_steps=1, n_action_steps=1, num_envs=1, num_workers=0, threads=1),
        episodes=tuple(
            Episode(seed=int(s), success=bool(k), max_reward=float(r), total_reward=1.0, length=3)
            for s, k, r in zip(seeds, successes, scores, strict=True)
        ),
    )


# --- running ----------------------------------------------------------------------------------------------------------------


def test_seed_ranges_are_disjoint():
    starts = sorted(SEEDS.values())
    assert starts[0] == 0
    assert np.diff(starts).min() >= 100_000


def test_an_episode_does_not_depend_on_the_others_nor_on_how_many_run_together():
    reference = quick(Pull()).episodes
    assert [e.seed for e in reference] == list(TEST)
    assert len({e.max_reward for e in reference}) > 10  # the episodes do differ
    assert quick(Pull(), num_envs=1).episodes == reference
    assert quick(Pull(), num_envs=50).episodes == reference
    assert quick(Pull(), seeds=list(TEST)[::-1]).episodes == reference
    assert quick(Pull(), seeds=list(TEST)[7:12]).episodes == reference[7:12]


def test_workers_do_not_change_episodes():
    spec = TaskSpec("pusht", {"obs": "state"})
    task = spec.make()

    class Chase(Pull):
        def __init__(self):
            super().__init__(n_obs_steps=2, n_action_steps=8)
            self.observation_features, self.action_feature = task.observation_features, task.action_feature

        def act(self, obs, generator):
            noise = np.stack([torch.randn(8, 2, generator=g).numpy() for g in generator])
            return (obs["block_pose"][:, -1:, :2] + 60 * noise).astype(np.float32)

    seeds = TEST[:5]
    alone = quick(Chase(), seeds, spec, num_envs=3).episodes
    assert quick(Chase(), seeds, spec, num_envs=3, num_workers=2).episodes == alone


def test_noise_seed_changes_episodes_and_each_seed_has_a_stream_of_its_own():
    assert quick(Pull(), noise_seed=1).episodes != quick(Pull()).episodes
    draws = {float(torch.randn(1, generator=noise_generator(n, s))) for n in range(4) for s in range(50)}
    assert len(draws) == 200


def test_policy_sees_the_latest_observations_the_first_repeated_at_the_start():
    policy = Pull(gain=0.0, noise=0.0)  # never succeeds: 12 steps each
    quick(policy, TEST[:4], TaskSpec("test_evaluate:Slide", {"ends": False}), num_envs=2)
    counts = [seen["count"][0, :, 0].tolist() for seen in policy.seen]
    episode = [[0, 0, 0], [0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [8, 9, 10]]
    assert counts == episode * 2
    assert all(np.ptp(seen["x"], axis=1).max() == 0 for seen in policy.seen)  # no trace of the episode before


def test_success_counts_at_any_step_and_rewards_only_within_the_episode():
    class Bounce(Pull):
        def act(self, obs, generator):
            pull = -obs["x"][:, -1]
            return np.stack([pull, np.ones_like(pull)], axis=1)  # onto the target, then away

    stays = TaskSpec("test_evaluate:Slide", {"ends": False})
    with VectorEnv(stays, 3) as env:
        done = list(rollout(Bounce(), env, TEST[:3], noise_seed=0))
    for episode, actions in done:
        assert episode.success
        assert episode.length == len(actions) == 12
        assert episode.max_reward == pytest.approx(1.0)
    ends = quick(Bounce(), TEST[:3])
    assert [(e.success, e.length) for e in ends.episodes] == [(True, 1)] * 3
    assert all(e.total_reward == pytest.approx(1.0) for e in ends.episodes)


def test_a_policy_that_returns_nan_or_a_wrong_shape_is_named_with_the_episode():
    class Broken(Pull):
        def act(self, obs, generator):
            actions = super().act(obs, generator)
            actions[obs["count"][:, -1, 0] >= 4] = np.nan
            return actions

    with pytest.raises(EvaluationError, match=r"'mine' returned NaN .* seed 20000\d at step 4"):
        quick(Broken(gain=0.0), name="mine")

    class Flat(Pull):
        def act(self, obs, generator):
            return super().act(obs, generator)[:, 0]

    with pytest.raises(EvaluationError, match="shape"):
        quick(Flat())


class Leaps(Slide):
    """Ends after one step in an episode of seed 0 and after four in others, and shows ``last`` then."""

    def __init__(self, last):
        super().__init__(ends=False)
        self.last = last

    def reset(self, *, seed=None, options=None):
        self.max_episode_steps = 1 if seed == 0 else 4
        return super().reset(seed=seed, options=options)

    def _observe(self):
        shown = super()._observe()
        return shown if self.count < self.max_episode_steps else {**shown, "x": np.array([self.last], np.float32)}


def sliding_policy():
    """A real policy for the task, of random weights."""
    task = Slide()
    value = {
        "n_obs_steps": 1,
        "horizon": 2,
        "n_action_steps": 1,
        "encoder": {"type": "state"},
        "net": {"type": "mlp", "width": 8},
    }
    normalizers = {name: Normalizer(1, "identity") for name in (*task.observation_features, "action")}
    made = Policy(parse(PolicyConfig, value), task.observation_features, task.action_feature, normalizers).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize("last", [np.nan, 3e38])
def test_what_an_episode_ended_on_does_not_fail_the_others(last):
    spec = TaskSpec("test_evaluate:Leaps", {"last": last})
    done = quick(sliding_policy(), [0, 1], spec)
    assert [e.length for e in done.episodes] == [1, 4]
    late = evaluate_delayed(sliding_policy(), spec, [0, 1], delay=1, num_envs=2, progress=False)
    assert [e.length for e in late.evaluation.episodes] == [1, 4]


def test_an_answer_of_a_row_without_an_episode_does_not_matter(monkeypatch):
    policy = sliding_policy()
    decode = policy.decode

    def poisoned(*args, **kwargs):
        actions = decode(*args, **kwargs)
        actions[0] = np.nan
        return actions

    def after_the_first(*args, **kwargs):
        monkeypatch.setattr(policy, "decode", poisoned)
        return decode(*args, **kwargs)

    monkeypatch.setattr(policy, "decode", after_the_first)
    assert len(quick(policy, [0, 1], TaskSpec("test_evaluate:Leaps", {"last": 0.0})).episodes) == 2
    with pytest.raises(EvaluationError, match=r"'mine' returned NaN .* seed 3 at step 0"):
        quick(policy, [3, 4], name="mine")
    with pytest.raises(DataError, match="answers row 0"):
        policy.act({name: np.zeros((2, 1, 1), np.float32) for name in policy.observation_features}, torch.Generator())


@pytest.mark.parametrize("seeds", [[], [3, 3], [-1]])
def test_seeds_must_exist_differ_and_not_be_negative(seeds):
    with pytest.raises(EvaluationError):
        quick(Pull(), seeds)


def test_a_checkpoint_cannot_have_something_built_that_is_no_task(tmp_path):
    spec = TaskSpec("subprocess:Popen", {"args": ["touch", str(tmp_path / "executed")]})
    with pytest.raises(TaskError, match="is no task"):
        quick(Pull(), spec=spec)
    assert not list(tmp_path.iterdir())


def test_a_task_that_does_not_fit_the_policy_is_refused():
    with pytest.raises(TaskError, match="unit mm"):
        quick(Pull(), spec=TaskSpec("test_evaluate:Slide", {"unit": "mm"}))
    demanding = Pull()
    demanding.observation_features = {**demanding.observation_features, "image": Feature("image", (8, 8, 3), dtype="uint8")}
    with pytest.raises(TaskError, match="'image'"):
        quick(demanding)


# --- recording --------------------------------------------------------------------------------------------------------------


def test_eval_json_reads_back_equal_and_keeps_one_row_per_line(tmp_path):
    evaluation = quick(Pull(), name="mine")
    path = tmp_path / "deep" / "eval.json"
    evaluation.save(path)
    assert load_evaluation(path) == evaluation
    assert sum(line.strip().startswith('{"seed"') for line in path.read_text().splitlines()) == len(TEST)
    summary = json.loads(path.read_text())["summary"]
    assert summary["successes"] == int(evaluation.successes.sum())
    assert summary["success"]["low"] <= summary["successes"] / 23 <= summary["success"]["high"]
    for key in ("git", "versions", "load", "python"):
        assert key in json.loads(path.read_text())["provenance"]


def test_a_part_of_an_evaluation_has_its_own_summary():
    evaluation = made_up(range(10), [True] * 5 + [False] * 5)
    assert evaluation.summary.successes == 5  # computed, hence kept
    assert evaluation.restricted({0, 1, 9}).summary.successes == 2


VALID = made_up(range(4), [True, False, True, True]).to_json()
ROW = VALID["episodes"][0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[1, 2]", "no evaluation"),
        ("{}", "no evaluation"),
        ({**VALID, "schema_version": 99}, "schema"),
        ({**VALID, "episodes": []}, "episodes"),
        ({**VALID, "episodes": 3}, "episodes"),
        ({**VALID, "episodes": [ROW, ROW]}, "twice"),
        ({**VALID, "episodes": [{**ROW, "success": "yes"}]}, "success"),
        ({**VALID, "episodes": [{**ROW, "max_reward": float("nan")}]}, "max_reward"),
        ({**VALID, "episodes": [{k: v for k, v in ROW.items() if k != "seed"}]}, "seed"),
        ({**VALID, "episodes": [{**ROW, "seed": -1}]}, "seed"),
        ({**VALID, "episodes": [{**ROW, "length": 0}]}, "length"),
        ({**VALID, "task": "slide"}, "task"),
        ({**VALID, "settings": {}}, "settings"),
        ({**VALID, "extra": 1}, "extra"),
    ],
)
def test_a_malformed_eval_json_is_a_one_line_error_with_exit_2(tmp_path, capsys, content, says):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    good.write_text(json.dumps(VALID))
    assert main(["compare", str(bad), str(good), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "bad.json" in message
    assert says in message
    assert not (tmp_path / "out").exists()


# --- films ------------------------------------------------------------------------------------------------------------------


def decode(mp4):
    with av.open(io.BytesIO(mp4)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], container.streams.video[0]


def test_films_show_the_very_episodes_in_even_sized_h264():
    evaluation = quick(Pull(gain=0.15, noise=0.2), film=(2, 1))
    assert [f.episode.success for f in evaluation.films] == [True, True, False]
    for film in evaluation.films:
        frames, stream = decode(film.mp4)
        assert len(frames) == film.episode.length + 1
        assert frames[0].shape == (34, 66, 3)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 10.0)
    start = SLIDE.make().reset(seed=evaluation.films[0].episode.seed)[0]["x"][0]
    bright = decode(evaluation.films[0].mp4)[0][0].sum(axis=(0, 2)).argmax()
    assert abs(bright - (32 + 30 * start)) <= 1.5


def test_a_replay_that_goes_another_way_is_an_error(monkeypatch):
    with VectorEnv(SLIDE, 2) as env:
        done = next(rollout(Pull(), env, TEST[:2], noise_seed=0))
    task = SLIDE.make()
    assert len(replay(task, done, stride=7)) == 1 + math.ceil(done.episode.length / 7)
    assert len(replay(task, done)) == done.episode.length + 1
    monkeypatch.setattr(Slide, "drift", 0.01)
    with pytest.raises(TaskError, match=f"seed {done.episode.seed}"):
        replay(task, done)


def test_without_a_renderer_evaluation_goes_on_and_says_why(capsys):
    evaluation = quick(Pull(), spec=TaskSpec("test_evaluate:Slide", {"can_render": False}), film=(1, 1))
    assert (evaluation.films, len(evaluation.episodes)) == ((), 23)
    assert "install libegl1" in capsys.readouterr().err


def test_films_follow_the_order_of_seeds_and_not_of_finishing():
    rows = [Rollout(Episode(seed=s, success=False, max_reward=0.0, total_reward=0.0, length=1), np.zeros((1, 1))) for s in (9, 4)]
    with pytest.raises(TaskError, match="seed 4"):  # these never happened: the replay of the first one notices
        film_rollouts(SLIDE, rows, 0, 1)


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_animations_for_a_readme(tmp_path, kind):
    from PIL import Image

    frames = [np.full((40, 80, 3), 20 * i, np.uint8) for i in range(8)]
    write_animation(tmp_path / "a", frames, 10.0, kind=kind, width=60)
    with Image.open(tmp_path / "a") as picture:
        assert (picture.n_frames, picture.size) == (8, (60, 30))
    assert len(decode(encode_mp4(frames, 29.97))[0]) == 8


# --- comparing --------------------------------------------------------------------------------------------------------------


def test_comparison_pairs_by_seed_whatever_the_ranges():
    rng = np.random.default_rng(0)
    a = made_up(range(100), rng.random(100) < 0.5)
    b = made_up(range(40, 160), np.append(~a.successes[40:], np.ones(60)))
    x, y = align([a, b], ["a", "b"])
    assert x.seeds.tolist() == y.seeds.tolist() == list(range(40, 100))
    assert (x.successes == ~y.successes).all()
    with pytest.raises(EvaluationError, match="share no seeds"):
        align([a, made_up(range(500, 510), np.ones(10))], ["a", "b"])
    with pytest.raises(EvaluationError, match="task"):
        align([a, made_up(range(100), np.ones(100), task="other")], ["a", "b"])


def test_comparison_of_a_policy_with_itself_shows_nothing_and_of_a_better_one_names_it(tmp_path):
    rng = np.random.default_rng(1)
    weak = made_up(range(200), rng.random(200) < 0.4, policy="weak")
    strong = made_up(range(200), rng.random(200) < 0.8, policy="strong")
    same = compare([weak, weak])
    assert (same.pairs[0].mcnemar.p_value, same.pairs[0].any_time.verdict, same.pairs[0].score_p) == (1.0, None, 1.0)
    result = compare([weak, strong])
    pair = result.pairs[0]
    assert pair.any_time.verdict == "B"
    assert pair.success.low > 0
    assert pair.any_time_difference.low > 0
    assert pair.success.mean == pytest.approx(strong.success.mean - weak.success.mean)
    assert any("B is better" in line for line in result.lines())
    report = write_comparison(result, tmp_path)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["pairs"][0]["any_time"]["verdict"] == "B"
    assert len(written["pairs"][0]["any_time"]["log_e"]) == 200
    assert "Evidence over time" in report.read_text()


def test_score_can_decide_when_it_is_within_0_and_1():
    rng = np.random.default_rng(2)
    none = np.zeros(200, bool)
    a, b = made_up(range(200), none, rng.uniform(0, 0.7, 200)), made_up(range(200), none, rng.uniform(0.3, 1, 200))
    assert compare([a, b]).pairs[0].any_time.verdict is None
    assert compare([a, b], on="score").pairs[0].any_time.verdict == "B"
    with pytest.raises(EvaluationError, match="within"):
        compare([a, made_up(range(200), none, np.full(200, 7.0))], on="score")


def test_several_policies_get_letters_after_correction_for_their_number(tmp_path):
    rng = np.random.default_rng(3)
    u = rng.random(300)  # shared difficulty
    policies = [made_up(range(300), u < p, policy=f"p{p}") for p in (0.3, 0.9, 0.32, 0.6)]
    result = compare(policies)
    assert result.success_letters[1:2] + result.success_letters[3:] == ["a", "b"]
    assert set(result.success_letters[0]) & set(result.success_letters[2])
    assert "share a letter" in write_comparison(result, tmp_path).read_text()


# --- the verbs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    """Two tiny untrained policies for the Slide task."""
    from robopolicy.data.normalize import Normalizer
    from robopolicy.policy import Policy, PolicyConfig

    task = Slide()
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = PolicyConfig(
            n_obs_steps=2, horizon=4, n_action_steps=2, net={"type": "mlp", "width": 16, "depth": 1}, default_normalize="identity"
        )
        normalizers = {name: Normalizer(1, "identity") for name in ("x", "count", "action")}
        policy = Policy(config, task.observation_features, task.action_feature, normalizers)
        origin = {"task": {"name": "test_evaluate:Slide", "args": {"ends": False}}, "experiment": "toy", "seed": seed}
        paths.append(str(policy.save(tmp_path / f"run{seed}", origin)))
    return paths


def test_eval_verb_writes_and_prints_and_repeats(checkpoints, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["eval", checkpoints[0], "--episodes", "12", "--num-envs", "4", "--film", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "success  " in printed
    assert "mean max reward" in printed
    first = load_evaluation(out / "eval.json")
    assert first.task.args == {"ends": False}  # the checkpoint's own task
    assert first.seeds.tolist() == list(range(200_000, 200_012))
    assert first.settings.nfe == 8
    assert list(out.glob("*.mp4"))
    assert "data:video/mp4" in (out / "report.html").read_text()
    assert main(["eval", checkpoints[0], "--episodes", "12", "--num-envs", "4", "--steps", "2", "--seeds", "validation"]) == 0
    (other,) = (tmp_path / "run0" / "eval").glob("*/eval.json")
    assert load_evaluation(other).settings.nfe == 2
    assert load_evaluation(other).seeds[0] == 100_000
    assert main(["eval", checkpoints[0], "--episodes", "12", "--num-envs", "4", "--out", str(tmp_path / "again")]) == 0
    assert load_evaluation(tmp_path / "again" / "eval.json").episodes == first.episodes


def test_less_noise_is_what_a_checkpoint_with_less_noise_does_to_the_bit(checkpoints, tmp_path, capsys):
    own = ["--episodes", "6", "--num-envs", "3"]
    scaled, edited = tmp_path / "run0", tmp_path / "edited"
    shutil.copytree(scaled, edited)
    document = json.loads((edited / "policy.json").read_text())
    document["config"]["initial_noise"] = 0.25
    (edited / "policy.json").write_text(json.dumps(document))
    done = {}
    for name, arguments in {
        "edited": [str(edited)],
        "scaled": [str(scaled), "--noise", ".25"],
        "plain": [str(scaled)],
        "none": [str(scaled), "--noise", "0"],
    }.items():
        assert main(["eval", *arguments, *own, "--out", str(tmp_path / name / "out")]) == 0
        done[name] = load_evaluation(tmp_path / name / "out" / "eval.json")
    assert done["scaled"].episodes == done["edited"].episodes
    assert done["scaled"].episodes != done["plain"].episodes != done["none"].episodes
    assert [done[name].settings.initial_noise for name in ("edited", "scaled", "plain", "none")] == [0.25, 0.25, 1.0, 0.0]
    again = shlex.split(reproduce(done["scaled"]))
    assert again[:2] == ["robopolicy", "eval"]
    assert main([*again[1:], "--out", str(tmp_path / "again")]) == 0
    assert load_evaluation(tmp_path / "again" / "eval.json").episodes == done["scaled"].episodes
    assert main(["compare", str(scaled), str(edited), "--noise", ".25", *own, "--out", str(tmp_path / "both")]) == 0
    assert load_evaluation(tmp_path / "both" / "A" / "eval.json").episodes == done["scaled"].episodes


def test_figures_of_different_noise_do_not_end_in_one_folder(checkpoints, capsys):
    for noise in (".5", ".75"):
        own = ["--episodes", "2", "--steps", "2", "--noise", noise]
        assert main(["eval", checkpoints[0], *own]) == 0
        assert main(["eval", checkpoints[0], *own, "--delay", "1", "--executor", "rtc"]) == 0
    names = [f"Slide_200000_2_steps2_noise{noise}{how}" for noise in ("0.5", "0.75") for how in ("", ".rtc_1")]
    folders = {path.parent.name: load_evaluation(path) for path in Path(checkpoints[0]).glob("eval/*/eval.json")}
    assert sorted(folders) == sorted(names)
    assert folders["Slide_200000_2_steps2_noise0.75.rtc_1"].settings.initial_noise == 0.75


def test_a_policy_that_starts_from_no_noise_says_so_and_a_scale_is_a_number(checkpoints, tmp_path, capsys):
    mean = str(load_policy(checkpoints[0]).varied(initial_noise=0.0).save(tmp_path / "mean", read_provenance(checkpoints[0])))
    for command in (
        ["eval", mean, "--task", "test_evaluate:Slide"],
        ["compare", checkpoints[0], mean],
        ["compose", mean, checkpoints[0], "--out", str(tmp_path / "both")],
        ["export", mean],
    ):
        assert main([*command, "--noise", ".5"]) == 2
        said = capsys.readouterr().err
        assert f"'{mean}' starts from no noise" in said
        assert said.count("\n") == 1
    assert main(["eval", mean, "--episodes", "2", "--noise", "0"]) == 0  # what it does anyway
    for wrong in ("-1", "nan", "inf", "half"):
        with pytest.raises(SystemExit):
            main(["eval", checkpoints[0], f"--noise={wrong}"])


def test_eval_verb_pools_training_seeds(checkpoints, tmp_path, capsys):
    assert main(["eval", *checkpoints, "--episodes", "10", "--num-envs", "10", "--out", str(tmp_path / "out")]) == 0
    assert "pooled over 2 training seeds x 10 episodes" in capsys.readouterr().out
    pooled = json.loads((tmp_path / "out" / "pooled.json").read_text())
    scores = [load_evaluation(tmp_path / "out" / str(i) / "eval.json").max_rewards.mean() for i in range(2)]
    assert pooled["mean_max_reward"]["mean"] == pytest.approx(np.mean(scores))


def test_compare_verb_equals_comparing_the_evaluations_it_wrote(checkpoints, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *checkpoints, "--episodes", "14", "--num-envs", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "B - A on 14 shared seeds" in printed
    files = [str(out / label / "eval.json") for label in "AB"]
    assert main(["compare", *files, "--out", str(tmp_path / "again")]) == 0
    again = capsys.readouterr().out
    assert printed.splitlines()[:-1] == again.splitlines()[:-1]  # the last line names the report


def test_compare_stops_when_decided(checkpoints, tmp_path, capsys, monkeypatch):
    def loads(path, device="cpu"):  # a policy that never moves, and one that goes to 0 at once
        return Pull(gain=float(path == checkpoints[1]), noise=0.0)

    monkeypatch.setattr("robopolicy.policy.load_policy", loads)
    arguments = ["--episodes", "400", "--num-envs", "10", "--stop-when-decided", "--out", str(tmp_path / "out")]
    assert main(["compare", *checkpoints, *arguments]) == 0
    assert "stopped early" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["pairs"][0]["any_time"]["verdict"] == "B"
    assert written["stopped_early"]
    assert len(written["seeds"]) < 100


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "absent"],
        ["eval", "CKPT", "--seeds", "tset"],
        ["eval", "CKPT", "--task", "slid"],
        ["eval", "CKPT", "--task-arg", "colour=red"],
        ["eval", "CKPT", "--task-arg", "unit"],
        ["compare", "CKPT"],
        ["compare", "CKPT", "some/eval.json"],
        ["compare", "a.json", "b.json"],
        ["compare", "CKPT", "CKPT", "--alpha", "2"],
        ["compare", "CKPT", "CKPT", "CKPT", "--stop-when-decided"],
    ],
)
def test_mistakes_on_the_command_line_are_one_line_with_exit_2(checkpoints, tmp_path, capsys, arguments):
    arguments = [checkpoints[0] if a == "CKPT" else a for a in arguments]
    assert main([*arguments, "--episodes", "2", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_robot_s_argument_that_it_has_not_is_its_own_and_not_the_task_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "outputs/none", "--robot", "ros2", "--robot-arg", "profil=virtual"]) == 2
    assert "robot 'ros2' takes no argument 'profil'; valid: profile, namespace; the task's go with" in capsys.readouterr().err
    for taken in (["ros2", "--robot-arg", "profile=virtual"], ["arm", "--robot-arg", "obs=[ee_pos]"]):  # the arm names none
        assert main(["eval", "outputs/none", "--robot", *taken]) == 2
        assert "'outputs/none' does not exist" in capsys.readouterr().err
