"""The on-policy core: advantages, the scale of rewards, the clipped surrogate and its updates, values, roll-outs, the guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import Dot

from robopolicy.config import parse
from robopolicy.data.episodes import Episodes
from robopolicy.data.normalize import Normalizer
from robopolicy.errors import ConfigError, RobopolicyError
from robopolicy.nets.values import ValueNet
from robopolicy.policy import Policy, PolicyConfig
from robopolicy.rl.base import demonstrations
from robopolicy.rl.config import FinetuneConfig
from robopolicy.rl.envs import ChunkEnv, RewardConfig
from robopolicy.rl.gae import RewardScale, gae
from robopolicy.rl.guard import Collapse, Guard, GuardConfig
from robopolicy.rl.heads.base import Head, Record
from robopolicy.rl.heads.dppo import DPPO
from robopolicy.rl.heads.gaussian import Gaussian
from robopolicy.rl.ppo import PPO, Batch, PPOConfig, surrogate
from robopolicy.rl.rollout import collect
from robopolicy.task import TaskSpec
from robopolicy.train.bc import Trainer
from robopolicy.train.experiment import Experiment


def policy(**changes: Any) -> Policy:
    config = {
        "n_obs_steps": 1,
        "horizon": 2,
        "n_action_steps": 2,
        "net": {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8},
        "default_normalize": "identity",
        **changes,
    }
    torch.manual_seed(0)
    normalizers = {"x": Normalizer(2, "identity"), "action": Normalizer(2, "identity")}
    made = Policy(parse(PolicyConfig, config), {"x": Dot.observation_features["x"]}, Dot.action_feature, normalizers)
    for parameter in made.net.parameters():  # networks begin at zero, where nothing depends on the context
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def dppo(**changes: Any) -> DPPO:
    return DPPO(DPPO.Config(num_steps=4, tuned_steps=2, clip=0.1), policy(**changes))


def core(head: Head, **changes: Any) -> PPO:
    torch.manual_seed(1)
    value = ValueNet(ValueNet.Config(width=16, depth=1), head.policy.encoder.ctx_dim)
    return PPO(parse(PPOConfig, {"value_only_iterations": 0, "minibatch_size": 16, "epochs": 2, **changes}), head, value)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(head: Head, num: int = 32, with_bc: bool = False, seed: int = 0) -> Batch:
    g = generator(seed)
    with torch.no_grad():
        ctx = head.policy.encode({"x": torch.randn(num, 1, 2, generator=g)})
        acted = head.act(ctx, g)
        record = head.prepare(ctx, acted.record, g)
        if with_bc:
            record = {**record, "bc_chunk": head.base.sample(ctx, g)}
    return Batch(ctx, record, acted.chunk.flatten(1).sum(1), torch.randn(num, generator=g))


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# --- advantages ---------------------------------------------------------------------------------------------------------------

FIXTURE = {
    "reward": [1, 0, 2, 0, 1],
    "value": [0.5, 0.4, 0.3, 0.2, 0.1],
    "next_value": [0.4, 0.9, 0.2, 0.1, 0.7],
    "discount": [0.9] * 5,
}
AT_1, AT_4, NEVER = [False, True, False, False, False], [False, False, False, False, True], [False] * 5


def fixture(terminated: list[bool], truncated: list[bool], gae_lambda: float = 0.8, **changes: list[float]) -> np.ndarray:
    numbers = {name: np.array(values, np.float64)[:, None] for name, values in {**FIXTURE, **changes}.items()}
    return gae(
        **numbers, terminated=np.array(terminated)[:, None], truncated=np.array(truncated)[:, None], gae_lambda=gae_lambda
    )[:, 0]


def test_advantages() -> None:
    cut = [a or b for a, b in zip(AT_1, AT_4, strict=True)]
    np.testing.assert_allclose(fixture(NEVER, cut), [1.1552, 0.41, 2.593952, 0.9916, 1.53], rtol=1e-12)
    np.testing.assert_allclose(fixture(AT_1, AT_4), [0.572, -0.4, 2.593952, 0.9916, 1.53], rtol=1e-12)
    # An episode that ends by itself within its last step is over, whatever its time limit says.
    np.testing.assert_array_equal(fixture(AT_1, cut), fixture(AT_1, AT_4))


def test_nothing_flows_from_one_episode_into_another() -> None:
    for terminated, truncated in ((AT_1, NEVER), (NEVER, AT_1)):
        other = fixture(terminated, truncated, reward=[1, 0, 9, 9, 9], value=[0.5, 0.4, 7, 7, 7])
        reference = fixture(terminated, truncated)
        np.testing.assert_array_equal(other[:2], reference[:2])
        assert (other[2:] != reference[2:]).all()


def test_lambda_0_is_one_step_and_1_is_all_of_them() -> None:
    one = fixture(NEVER, NEVER, 0.0)
    np.testing.assert_allclose(one, [1 + 0.36 - 0.5, 0.81 - 0.4, 2 + 0.18 - 0.3, 0.09 - 0.2, 1 + 0.63 - 0.1])
    values = FIXTURE["value"]
    chained = fixture(NEVER, NEVER, 1.0, next_value=[*values[1:], 0.7])
    np.testing.assert_allclose(chained[0], 1 + 0.81 * 2 + 0.9**4 * 1 + 0.9**5 * 0.7 - 0.5)


def test_environments_and_discounts_are_each_their_own() -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(7, 3)) for name in ("reward", "value", "next_value")}
    arrays |= {name: rng.random((7, 3)) < 0.2 for name in ("terminated", "truncated")}
    arrays["discount"] = rng.uniform(0.8, 1, (7, 3))
    together = gae(**arrays, gae_lambda=0.9)
    for i in range(3):
        alone = gae(**{name: values[:, i : i + 1] for name, values in arrays.items()}, gae_lambda=0.9)
        np.testing.assert_allclose(together[:, i : i + 1], alone, rtol=1e-12)


def test_rewards_are_scaled_by_the_spread_of_returns() -> None:
    rng = np.random.default_rng(0)
    scale, returns, seen = RewardScale(4), np.zeros(4), []
    for step in range(50):
        reward, discount, ended = 3 + 5 * rng.normal(size=4), np.where(rng.random(4) < 0.5, 0.9, 0.8), rng.random(4) < 0.1
        returns = returns * discount + reward
        seen.append(returns.copy())
        scaled = scale(reward, discount, ended)
        returns[ended] = 0.0
        if step > 10:
            np.testing.assert_allclose(scaled, reward / np.concatenate(seen).std(), rtol=1e-3)
    assert scale(np.full(4, 1e9), np.full(4, 0.9), np.zeros(4, bool)).max() <= RewardScale.CLIP


def test_a_restored_scale_goes_on_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    scale, other = RewardScale(3), RewardScale(3)
    for _ in range(5):
        scale(rng.normal(size=3), np.full(3, 0.9), np.zeros(3, bool))
    state = scale.state()
    other.restore(state)
    reward = rng.normal(size=3)
    first = scale(reward, np.full(3, 0.9), np.zeros(3, bool))
    np.testing.assert_array_equal(first, other(reward, np.full(3, 0.9), np.zeros(3, bool)))
    other.restore(state)  # what was taken is not changed by going on
    np.testing.assert_array_equal(first, other(reward, np.full(3, 0.9), np.zeros(3, bool)))


# --- the surrogate ------------------------------------------------------------------------------------------------------------


def test_the_clipped_surrogate() -> None:
    ratio = torch.tensor([[0.5], [1.0], [1.5]])
    clips = torch.tensor([0.2])
    for advantage, expected in ((2.0, [1.0, 2.0, 2.4]), (-2.0, [-1.6, -2.0, -3.0])):
        for kind in ("ppo", "aspo")[: 2 if advantage > 0 else 1]:
            value = surrogate(ratio, torch.full((3, 1), advantage), clips, kind)
            torch.testing.assert_close(value[:, 0], torch.tensor(expected))
    value = surrogate(torch.full((1, 2), 1.5), torch.ones(1, 1), torch.tensor([0.1, 0.3]), "ppo")
    torch.testing.assert_close(value, torch.tensor([[1.1, 1.3]]))  # each term has a clip of its own


# --- updates ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DPPO, Gaussian])
def test_what_was_good_becomes_likelier(kind: type[Head]) -> None:
    head = dppo() if kind is DPPO else Gaussian(Gaussian.Config(), policy())
    data = batch(head, 64)
    core(head, lr=1e-4).update(data, 0, generator())
    with torch.no_grad():
        moved = head.log_ratio(data.ctx, data.record).mean(1)
    good = data.advantage > data.advantage.mean()
    assert float(moved[good].mean()) > float(moved[~good].mean()) + 0.003


def test_only_the_network_that_denoises_is_learned() -> None:
    head = dppo()
    before, value_before, base_before = weights(head.policy), None, weights(head.base)
    ppo = core(head, kl_weight=0.1, weight_decay=0.1, bc={"weight": 0.1})
    value_before = weights(ppo.value)
    ppo.update(batch(head, with_bc=True), 0, generator())
    assert changed(before, head.policy) == {"net"}  # neither frozen_net, nor encoder, nor normalisers
    assert changed(value_before, ppo.value) == {"enter", "blocks", "leave"}
    assert not changed(base_before, head.base)


def test_values_may_learn_alone_at_first() -> None:
    head = dppo()
    ppo = core(head, value_only_iterations=2, value_lr=1e-2, epochs=30)
    before, data = weights(head), batch(head)
    first = ppo.update(data, 0, generator())
    second = ppo.update(data, 1, generator())
    assert not changed(before, head)
    assert first["train/minibatches"] == first["train/lr"] == 0
    assert second["loss/value"] < 0.7 * first["loss/value"]
    assert second["value/explained_variance"] > first["value/explained_variance"] + 0.2
    ppo.update(data, 2, generator())
    assert changed(before, head)


def test_a_head_that_scores_another_policy_than_acted_is_found_out() -> None:
    class Wrong(DPPO):
        """Scores one grid, having sampled on another, and remembers the densities of sampling."""

        def prepare(self, ctx: Tensor, record: Record, generator: torch.Generator) -> Record:
            prepared = super().prepare(ctx, record, generator)
            self.tuned = [(t, u * 0.9) for t, u in self.tuned]
            return prepared

    head = Wrong(DPPO.Config(num_steps=4, tuned_steps=2), policy())
    data = batch(head)
    with pytest.raises(RobopolicyError, match=r"not 0: the policy that is scored is not the one that acted.*Wrong"):
        core(head).update(data, 0, generator())


def test_dropout_does_not_make_the_scored_policy_another() -> None:
    head = dppo(net={"type": "mlp", "width": 16, "depth": 1, "time_dim": 8, "dropout": 0.5})
    head = DPPO(head.config, head.policy.train())  # as training would hand it over
    core(head).update(batch(head), 0, generator())


def test_updates_stop_beyond_the_target_kl() -> None:
    head = dppo()
    seen = core(head, lr=3e-2, epochs=20, target_kl=1e-3).update(batch(head), 0, generator())
    assert 1 < seen["train/minibatches"] < 40
    head = dppo()
    assert core(head, lr=3e-2, epochs=20, target_kl=None).update(batch(head), 0, generator())["train/minibatches"] == 40


def test_the_learning_rate_follows_the_desired_kl() -> None:
    for lr, desired, rises in ((1e-5, 1e-2, True), (3e-2, 1e-6, False)):
        head = dppo()
        ppo = core(head, lr=lr, desired_kl=desired, target_kl=None)
        assert (ppo.update(batch(head), 0, generator())["train/lr"] > lr) == rises
        assert 1e-6 <= ppo.lr <= 1e-2


def test_the_learning_rate_warms_up() -> None:
    head = dppo()
    ppo, data = core(head, warmup_iterations=3, lr=1e-4), batch(head)
    rates = []
    for k in range(5):
        data = data._replace(record=head.prepare(data.ctx, data.record, generator()))
        rates.append(ppo.update(data, k, generator())["train/lr"])
    np.testing.assert_allclose(rates, [2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4])


@pytest.mark.parametrize("anchor", [{"kl_weight": 300.0}, {"bc": {"weight": 300.0}}])
def test_an_anchor_holds_the_policy(anchor: dict[str, Any]) -> None:
    """A policy that is away from its base comes back; one that does not imitate what its base does, learns to."""

    def drawn_away(**changes: Any) -> list[float]:
        head = dppo()
        with torch.no_grad():
            for parameter in head.policy.net.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator(3))
        data, ppo = batch(head, 128, with_bc=True), core(head, minibatch_size=64, lr=1e-3, target_kl=None, **changes)
        found = []
        for k in range(8):
            with torch.no_grad():
                found.append(float(distance(head, data)))
            ppo.update(data._replace(record=head.prepare(data.ctx, data.record, generator())), k, generator(k))
        return found

    def distance(head: Head, data: Batch) -> Tensor:
        if "kl_weight" in anchor:
            return head.divergence(data.ctx, data.record)
        return head.bc_loss(data.ctx, data.record["bc_chunk"], None, generator(9))

    held, free = drawn_away(**anchor), drawn_away()
    assert held[0] == free[0]
    assert held[-1] < 0.9 * held[0]
    assert held[-1] < 0.9 * free[-1]


def test_the_divergence_is_that_of_gaussians() -> None:
    head = Gaussian(Gaussian.Config(std=0.5, learn_std=False), policy())
    data = batch(head)
    with torch.no_grad():
        assert float(head.divergence(data.ctx, data.record)) == 0
    with torch.no_grad():
        for parameter in head.policy.net.parameters():
            parameter += 0.05
        new, old = head.distribution(head.policy, data.ctx), head.distribution(head.base, data.ctx)
        expected = torch.distributions.kl_divergence(*(torch.distributions.Normal(d.mean, d.std) for d in (new, old)))
        torch.testing.assert_close(head.divergence(data.ctx, data.record), expected.mean())
    learning = Gaussian(Gaussian.Config(std=0.5), head.policy)  # its std is nothing that keeping near the base may widen
    torch.nn.init.constant_(next(learning.policy.net.parameters()), 0.1)
    learning.divergence(data.ctx, data.record).backward()
    assert learning.log_std.grad is None


def test_a_single_chunk_is_learned_from() -> None:
    assert np.isfinite(core(dppo(), minibatch_size=1).update(batch(dppo(), 3), 0, generator())["loss/policy"])


def test_demonstrations_are_those_of_the_base(tmp_path: Path) -> None:
    episodes = Episodes.create(tmp_path / "demos.zarr", {"x": Dot.observation_features["x"], "action": Dot.action_feature})
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = rng.uniform(-1, 1, (12, 2)).astype(np.float32)
        episodes.append({"x": x, "action": -x / 2})
    experiment: dict[str, Any] = {
        "name": "demos",
        "data": {"path": str(tmp_path / "demos.zarr"), "observations": ["x"], "val_fraction": 0.0},
        "policy": {"n_obs_steps": 1, "horizon": 2, "n_action_steps": 2, "net": {"type": "mlp", "width": 16, "depth": 1}},
        "train": {"steps": 1, "batch_size": 4, "warmup_steps": 1, "device": "cpu"},
    }
    with pytest.raises(ConfigError, match="must have been trained before"):
        Trainer(parse(Experiment, {**experiment, "policy": {**experiment["policy"], "frozen_above": 0.5}}), tmp_path / "run")
    assert Trainer(parse(Experiment, experiment), tmp_path / "run").run() == 0
    config = parse(FinetuneConfig, {"name": "x", "base": str(tmp_path / "run"), "task": {"name": "toys:Dot"}})
    head = DPPO(DPPO.Config(num_steps=4, tuned_steps=2), load(tmp_path / "run"))
    draw = demonstrations(config, head.policy)
    ctx, chunk, is_pad = draw(64, generator())
    assert is_pad.any(dim=1).float().mean() < 0.5  # the last window of each episode ends in padding
    assert is_pad.any()
    position = head.policy.normalizer("x").unnormalize(ctx)  # nothing else is observed
    actions = head.policy.normalizer("action").unnormalize(chunk)
    torch.testing.assert_close(actions[:, 0], -position / 2, atol=1e-5, rtol=0)
    value = ValueNet(ValueNet.Config(width=16, depth=1), head.policy.encoder.ctx_dim)
    anchored = {"value_only_iterations": 0, "epochs": 2, "lr": 3e-3, "bc": {"weight": 1.0, "source": "demonstrations"}}
    ppo = PPO(parse(PPOConfig, anchored), head, value, draw)
    losses = [ppo.update(batch(head, seed=k), 0, generator(k))["loss/bc"] for k in range(40)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="use source base"):
        demonstrations(config, head.policy)
    (tmp_path / "run" / "config.yaml").write_text("name: tuned\nbase: outputs/other\n")  # of fine-tuning
    with pytest.raises(ConfigError, match="was not trained on any"):
        demonstrations(config, head.policy)


def load(path: Path) -> Policy:
    from robopolicy.policy import load_policy

    return load_policy(path)


@pytest.mark.parametrize(("num", "size", "parts"), [(32, 16, [16, 16]), (35, 16, [18, 17]), (7, 16, [7]), (24, 16, [12, 12])])
def test_minibatches_are_equal_parts_of_everything(num: int, size: int, parts: list[int]) -> None:
    minibatches = list(core(dppo(), minibatch_size=size, epochs=2)._minibatches(num, generator()))
    assert [len(indices) for indices in minibatches] == parts * 2
    half = len(parts)
    for epoch in (minibatches[:half], minibatches[half:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(num))
    assert torch.cat(minibatches[:half]).tolist() != torch.cat(minibatches[half:]).tolist()


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    head = dppo()
    data = batch(head)
    data.advantage[3] = torch.inf
    with pytest.raises(RobopolicyError, match=r"lower ppo\.lr"):
        core(head).update(data, 0, generator())


def test_values_begin_at_zero_and_can_be_learned() -> None:
    torch.manual_seed(0)
    net = ValueNet(ValueNet.Config(width=32, depth=2), 3)
    x = torch.randn(256, 3)
    wanted = x[:, 0] * x[:, 1]
    assert float(net(x).detach().abs().max()) == 0
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (net(x) - wanted).square().mean().backward()
        optimizer.step()
    assert float((net(x) - wanted).square().mean().detach()) < 0.05 * float(wanted.var())


# --- roll-outs ----------------------------------------------------------------------------------------------------------------


def test_a_rollout_is_what_was_acted_on_and_what_came_of_it() -> None:
    """Recomputed here from the transitions, with a value network that is not zero."""
    head = dppo()
    torch.manual_seed(2)
    value = ValueNet(ValueNet.Config(width=16, depth=1), head.policy.encoder.ctx_dim)
    torch.nn.init.normal_(value.leave.weight)
    transitions, windows = [], []
    with environment() as env:
        step, first = env.step, env.reset()
        windows.append(first)

        def stepping(actions: np.ndarray) -> Any:
            transitions.append(step(actions))
            windows.append(transitions[-1].obs)
            return transitions[-1]

        env.step = stepping
        collected = collected_from(env, first, head, value)
        assert collected is not None
        (rollout, ended, env_steps), last = collected
    assert last is transitions[-1].obs
    assert env_steps == sum(int(t.executed.sum()) for t in transitions)
    assert ended == [e for t in transitions for e in t.ended]
    assert any(t.truncated.any() for t in transitions)
    assert any(t.terminated.any() for t in transitions)

    def worth(obs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return value(head.policy.encode(head.policy.observe(obs))).numpy().astype(np.float64)

    values = np.stack([worth(obs) for obs in windows[:-1]])
    names = ("reward", "discount", "terminated", "truncated")
    columns = {name: np.stack([getattr(t, name) for t in transitions]) for name in names}
    advantage = gae(**columns, value=values, next_value=np.stack([worth(t.final_obs) for t in transitions]), gae_lambda=0.9)
    np.testing.assert_allclose(rollout.advantage, advantage.reshape(-1), atol=1e-4)
    np.testing.assert_allclose(rollout.returns, (advantage + values).reshape(-1), atol=1e-4)
    contexts = torch.cat([head.policy.encode(head.policy.observe(obs)) for obs in windows[:-1]])
    assert torch.equal(rollout.ctx, contexts)
    with torch.no_grad():
        assert float(head.log_ratio(rollout.ctx, rollout.record).abs().max()) < 1e-5


def environment() -> ChunkEnv:
    shape: Any = policy()
    return ChunkEnv(TaskSpec("toys:Dot"), shape, num_envs=5, num_workers=0, seed=0, reward=RewardConfig())


def collected_from(env: ChunkEnv, obs: dict[str, np.ndarray], head: Head, value: ValueNet, **changes: Any) -> Any:
    arguments = {"num_chunks": 14, "gae_lambda": 0.9, "scale": None, "base": None, "generator": generator(), **changes}
    return collect(env, obs, head, value, **arguments)


def test_a_rollout_can_record_the_base_and_be_given_up() -> None:
    head = dppo()
    value = ValueNet(ValueNet.Config(width=8, depth=0), head.policy.encoder.ctx_dim)
    with environment() as env:
        obs = env.reset()
        rollout = collected_from(env, obs, head, value, base=head.base, num_chunks=3)[0].batch
        assert rollout.record["bc_chunk"].shape == (15, 2, 2)
        asked = iter([False, True])
        assert collected_from(env, obs, head, value, stop=lambda: next(asked)) is None


# --- the guard ----------------------------------------------------------------------------------------------------------------


def watched(rates: list[float], episodes: int, seed: int) -> tuple[int, Collapse] | None:
    rng, guard = np.random.default_rng(seed), Guard(GuardConfig())
    for k, rate in enumerate(rates):
        collapse = guard(k, (rng.random(episodes) < rate).astype(float).tolist())
        if collapse is not None:
            return k, collapse
    return None


@pytest.mark.parametrize(("rate", "episodes"), [(0.5, 100), (0.05, 400)])
def test_luck_is_no_collapse(rate: float, episodes: int) -> None:
    """Of 100 runs of 300 iterations at a constant rate. With 4 standard errors instead of 5.5 a sixth of them were stopped."""
    assert sum(watched([rate] * 300, episodes, seed) is not None for seed in range(100)) <= 1


def test_a_collapse_is_noticed_at_once() -> None:
    delays = []
    for seed in range(50):
        found = watched([0.7] * 50 + [0.4] * 20, 100, seed)
        assert found is not None
        delays.append(found[0] - 49)
        assert 0.68 < found[1].best < 0.85
        assert found[1].iteration < 50
    assert min(delays) >= 1
    assert np.mean(delays) < 4  # iterations of 100 episodes, in a window of 400
    assert max(delays) <= 6


def test_returns_are_watched_like_successes() -> None:
    rng, guard = np.random.default_rng(0), Guard(GuardConfig())
    for k in range(100):
        assert guard(k, rng.normal(-300 + k, 40, 60).tolist()) is None  # improving
    assert guard.best is not None
    assert guard.best[2] > 90
    for k in range(100, 110):
        if (collapse := guard(k, rng.normal(-250, 40, 60).tolist())) is not None:
            break
    assert collapse is not None


def test_iterations_in_which_no_episode_ended_are_no_evidence() -> None:
    guard = Guard(GuardConfig(episodes=20))
    assert guard(0, [1.0] * 30) is None
    assert all(guard(k, []) is None for k in range(1, 20))
    assert guard(20, [1.0] * 19) is None
    assert guard(21, [0.0] * 25) is not None
