"""The methods of reinforcement: their ratios against densities by hand, and what they leave behind (rl.md, cards 1 to 4)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from robopolicy.config import component, parse
from robopolicy.data.normalize import Normalizer
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.generative.path import LinearFlow, Pred, VPCosine, broadcast_time
from robopolicy.generative.sampler import randn, step_dist
from robopolicy.policy import Policy, PolicyConfig, load_policy
from robopolicy.rl.heads.base import Head
from robopolicy.rl.heads.dppo import clip_schedule
from robopolicy.rl.heads.fpo import clamp_through
from robopolicy.rl.heads.registry import HEADS
from robopolicy.rl.ppo import surrogate

M, H, A, ROWS = 6, 8, 2, 4  # chunks, their length and width, executed rows (1 to 4)
EXECUTED = slice(1, 5)

FLOW: dict[str, Any] = {"path": {"type": "flow"}, "prediction": "flow", "sampler": {"type": "euler", "num_steps": 4}}
DIFFUSION: dict[str, Any] = {"path": {"type": "vp_cosine", "num_steps": 20}, "sampler": {"type": "ddim", "num_steps": 5}}
PARENTS: dict[str, dict[str, Any]] = {
    "flow": FLOW,
    "diffusion v": {**DIFFUSION, "prediction": "v"},
    "diffusion eps": {**DIFFUSION, "prediction": "eps"},
}
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "width": 16, "depth": 1},
    "unet1d": {"type": "unet1d", "down_dims": [8, 16], "time_dim": 8, "groups": 4},
    "dit": {"type": "dit", "width": 16, "depth": 1, "heads": 2, "time_dim": 8},
}
METHODS: dict[str, dict[str, Any]] = {
    "dppo": {"type": "dppo"},
    "dppo ddim": {"type": "dppo", "num_steps": 5, "tuned_steps": 3, "eta": 0.5, "clip_base": 0.01, "log_prob_range": [-5, 2]},
    "dppo all steps": {"type": "dppo", "num_steps": 4, "tuned_steps": None, "reduce": "sum"},
    "fpo": {"type": "fpo"},
    "fpo++": {
        "type": "fpo",
        "per_sample": True,
        "loss": "huber",
        "target": "eps",
        "reduce": "sum_steps",
        "loss_clamp": 4.0,
        "log_ratio_clamp": 5.0,
        "perturb_std": 0.02,
        "zero_noise": True,
    },
    "reinflow": {"type": "reinflow"},
    "reinflow sum": {"type": "reinflow", "reduce": "sum", "decay": True},
    "policyflow": {"type": "policyflow", "reg": 0.01},
    "gaussian": {"type": "gaussian"},
}
PAIRS = [(m, p, "mlp") for m in METHODS for p in PARENTS] + [(m, "flow", n) for m in HEADS for n in ("unet1d", "dit")]
PAIRS = [(m, p, n) for m, p, n in PAIRS if (m, p) != ("gaussian", "diffusion eps")]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parent(kind: str = "flow", net: str = "mlp", camera: bool = False, **changes: Any) -> Policy:
    config = parse(PolicyConfig, {"horizon": H, "n_action_steps": ROWS, "net": NETS[net], **PARENTS[kind], **changes})
    normalizers = {"state": Normalizer(3), "action": Normalizer(A)}
    observations = {"state": Feature("state", (3,))} | ({"camera": Feature("camera", (16, 16, 3), "uint8")} if camera else {})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = Policy(config, observations, Feature("action", (A,)), normalizers)
        scramble(made, seeded())
    return made.eval()


def scramble(module: torch.nn.Module, generator: torch.Generator, std: float = 0.1) -> None:
    """Move every weight: networks start at zero output, which would hide errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator)


def method(name: str, policy: Policy, **changes: Any) -> Any:
    cls, config = component("method", {**METHODS[name], **changes}, HEADS)
    made = cls(config, policy)
    assert isinstance(made, Head)
    return made


def contexts(policy: Policy, num: int = M) -> Tensor:
    return torch.randn(num, policy.encoder.ctx_dim, generator=seeded(9))


def rolled_out(head: Any, num: int = M) -> tuple[Tensor, dict[str, Tensor]]:
    ctx = contexts(head.policy, num)
    return ctx, head.prepare(ctx, head.act(ctx, seeded(1)).record, seeded(2))


# --- every method --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "net"), PAIRS)
def test_ratio_is_one_before_the_first_update_and_not_after(name: str, kind: str, net: str) -> None:
    head = method(name, parent(kind, net))
    ctx = contexts(head.policy)
    acted, generator = head.act(ctx, seeded(1)), seeded(2)
    record = head.prepare(ctx, acted.record, generator)
    log_ratio = head.log_ratio(ctx, record)
    assert torch.equal(log_ratio, torch.zeros_like(log_ratio))
    assert log_ratio.shape == (M, len(head.weights)) == (M, len(head.clips))
    assert acted.chunk.shape == (M, H, A)
    assert not acted.chunk.requires_grad
    assert all(len(value) == M and not value.requires_grad for value in record.values())

    parts = [head.prepare(ctx[s], {k: v[s] for k, v in acted.record.items()}, generator) for s in (slice(0, 4), slice(4, M))]
    order = torch.randperm(M, generator=seeded(3))
    shuffled = {k: torch.cat([part[k] for part in parts])[order] for k in parts[0]}
    assert float((head.log_ratio(ctx[order], shuffled).exp() - 1).detach().abs().max()) < 1e-5

    scramble(head, seeded(4), 0.01)
    moved = head.log_ratio(ctx, record)
    assert float(moved.detach().abs().amax(1).min()) > 1e-5
    moved.sum().backward()
    gradients = [p.grad for p in head.policy.net.parameters()]
    assert sum(g is not None and bool(g.any()) for g in gradients) > len(gradients) / 2


@pytest.mark.parametrize(("name", "kind", "net"), [*((m, "flow", "mlp") for m in METHODS), *PAIRS[-10::3]])
def test_a_saved_policy_of_a_head_acts_alike(name: str, kind: str, net: str, tmp_path: File) -> None:
    head = method(name, parent(kind, net))
    scramble(head, seeded(4), 0.01)
    head.policy.save(tmp_path)
    loaded, ctx = load_policy(tmp_path), contexts(head.policy)
    chunk = head.policy.sample(ctx, seeded(5))
    assert torch.equal(loaded.sample(ctx, seeded(5)), chunk)
    assert float((chunk - head.base.sample(ctx, seeded(5))).detach().abs().max()) > 1e-4  # what was saved is what was learned
    assert set(loaded.state_dict()) <= {*parent(kind, net).state_dict(), *(k for k in loaded.state_dict() if "frozen_net" in k)}
    method(name, loaded)  # and may be tuned on


@pytest.mark.parametrize("name", METHODS)
def test_divergence_is_nothing_at_the_base_and_grows(name: str) -> None:
    head = method(name, parent())
    ctx, record = rolled_out(head)
    assert head.divergence(ctx, record).item() < 1e-10
    base = {k: v.clone() for k, v in head.base.state_dict().items()}
    scramble(head.policy, seeded(4), 0.01)
    near = head.divergence(ctx, record)
    near.backward()
    assert any(p.grad is not None and p.grad.any() for p in head.policy.net.parameters())
    scramble(head.policy, seeded(4), 0.05)
    assert 0 < near.item() < head.divergence(ctx, record).item()
    assert all(torch.equal(v, base[k]) for k, v in head.base.state_dict().items())
    assert not any(p.requires_grad for p in head.base.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_only_the_network_and_the_exploration_learn(name: str) -> None:
    head = method(name, parent(camera=True, encoder={"type": "multimodal", "rgb": {"widths": [16]}}))
    assert list(head.policy.encoder.parameters())
    learned = {key for key, parameter in head.named_parameters() if parameter.requires_grad}
    own = ("policy.net.", "noise_net.", "log_std")
    assert {key for key in learned if not key.startswith(own)} == set()
    assert {key for key, _ in head.named_parameters() if key.startswith("policy.net.")} <= learned
    assert not head.policy.training


@pytest.mark.parametrize("name", METHODS)
def test_what_was_stored_is_what_is_executed_and_scored_unclipped(name: str) -> None:
    """Trap T9: neither the environment's bounds nor the noise's range touch what is scored."""
    wide = {
        "dppo": {"min_std": 3.0},
        "fpo": {"perturb_std": 3.0},
        "reinflow": {"min_std": 3.0, "max_std": 3.0},
        "policyflow": {"std": 3.0},
        "gaussian": {"std": 3.0, "max_std": 3.0},
    }
    head = method(name, parent(), **wide[METHODS[name]["type"]])
    ctx = contexts(head.policy)
    chunk, record = head.act(ctx, seeded(1))
    assert float(chunk.abs().max()) > 3
    if "chain" in record:
        stored = record["chain"][:, -1]
    else:
        stored = record["chunk"] if "chunk" in record else record["end"] + record["delta"]
    assert torch.equal(stored, chunk)


@pytest.mark.parametrize("name", ["dppo", "reinflow", "policyflow", "gaussian"])
def test_rows_that_are_not_executed_are_not_scored(name: str) -> None:
    head = method(name, parent())
    ctx, record = rolled_out(head)
    key = next(k for k in ("chain", "delta", "chunk") if k in record)
    for row in range(H):
        changed = record[key].clone()
        (changed[:, -1] if key == "chain" else changed)[:, row] += 0.05
        same = torch.equal(head.log_ratio(ctx, {**record, key: changed}), torch.zeros(M, len(head.weights)))
        assert same == (row not in range(1, 5)), row


def noises(policy: Policy, num: int, generator: torch.Generator) -> list[Tensor]:
    return [randn((M, H, A), generator) for _ in range(num)]


@pytest.mark.parametrize("kind", PARENTS)
@pytest.mark.parametrize("name", ["dppo", "dppo ddim", "dppo all steps", "reinflow"])
def test_the_chain_that_is_scored_is_the_chain_that_was_sampled(name: str, kind: str) -> None:
    """Trap T4: the noise that the scoring steps find in the chain is the noise that the generator gave."""
    head = method(name, parent(kind))
    ctx = contexts(head.policy)
    chain = head.act(ctx, seeded(1)).record["chain"]
    steps = head.steps if name == "reinflow" else head.tuned
    floor = 0.0 if name == "reinflow" else head.config.min_std
    assert chain.shape == (M, len(steps) + 1, H, A)
    drawn = noises(head.policy, head.config.num_steps + 1, seeded(1))[-len(steps) :]
    for i, (t, u) in enumerate(steps):
        dist = head.step(head.policy, chain[:, i], t, u, ctx).floored(floor)
        torch.testing.assert_close((chain[:, i + 1] - dist.mean) / dist.std, drawn[i], atol=1e-4, rtol=1e-4)
    times = head.policy.sampler.times(head.policy.path)
    assert steps == list(itertools.pairwise(times))[-len(steps) :]  # and the deployed sampler stops at the same times


def test_policies_that_sample_elsewhere_are_evaluated_without_exploration() -> None:
    """Trap T6, card 3: before training, what is evaluated is the deterministic base."""
    policy, ctx = parent(), contexts(parent())
    euler = policy.varied(sampler={"type": "euler", "num_steps": 4, "clip": None})
    head = method("reinflow", policy)
    assert torch.equal(head.policy.sample(ctx, seeded(5)), euler.sample(ctx, seeded(5)))
    for name in ("dppo", "policyflow"):
        head = method(name, policy, num_steps=4, **({"tuned_steps": 2} if name == "dppo" else {}))
        assert torch.equal(head.policy.sample(ctx, seeded(5)), euler.sample(ctx, seeded(5)))
    assert torch.equal(method("fpo", policy).policy.sample(ctx, seeded(5)), policy.sample(ctx, seeded(5)))


# --- DPPO ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_dppo_scores_a_chain_made_by_hand_as_torch_does(reduce: str) -> None:
    policy = parent("diffusion v", sampler={"type": "ddim", "num_steps": 5, "clip": None})
    head = method("dppo", policy, reduce=reduce, min_logprob_std=0.2, num_steps=20, tuned_steps=3)
    chain, ctx = torch.randn(M, 4, H, A, generator=seeded(3)), contexts(policy)
    expected, scored = [], head.score(ctx, {"chain": chain})
    abar = policy.path.alphas_cumprod  # type: ignore[attr-defined]
    for i, index in enumerate([2, 1, 0]):
        x, t = chain[:, i], torch.full((M,), (index + 1) / 20)
        v = policy.net(x, policy.path.net_time(t).float(), ctx)
        now, before = abar[index], abar[index - 1] if index else torch.ones((), dtype=torch.float64)
        alpha, beta = now / before, 1 - now / before
        x0 = now.sqrt() * x - (1 - now).sqrt() * v
        mean = beta * before.sqrt() / (1 - now) * x0 + alpha.sqrt() * (1 - before) / (1 - now) * x
        std = max(0.2, float((beta * (1 - before) / (1 - now)).sqrt()))
        log_prob = Normal(mean, std).log_prob(chain[:, i + 1].double())[:, EXECUTED].flatten(1)
        expected.append(log_prob.mean(1) if reduce == "mean" else log_prob.sum(1))
    torch.testing.assert_close(scored.double(), torch.stack(expected, 1), atol=1e-4, rtol=1e-4)


def test_dppo_clamps_the_density_of_each_entry_as_published() -> None:
    chain, ctx = torch.randn(M, 4, H, A, generator=seeded(3)), contexts(parent())
    free = method("dppo", parent(), num_steps=4, tuned_steps=3).score(ctx, {"chain": chain})
    bound = method("dppo", parent(), num_steps=4, tuned_steps=3, log_prob_range=[-5, 2]).score(ctx, {"chain": chain})
    assert free.min().item() < -5 <= bound.min().item()
    assert bound.max().item() <= 2


@pytest.mark.parametrize("num_steps", [20, 100])
def test_ancestral_steps_over_all_times_are_those_of_ddpm(num_steps: int) -> None:
    path = VPCosine(VPCosine.Config(num_steps=num_steps))
    abar = path.alphas_cumprod
    beta = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    x0, x = torch.full((1, 1, 1), 0.3, dtype=torch.float64), torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    for i in range(1, num_steps):
        pred = Pred(x0, (x - abar[i].sqrt() * x0) / (1 - abar[i]).sqrt())
        step = step_dist(path, pred, x, (i + 1) / num_steps, i / num_steps, eta=1.0)
        mean = beta[i] * abar[i - 1].sqrt() / (1 - abar[i]) * x0 + (1 - beta[i]).sqrt() * (1 - abar[i - 1]) / (1 - abar[i]) * x
        assert float(step.mean) == pytest.approx(float(mean), abs=1e-9)
        assert step.std == pytest.approx(float((beta[i] * (1 - abar[i - 1]) / (1 - abar[i])).sqrt()), abs=1e-9)


def sigma(path: VPCosine, index: int, to: int, eta: float = 1.0) -> float:
    """Std of the step between two indices of the table; -1 is clean."""
    zeros = torch.zeros(1, 1, 1)
    std = step_dist(path, Pred(zeros, zeros), zeros, (index + 1) / path.num_steps, (to + 1) / path.num_steps, eta).std
    assert isinstance(std, float)
    return std


def test_published_sigmas() -> None:
    """rl.md section 16."""
    twenty, hundred = (VPCosine(VPCosine.Config(num_steps=n)) for n in (20, 100))
    expected = [0, 0.0758, 0.1232, 0.1617, 0.1952, 0.2257, 0.2546, 0.2827, 0.3107, 0.3392]
    assert [sigma(twenty, i, i - 1) for i in range(10)] == pytest.approx(expected, abs=5.1e-5)
    expected = [0, 0.0201, 0.0289, 0.0359, 0.0418, 0.0471, 0.0519, 0.0564, 0.0605, 0.0644]
    assert [sigma(hundred, i, i - 1) for i in range(10)] == pytest.approx(expected, abs=5.1e-5)
    assert float(twenty.alphas_cumprod[0]) == pytest.approx(0.992007, abs=1e-6)
    assert float(twenty.alphas_cumprod[-1]) == pytest.approx(6.06e-6, abs=1e-8)
    assert float(hundred.alphas_cumprod[0]) == pytest.approx(0.999369, abs=1e-6)
    leading = [80, 60, 40, 20, 0]  # not our grid, which is trailing
    assert hundred.alphas_cumprod[leading].tolist() == pytest.approx([0.08515, 0.32612, 0.63252, 0.8891, 0.99937], abs=5.1e-6)
    stds = [sigma(hundred, i, j) for i, j in itertools.pairwise([*leading, -1])]
    assert stds == pytest.approx([0.7378, 0.514, 0.2951, 0.0251, 0], abs=5.1e-5)
    x0, x = torch.full((1, 1, 1), 0.3, dtype=torch.float64), torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    for index, mean, std in [(5, 0.5763466, 0.2257074), (12, 0.6114831, 0.4354364)]:
        a, b = (float(c) for c in twenty.coefficients(torch.tensor((index + 1) / 20)))
        step = step_dist(twenty, Pred(x0, (x - a * x0) / b), x, (index + 1) / 20, index / 20, eta=1.0)
        assert (float(step.mean), step.std) == pytest.approx((mean, std), abs=5e-7)


def test_published_weights_and_clips() -> None:
    """Weights are the published ones over K', which makes the sum over steps the published mean."""
    head = method("dppo", parent(), num_steps=20, tuned_steps=10, gamma_denoising=0.99, clip=0.01, clip_base=0.001)
    weights = 10 * head.weights
    assert [float(weights[i]) for i in (0, 8, 9)] == pytest.approx([0.9135, 0.99, 1.0], abs=5e-5)
    expected = [0.001, 0.00119, 0.00145, 0.00181, 0.00232, 0.00303, 0.00401, 0.00539, 0.00732, 0.01]
    assert head.clips.tolist() == pytest.approx(expected, abs=5.1e-6)
    assert clip_schedule(1, 0.01, 0.001, 3.0).tolist() == pytest.approx([0.01])  # published: 0 / 0


@pytest.mark.parametrize("kind", PARENTS)
@pytest.mark.parametrize("eval_eta", [0.0, 1.0])
def test_tuned_and_frozen_networks_together_are_the_base_before_any_update(kind: str, eval_eta: float) -> None:
    policy = parent(kind)
    head = method("dppo", policy, num_steps=5, tuned_steps=2, eval_eta=eval_eta)
    plain = policy.varied(sampler={"type": "ddim", "num_steps": 5, "eta": eval_eta, "clip": policy.sampler.clip})
    ctx = contexts(policy)
    assert hasattr(head.policy, "frozen_net")
    assert torch.equal(head.policy.sample(ctx, seeded(5)), plain.sample(ctx, seeded(5)))
    assert torch.equal(head.policy.sample(ctx, seeded(5)), head.base.sample(ctx, seeded(5)))


def test_early_steps_stay_as_they_were() -> None:
    """Trap T7: in training, in evaluation, and after saving (the round trip above)."""
    head = method("dppo", parent(), num_steps=5, tuned_steps=2)
    frozen = {k: v.clone() for k, v in head.policy.frozen_net.state_dict().items()}
    ctx, record = rolled_out(head)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.1)
    head.log_ratio(ctx, record).sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in head.policy.frozen_net.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in head.policy.frozen_net.state_dict().items())
    x = torch.randn(M, H, A, generator=seeded(3))
    for t in head.times[:-1]:
        at = torch.full((M,), t)
        same = torch.equal(head.policy.field(x, at, ctx).x0, head.base.field(x, at, ctx).x0)
        assert same == (t > 0.4 + 1e-6), t
    assert [t for t, _ in head.tuned] == pytest.approx([0.4, 0.2])


def test_deterministic_evaluation_repeats_itself() -> None:
    policy = method("dppo", parent("diffusion eps")).policy.varied(initial_noise=0.0)
    ctx = contexts(policy)
    assert torch.equal(policy.sample(ctx, seeded(5)), policy.sample(ctx, seeded(6)))


def test_divergence_of_chains_is_that_of_torch() -> None:
    head = method("dppo", parent(), num_steps=4, tuned_steps=2)
    ctx, record = rolled_out(head)
    scramble(head.policy, seeded(4), 0.05)
    chain, expected = record["chain"], 0.0
    for i, (t, u) in enumerate(head.tuned):
        new, old = (head.step(p, chain[:, i], t, u, ctx).floored(head.config.min_std) for p in (head.policy, head.base))
        kl = kl_divergence(Normal(new.mean, torch.tensor(new.std)), Normal(old.mean, torch.tensor(old.std)))
        expected += kl[:, EXECUTED].mean().item()
    assert head.divergence(ctx, record).item() == pytest.approx(expected, rel=1e-4)


def test_dppo_says_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="tuned_steps 6 of a chain of 5"):
        method("dppo", parent(), num_steps=5, tuned_steps=6)
    tuned = method("dppo", parent(), num_steps=5, tuned_steps=2).policy
    with pytest.raises(ConfigError, match=r"below t = 0\.4 only"):
        method("dppo", tuned, num_steps=10, tuned_steps=5)


@pytest.mark.parametrize("name", ["fpo", "reinflow", "policyflow"])
def test_what_dppo_left_half_frozen_is_tuned_by_the_others_where_it_is_not(name: str) -> None:
    head = method(name, method("dppo", parent(), num_steps=5, tuned_steps=2).policy)
    ctx, record = rolled_out(head)
    head.log_ratio(ctx, record).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in head.policy.net.parameters())
    assert all(p.grad is None for p in head.policy.frozen_net.parameters())


# --- FPO -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fpo", "fpo++"])
def test_gradient_of_fpo_is_that_of_the_denoising_loss(name: str) -> None:
    """Card 2: at the old weights the gradient of the mean ratio is minus that of the mean loss, which is written out here."""
    head = method(name, parent(), loss="mse", target="own", reduce="mean", loss_clamp=None, perturb_std=0.0)
    ctx, record = rolled_out(head)
    net = head.policy.net
    ratio = (head.log_ratio(ctx, record).exp() * head.weights).sum(1).mean()
    gradients = torch.autograd.grad(ratio, list(net.parameters()))
    losses = []
    for i in range(head.config.num_samples):
        eps, t = record["eps"][:, i], record["t"][:, i].float()[:, None, None]
        x = (1 - t) * record["chunk"] + t * eps
        losses.append((net(x, 100 * t.flatten(), ctx) - (eps - record["chunk"]))[:, EXECUTED].square().mean())
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(net.parameters()))
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, -other, atol=1e-6, rtol=1e-4)


def test_order_of_the_pairs_does_not_matter() -> None:
    order = torch.randperm(8, generator=seeded(3))
    for name in ("fpo", "fpo++"):
        head = method(name, parent())
        ctx, record = rolled_out(head)
        scramble(head.policy, seeded(4), 0.05)
        permuted = {**record, "eps": record["eps"][:, order], "t": record["t"][:, order]}
        if name == "fpo++":
            permuted["old"] = record["old"][:, order]
        ratio, other = (head.log_ratio(ctx, r).exp() for r in (record, permuted))
        if name == "fpo++":
            ratio = ratio[:, order]
        assert (ratio - 1).abs().max().item() > 1e-4
        torch.testing.assert_close(ratio, other, atol=1e-6, rtol=1e-6)


def test_pairs_are_drawn_once_for_each_roll_out() -> None:
    head = method("fpo", parent("diffusion v"))
    ctx = contexts(head.policy)
    record, generator = head.act(ctx, seeded(1)).record, seeded(2)
    first, again = (head.prepare(ctx, record, generator) for _ in range(2))
    assert not torch.equal(first["eps"], again["eps"])
    assert not torch.equal(first["t"], again["t"])
    assert torch.equal(head.log_ratio(ctx, first), head.log_ratio(ctx, first))
    assert first["eps"].shape == (M, 8, H, A)
    assert first["t"].shape == (M, 8)
    times = 20 * torch.cat([first["t"], again["t"]])  # those of the policy's own training: its table
    torch.testing.assert_close(times, times.round())


def test_error_of_the_noise_is_a_weighted_error_of_the_velocity() -> None:
    """Card 2, whose ``t`` is ours: ``|eps - pred.eps|^2 = (1 - t)^2 |v - v*|^2``."""
    head = method("fpo", parent())
    ctx, record = rolled_out(head)
    (velocity, wanted), (eps, drawn) = (head.errors(head.policy, ctx, record, target) for target in ("own", "eps"))
    assert velocity.shape == eps.shape == (M, 8, ROWS, A)
    weight = (1 - record["t"].float())[:, :, None, None] ** 2
    torch.testing.assert_close((eps - drawn).square(), weight * (velocity - wanted).square(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("reduce", "loss"), itertools.product(["mean", "sum_steps"], ["mse", "huber"]))
def test_losses_of_fpo_by_hand(reduce: str, loss: str) -> None:
    head = method("fpo", parent("diffusion eps"), per_sample=True, reduce=reduce, loss=loss, huber_delta=0.3)
    ctx, record = rolled_out(head)
    seen, wanted = head.errors(head.policy, ctx, record, "own")
    error = (seen - wanted).abs()
    entries = error**2 if loss == "mse" else torch.where(error < 0.3, error**2 / 2, 0.3 * (error - 0.15))
    expected = -entries.mean((2, 3)) * (1 if reduce == "mean" else ROWS)
    torch.testing.assert_close(record["old"], expected)
    assert torch.equal(wanted, record["eps"][:, :, EXECUTED])  # what an eps network predicts is the noise


def test_clamps_bound_values_and_let_gradients_pass() -> None:
    x = torch.tensor([-3.0, 0.5, 7.0], requires_grad=True)
    y = clamp_through(x, -1.0, 2.0)
    assert y.tolist() == pytest.approx([-1, 0.5, 2])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]
    head = method("fpo++", parent(), loss_clamp=0.5, log_ratio_clamp=0.01)
    ctx, record = rolled_out(head)
    assert float(record["old"].min()) == pytest.approx(-0.5)
    scramble(head.policy, seeded(4), 0.2)
    log_ratio = head.log_ratio(ctx, record)
    assert float(log_ratio.detach().abs().max()) == pytest.approx(0.01, rel=1e-3)
    log_ratio.sum().backward()
    assert any(bool(p.grad.any()) for p in head.policy.net.parameters() if p.grad is not None)


class GaussianFlow:
    """The exact field of a policy whose actions are ``N(mean, std^2)``, on the linear path."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        a, b = (broadcast_time(c, x) for c in LinearFlow().coefficients(t))
        variance = a**2 * self.std**2 + b**2
        x0 = self.mean + a * self.std**2 / variance * (x - a * self.mean)
        return Pred(x0, b * (x - a * self.mean) / variance)


def test_log_ratio_of_fpo_has_the_sign_of_the_exact_one() -> None:
    """Card 2: for a Gaussian flow whose mean moves, the difference of losses is the log-density ratio times a positive number."""
    head = method("fpo", parent(), num_samples=3000)
    head.policy.leaf, ctx = GaussianFlow(0.0, 0.5), contexts(head.policy, 40)
    chunk = 0.5 * torch.randn(40, H, A, generator=seeded(3))
    record = head.prepare(ctx, {"chunk": chunk}, seeded(2))
    head.policy.leaf = GaussianFlow(0.3, 0.5)
    log_ratio = head.log_ratio(ctx, record)[:, 0]
    exact = (Normal(0.3, 0.5).log_prob(chunk) - Normal(0.0, 0.5).log_prob(chunk))[:, EXECUTED].sum((1, 2))
    clear = exact.abs() > 0.5
    assert int(clear.sum()) > 20
    assert {bool(x) for x in exact[clear] > 0} == {True, False}
    assert torch.equal(log_ratio[clear].sign(), exact[clear].sign())
    assert float(torch.corrcoef(torch.stack([log_ratio, exact]))[0, 1]) > 0.99


def test_fpo_explores_with_the_sampler_of_the_policy() -> None:
    policy = parent(sampler={"type": "heun", "num_steps": 3})
    ctx = contexts(policy)
    assert torch.equal(method("fpo", policy).act(ctx, seeded(1)).chunk, policy.sample(ctx, seeded(1)))
    more = method("fpo", policy, num_steps=6)
    assert torch.equal(
        more.act(ctx, seeded(1)).chunk, policy.varied(sampler={"type": "heun", "num_steps": 6}).sample(ctx, seeded(1))
    )
    zero = method("fpo", policy, zero_noise=True)
    assert torch.equal(zero.act(ctx, seeded(1)).chunk, policy.sample(ctx, seeded(1)))
    assert torch.equal(zero.policy.sample(ctx, seeded(1)), zero.policy.sample(ctx, seeded(2)))
    again = method("fpo", zero.policy, zero_noise=True)
    assert torch.equal(again.act(ctx, seeded(1)).chunk, policy.sample(ctx, seeded(1)))
    with pytest.raises(ConfigError, match="set zero_noise: true"):
        method("fpo", zero.policy)


# --- ReinFlow ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARENTS)
def test_reinflow_without_noise_is_the_deterministic_base(kind: str) -> None:
    policy = parent(kind)
    head = method("reinflow", policy, min_std=1e-9, max_std=1e-9)
    sampler = {"type": "euler", "num_steps": 4, "clip": policy.sampler.clip}
    ctx = contexts(policy)
    expected = policy.varied(sampler=sampler).sample(ctx, seeded(1))
    torch.testing.assert_close(head.act(ctx, seeded(1)).chunk, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_reinflow_scores_a_chain_as_torch_does(reduce: str) -> None:
    head = method("reinflow", parent(), reduce=reduce)
    scramble(head.noise_net, seeded(4), 0.5)
    ctx, record = rolled_out(head)
    chain, entries = record["chain"], []
    for k in range(4):  # Euler's method on the published grid, 0, 1/4, 1/2, 3/4 in its time
        x, t = chain[:, k], torch.full((M,), 1 - k / 4)
        share = (torch.tanh(head.noise_net(x, 100 * t, ctx)) + 1) / 2
        low, high = 2 * math.log(0.08), 2 * math.log(0.16)
        std = torch.exp(0.5 * (low + (high - low) * share))
        entries.append(Normal(x - head.policy.net(x, 100 * t, ctx) / 4, std).log_prob(chain[:, k + 1])[:, EXECUTED])
    stacked = torch.stack(entries, 1).flatten(1)
    expected = stacked.mean(1) if reduce == "mean" else stacked.sum(1)
    torch.testing.assert_close(record["old"][:, 0], expected, atol=1e-4, rtol=1e-4)


def test_learned_noise_stays_in_its_range_and_decays() -> None:
    head = method("reinflow", parent(), decay=True)
    ctx, record = rolled_out(head)
    x, t = record["chain"][:, 0], torch.ones(M)
    assert (head.std(x, t, ctx) - math.sqrt(0.08 * 0.16)).abs().max().item() < 1e-6
    scramble(head.noise_net, seeded(4), 3.0)
    std = head.std(x, t, ctx).detach()
    assert 0.08 - 1e-6 <= float(std.min()) < 0.09 < 0.15 < float(std.max()) <= 0.16 + 1e-6
    seen = []
    for progress in (0.0, 0.35, 0.675, 1.0):
        head.anneal(progress)
        seen.append(head.max_std)
    assert seen == pytest.approx([0.16, 0.16, 0.12, 0.08])
    assert (head.std(x, t, ctx) - 0.08).abs().max().item() < 1e-6
    constant = method("reinflow", parent())
    constant.anneal(1.0)
    assert constant.max_std == 0.16
    with pytest.raises(ConfigError, match="swap them"):
        method("reinflow", parent(), min_std=0.2)


def test_the_noise_of_reinflow_is_learned_and_its_entropy_is_that_of_torch() -> None:
    head = method("reinflow", parent())
    scramble(head.noise_net, seeded(4), 0.5)
    ctx, record = rolled_out(head)
    chain = record["chain"]
    stds = [head.std(chain[:, i], torch.full((M,), t), ctx)[:, EXECUTED] for i, (t, _) in enumerate(head.steps)]
    entropy = head.entropy(ctx, record)
    assert entropy.item() == pytest.approx(Normal(0.0, torch.stack(stds)).entropy().mean().item(), rel=1e-5)
    head.log_ratio(ctx, record).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.noise_net.parameters())


# --- PolicyFlow ----------------------------------------------------------------------------------------------------------------


class TimeFlow:
    """A field whose ``eps - x0`` is ``offset + bend (t - 0.6)^2``."""

    def __init__(self, policy: Policy, offset: float, bend: float = 0.0) -> None:
        self.path, self.offset, self.bend = policy.path, offset, bend

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        y = (self.offset + self.bend * (t.to(x.dtype) - 0.6) ** 2)[:, None, None].expand_as(x)
        return self.path.predict(x, t, y, "flow")


@pytest.mark.parametrize("kind", ["flow", "diffusion v"])
def test_ratio_of_policyflow_is_exact_for_a_constant_velocity(kind: str) -> None:
    policy = parent(kind, sampler={"type": "ddim", "clip": None})
    head = method("policyflow", policy, num_steps=5)
    ctx = contexts(policy)
    head.policy.leaf = TimeFlow(policy, 0.4)
    chunk, acted = head.act(ctx, seeded(1))
    record = head.prepare(ctx, acted, seeded(2))
    head.policy.leaf = TimeFlow(policy, 0.37)
    with torch.no_grad():
        head.log_std += 0.1
    end = head.policy.sampler.sample(head.policy.field, ctx, policy.path.prior(acted["noise"]), path=policy.path).x0
    assert float((end - acted["end"]).mean()) == pytest.approx(0.03, abs=1e-4)  # against the change of eps - x0
    exact = Normal(end, 0.1 * math.exp(0.1)).log_prob(chunk) - Normal(acted["end"], 0.1).log_prob(chunk)
    assert float(exact.abs().max()) > 0.1
    torch.testing.assert_close(head.log_ratio(ctx, record)[:, 0], exact[:, EXECUTED].sum((1, 2)), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["flow", "diffusion v"])
def test_times_of_policyflow_weigh_as_the_steps_of_the_sampler_do(kind: str) -> None:
    """A change of velocity that depends on the time moves the chunk by what the drawn times give on average."""
    policy = parent(kind, sampler={"type": "ddim", "clip": None})
    head = method("policyflow", policy, num_steps=5)
    ctx = contexts(policy, 4000)
    head.policy.leaf = TimeFlow(policy, 0.4)
    acted = head.act(ctx, seeded(1)).record
    record = head.prepare(ctx, acted, seeded(2))
    head.policy.leaf = TimeFlow(policy, 0.4, 2.0)
    end = head.policy.sampler.sample(head.policy.field, ctx, policy.path.prior(acted["noise"]), path=policy.path).x0
    shift = -head.length * (head.velocity(head.policy, ctx, record) - record["velocity"]).mean()
    assert float(shift) == pytest.approx(float((end - acted["end"]).mean()), abs=0.009)  # 4 standard errors
    assert {round(t, 6) for t in record["t"].tolist()} == {round(t, 6) for t in head.policy.sampler.times(policy.path)[:-1]}


def test_policyflow_stays_where_nothing_pulls() -> None:
    for reg in (0.0, 0.01):
        head = method("policyflow", parent(), reg=reg)
        ctx, record = rolled_out(head)
        scramble(head.policy, seeded(4), 0.01)
        ratio = head.log_ratio(ctx, record).exp()
        loss = -surrogate(ratio, torch.zeros(M, 1), head.clips, "ppo").sum() + (head.penalty(ctx, record) or 0.0)
        gradients = torch.autograd.grad(loss, list(head.policy.net.parameters()))
        assert any(bool(g.any()) for g in gradients) == (reg > 0)


def test_regulariser_of_policyflow_is_the_published_one() -> None:
    head = method("policyflow", parent(), reg=0.01)
    ctx, record = rolled_out(head)
    scramble(head.policy, seeded(4), 0.05)
    s = 1 - record["t"].float()[:, None, None]  # the published time
    x = (1 - s) * record["noise"] + s * record["end"]
    old, new = (-p.net(x, 100 * record["t"].float(), ctx) for p in (head.base, head.policy))
    expected = 0.01 * ((1 - s) * new - (x - s * old))[:, EXECUTED].square().mean()
    assert head.penalty(ctx, record).item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected.item() > 1e-4


# --- Gaussian tails ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["policyflow", "gaussian"])
def test_entropy_is_that_of_the_tail(name: str) -> None:
    head = method(name, parent())
    ctx, record = rolled_out(head)
    assert head.entropy(ctx, record).item() == pytest.approx(float(Normal(0.0, 0.1).entropy()), rel=1e-5)
    with torch.no_grad():
        head.log_std.fill_(10.0)  # far beyond its bound: what acts has the std of the bound, and that is what is reported
    top = math.exp(2) if name == "policyflow" else 1.0
    assert head.entropy(ctx, record).item() == pytest.approx(float(Normal(0.0, top).entropy()), rel=1e-5)
    fixed = method(name, parent(), learn_std=False)
    assert fixed.entropy(ctx, record) is None
    assert not fixed.log_std.requires_grad


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gaussian_is_scored_as_torch_does_and_evaluated_at_its_mean(reduce: str) -> None:
    head = method("gaussian", parent("diffusion v"), reduce=reduce)
    ctx, record = rolled_out(head)
    mean = head.policy.sample(ctx, seeded(5))
    assert torch.equal(mean, head.policy.sample(ctx, seeded(6)))
    entries = Normal(mean, 0.1).log_prob(record["chunk"])[:, EXECUTED].flatten(1)
    expected = entries.mean(1) if reduce == "mean" else entries.sum(1)
    torch.testing.assert_close(record["old"][:, 0], expected, atol=1e-4, rtol=1e-4)


def test_gaussian_says_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="use a policy with prediction v, x0 or flow"):
        method("gaussian", parent("diffusion eps"))
    tuned = method("dppo", parent(), num_steps=5, tuned_steps=2).policy
    with pytest.raises(ConfigError, match="frozen"):
        method("gaussian", tuned)


# --- the surrogate -------------------------------------------------------------------------------------------------------------


def slope(ratio: float, advantage: float, kind: Any, clip: float = 0.05) -> float:
    r = torch.tensor([[ratio]], requires_grad=True)
    surrogate(r, torch.tensor([[advantage]]), torch.tensor([clip]), kind).sum().backward()
    assert r.grad is not None
    return float(r.grad)


def test_aspo_is_flat_at_the_edge_and_pulls_back_beyond() -> None:
    """Card 2: zero slope at ``1 - e`` for negative advantages, PPO's slope at 1, and PPO itself for positive ones."""
    assert slope(0.95, -2.0, "aspo") == pytest.approx(0, abs=1e-5)
    assert slope(1.0, -2.0, "aspo") == pytest.approx(-2.0)
    assert slope(0.90, -2.0, "aspo") == pytest.approx(2.0, rel=1e-4)
    assert slope(0.90, -2.0, "ppo") == 0
    for ratio in (0.9, 1.0, 1.04, 1.1):
        assert slope(ratio, 2.0, "aspo") == slope(ratio, 2.0, "ppo")


@pytest.mark.parametrize("name", ["dppo", "reinflow", "policyflow", "gaussian"])
def test_a_mean_over_entries_hides_large_joint_ratios(name: str) -> None:
    """Trap T3: why clip and reduce belong together. A mean of 28 entries within .01 is a joint ratio of up to 1.32."""
    found = []
    for reduce in ("mean", "sum"):
        torch.manual_seed(0)  # of the noise network
        head = method(name, parent(), reduce=reduce)
        ctx, record = rolled_out(head)
        scramble(head, seeded(4), 0.01)
        found.append(head.log_ratio(ctx, record).detach())
    entries = ROWS * A * (head.config.num_steps if name == "reinflow" else 1)
    torch.testing.assert_close(found[1], entries * found[0], atol=1e-3, rtol=1e-3)
