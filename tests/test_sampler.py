"""Card 0.6 T2 to T5: the samplers against diffusers, against closed forms, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from robopolicy.config import component
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Leaf
from robopolicy.generative.path import EDM, Kind, LinearFlow, Path, Pred, VPCosine, broadcast_time
from robopolicy.generative.sampler import DDIM, DDPM, SAMPLERS, DPMSolver, Euler, Heun, Sampler, StepDist, randn, step_dist

PATHS = [VPCosine(), LinearFlow(), EDM()]
CTX = torch.zeros(1, 0)
MU, S = 1.5, 0.3  # Gaussian data N(MU, S^2)


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, Path | Sampler) else str(value)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_field(path: Path) -> Callable[[Tensor, Tensor, Tensor], Pred]:
    """The exact posterior mean for Gaussian data (T3)."""

    def field(x: Tensor, t: Tensor, ctx: Tensor) -> Pred:
        a, b = (broadcast_time(c, x) for c in path.coefficients(t))
        slope = a * S**2 / (a**2 * S**2 + b**2)
        x0 = MU + slope * (x - a * MU)
        return Pred(x0, b * (x - a * MU) / (a**2 * S**2 + b**2))  # (x - a x0) / b, also where b = 0

    return field


def closed_form(path: Path, x: Tensor, t: float) -> Tensor:
    """Where the probability flow ODE takes ``x`` from ``t`` to 0 on Gaussian data."""
    a, b = (float(c) for c in path.coefficients(torch.tensor(t, dtype=torch.float64)))
    return MU + (x - a * MU) * S / math.sqrt(a**2 * S**2 + b**2)


def toy_net(x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
    """A smooth network with something of everything: nonlinear, mixing rows, depending on time."""
    time = t[:, None, None] / 100 if t.ndim == 1 else t[:, :, None] / 100
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, 1) - 0.2 * time) + 0.1 * x


# --- T2: parity with diffusers -------------------------------------------------------------------------------------------------


def reference_walk(scheduler: Any, x: Tensor, **step_arguments: Any) -> Tensor:
    """Walk diffusers' scheduler with the toy network, on our table (test_path.py compares the tables): only rounding differs."""
    scheduler.alphas_cumprod = VPCosine().alphas_cumprod
    for timestep in scheduler.timesteps:
        y = toy_net(x, timestep.double().expand(x.shape[0]), CTX)
        x = scheduler.step(y, timestep, x, return_dict=False, **step_arguments)[0]
    return x


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 10])  # their steps do not meet their own times where steps does not divide 100
def test_ddim_is_that_of_diffusers(kind: Kind, eta: float, clip: float | None, steps: int) -> None:
    scheduler = DDIMScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        clip_sample=clip is not None,
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[kind],
    )
    scheduler.set_timesteps(steps)
    x = randn((4, 8, 2), seeded(0), dtype=torch.float64)
    expected = reference_walk(scheduler, x, eta=eta, use_clipped_model_output=clip is not None, generator=seeded(1))
    sampler = DDIM(DDIM.Config(num_steps=steps, eta=eta, clip=clip))
    found = sampler.sample(Leaf(toy_net, PATHS[0], kind), CTX, x, path=PATHS[0], generator=seeded(1)).x0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_ddpm_is_that_of_diffusers_with_the_small_variance() -> None:
    scheduler = DDPMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=True
    )
    scheduler.set_timesteps(100)
    x = randn((4, 8, 2), seeded(0), dtype=torch.float64)
    expected = reference_walk(scheduler, x, generator=seeded(1))
    found = DDPM().sample(Leaf(toy_net, PATHS[0], "eps"), CTX, x, path=PATHS[0], generator=seeded(1)).x0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_euler_is_that_of_diffusers_on_the_linear_path(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = randn((4, 8, 2), seeded(0), dtype=torch.float64)
    expected = x
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        y = toy_net(expected, 100 * sigma.double().expand(4), CTX)
        expected = scheduler.step(y, timestep, expected, return_dict=False)[0]
    found = Euler(Euler.Config(num_steps=steps)).sample(Leaf(toy_net, LinearFlow(), "flow"), CTX, x, path=LinearFlow()).x0
    assert (found - expected).abs().max() < 2e-6


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("steps", [2, 10])
def test_dpm_solver_is_that_of_diffusers(algorithm: str, steps: int) -> None:
    path = VPCosine()
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        algorithm_type=algorithm,
        prediction_type="sample",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    x = randn((4, 8, 2), seeded(0), dtype=torch.float64)
    expected, generator = x, seeded(1)
    noises = [randn(x.shape, generator, dtype=torch.float64) for _ in range(steps)]
    for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
        y = toy_net(expected, timestep.double().expand(4), CTX)
        expected = scheduler.step(y, timestep, expected, variance_noise=noise, return_dict=False)[0].double()
    sampler = DPMSolver(DPMSolver.Config(num_steps=steps, eta=float(algorithm.startswith("sde")), clip=None))
    found = sampler.sample(Leaf(toy_net, path, "x0"), CTX, x, path=path, generator=seeded(1)).x0
    assert (found - expected).abs().max() < 2e-4  # they keep the schedule and the sample in float32


# --- T3: Gaussian data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(("sampler", "order"), [(DDIM, 1), (Euler, 1), (Heun, 2), (DPMSolver, 2)])
def test_samplers_converge_to_the_closed_form_at_their_order(path: Path, sampler: type[DDIM] | type[Euler], order: int) -> None:
    noise = randn((200, 2, 1), seeded(0), dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        # Between two noise levels in a smooth grid, so that neither the ends nor the corners of the table hide the order.
        times = path.t_of(torch.logspace(math.log10(50), math.log10(0.05), steps + 1, dtype=torch.float64))
        x = path.perturb(torch.full_like(noise, MU), noise, times[0])
        found = (
            sampler(sampler.Config(num_steps=steps, clip=None)).sample(gaussian_field(path), CTX, x, path=path, times=times).x0
        )
        (start_a, start_b), (a, b) = ([float(c) for c in path.coefficients(t)] for t in (times[0], times[-1]))
        scale = math.sqrt(a**2 * S**2 + b**2) / math.sqrt(start_a**2 * S**2 + start_b**2)
        exact = a * MU + (x - start_a * MU) * scale
        errors.append((found - exact).abs().max().item())
    assert errors[1] < 0.1
    rate = math.log2(errors[0] / errors[1])
    assert rate > order - 0.35, f"errors {errors}"


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    [
        (DDIM(DDIM.Config(num_steps=100, clip=None)), 0.06),
        (Euler(Euler.Config(num_steps=100)), 0.06),
        (Heun(Heun.Config(num_steps=100)), 0.02),
        (DPMSolver(DPMSolver.Config(num_steps=100, clip=None)), 0.02),
    ],
    ids=name,
)
def test_deterministic_samplers_reach_the_closed_form_on_the_default_grid(path: Path, sampler: Sampler, tolerance: float) -> None:
    x = path.prior(randn((500, 1, 1), seeded(0), dtype=torch.float64))
    found = sampler.sample(gaussian_field(path), CTX, x, path=path).x0
    assert (found - closed_form(path, x, 1.0)).abs().max() < tolerance


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampler", [DDIM, DPMSolver])
def test_samples_of_gaussian_data_have_its_mean_and_std(path: Path, eta: float, sampler: type[DDIM]) -> None:
    n = 10_000
    generator = seeded(3)
    x = path.prior(randn((n, 1, 1), generator, dtype=torch.float64))
    solver = sampler(sampler.Config(num_steps=100, eta=eta, clip=None))
    found = solver.sample(gaussian_field(path), CTX, x, path=path, generator=generator).x0
    assert found.mean().item() == pytest.approx(MU, abs=4 * S / math.sqrt(n) + 2e-3)
    assert 0.28 < found.std().item() < 0.31


# --- T4: a mixture, whose score is known but whose flow is not Gaussian --------------------------------------------------------

MODES = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
WIDTH = 0.08


def mixture_log_density(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    variance = (a * WIDTH) ** 2 + b**2
    parts = WEIGHTS.log() - 0.5 * (x.unsqueeze(-1) - a.unsqueeze(-1) * MODES) ** 2 / variance.unsqueeze(-1)
    return torch.logsumexp(parts, -1) - 0.5 * torch.log(2 * math.pi * variance)


def mixture_field(path: Path) -> Callable[[Tensor, Tensor, Tensor], Pred]:
    """Pred from the score of the diffused mixture, by automatic differentiation of its log-density."""

    def field(x: Tensor, t: Tensor, ctx: Tensor) -> Pred:
        a, b = (broadcast_time(c, x) for c in path.coefficients(t))
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            (score,) = torch.autograd.grad(mixture_log_density(leaf, a.expand_as(x), b.expand_as(x)).sum(), leaf)
        eps = -b * score
        return Pred((x - b * eps) / a.clamp_min(1e-12), eps)

    return field


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(DDIM.Config(num_steps=80, clip=1.5)),
        DDIM(DDIM.Config(num_steps=80, eta=1.0, clip=1.5)),
        Heun(Heun.Config(num_steps=40, clip=1.5)),
        DPMSolver(DPMSolver.Config(num_steps=40, clip=1.5)),
    ],
    ids=name,
)
def test_samples_of_a_mixture_fall_into_its_modes_in_proportion(path: Path, sampler: Sampler) -> None:
    n = 4000
    generator = seeded(5)
    x = path.prior(randn((n, 1, 1), generator, dtype=torch.float64))
    found = sampler.sample(mixture_field(path), CTX, x, path=path, generator=generator).x0.flatten()
    distance, mode = (found[:, None] - MODES).abs().min(1)
    share = torch.bincount(mode, minlength=3) / n
    assert (distance > 4 * WIDTH).double().mean() < 0.01
    assert (share - WEIGHTS).abs().max() < 0.035  # 4 standard errors and the discretisation


def test_score_of_a_prediction_is_the_gradient_of_the_mixture() -> None:
    path, t = LinearFlow(), torch.tensor([0.4], dtype=torch.float64)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64).view(1, 9, 1)
    a, b = (broadcast_time(c, x).expand_as(x) for c in path.coefficients(t))
    h = 1e-6
    slope = (mixture_log_density(x + h, a, b) - mixture_log_density(x - h, a, b)) / (2 * h)
    torch.testing.assert_close(path.score(mixture_field(path)(x, t, CTX), t), slope, rtol=1e-6, atol=1e-6)


# --- T5: densities -------------------------------------------------------------------------------------------------------------


def test_mean_ratio_under_a_shifted_policy_is_one() -> None:
    path, n = VPCosine(), 40_000
    x = randn((n, 2, 2), seeded(0), dtype=torch.float64)
    t, u = 0.6, 0.5
    field = gaussian_field(path)
    seen = field(x, x.new_full((n,), t), CTX)
    old = step_dist(path, seen, x, t, u, 1.0)
    new = step_dist(path, Pred(seen.x0 + 0.1, seen.eps - 0.05), x, t, u, 1.0)
    y = old.sample(seeded(1))
    ratio = torch.exp((new.log_prob(y) - old.log_prob(y)).sum((1, 2)))
    assert ratio.std() > 0.1  # the shift is felt
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / math.sqrt(n)


def test_log_prob_is_that_of_torch_and_of_the_drawn_samples() -> None:
    dist = StepDist(torch.randn(3, 4, 2, generator=seeded(0)), 0.3)
    x = dist.sample(seeded(1))
    torch.testing.assert_close(dist.log_prob(x), torch.distributions.Normal(dist.mean, 0.3).log_prob(x))
    n = 100_000
    wide = StepDist(torch.zeros(n, 1, 1, dtype=torch.float64), 0.3)
    entropy = -wide.log_prob(wide.sample(seeded(2))).mean()
    assert entropy.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.09), abs=0.01)


def test_last_step_is_deterministic_and_has_a_density_only_with_a_floor() -> None:
    path = VPCosine()
    x = randn((2, 3, 2), seeded(0))
    pred = gaussian_field(path)(x, torch.full((2,), 0.01), CTX)
    dist = step_dist(path, pred, x, 0.01, 0.0, 1.0)
    assert dist.std == 0
    torch.testing.assert_close(dist.mean, pred.x0)
    assert torch.equal(dist.sample(None), dist.mean)  # draws nothing
    assert torch.isfinite(dist.log_prob(dist.mean, min_std=0.0067)).all()
    assert not torch.isfinite(dist.log_prob(dist.mean)).any()


def test_clipped_prediction_still_explains_the_state() -> None:
    path = VPCosine()
    x = randn((4, 5, 2), seeded(0), dtype=torch.float64)
    pred = path.predict(x, torch.full((4,), 0.9), 0.1 * x, "eps")
    assert pred.x0.abs().max() > 1
    clipped = step_dist(path, pred, x, 0.9, 0.8, 0.5, clip=1.0)
    x0 = pred.x0.clamp(-1, 1)
    a, b = (c.item() for c in path.coefficients(torch.tensor(0.9, dtype=torch.float64)))
    again = step_dist(path, Pred(x0, (x - a * x0) / b), x, 0.9, 0.8, 0.5)
    torch.testing.assert_close(clipped.mean, again.mean)
    assert clipped.std == again.std


# --- the interface -------------------------------------------------------------------------------------------------------------

EVERY = [
    DDPM(DDPM.Config(num_steps=12)),
    DDIM(DDIM.Config(num_steps=7)),
    DDIM(DDIM.Config(num_steps=7, eta=0.7)),
    Euler(Euler.Config(num_steps=5)),
    Heun(Heun.Config(num_steps=5)),
    DPMSolver(DPMSolver.Config(num_steps=6)),
    DPMSolver(DPMSolver.Config(num_steps=6, eta=1.0)),
]


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("sampler", EVERY, ids=name)
def test_chain_times_and_evaluations_are_what_they_say(path: Path, sampler: Sampler) -> None:
    calls = []

    def net(x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        calls.append(t)
        return toy_net(x, t, ctx)

    x = path.prior(randn((3, 4, 2), seeded(0)))
    result = sampler.sample(Leaf(net, path, "v"), CTX, x, path=path, generator=seeded(1), record=True)
    assert result.nfe == len(calls) == sampler.nfe(path)
    assert result.chain is not None
    assert result.chain.shape == (len(result.times), 3, 4, 2)
    assert torch.equal(result.chain[0], x)
    assert torch.equal(result.chain[-1], result.x0)
    assert result.x0.dtype == torch.float32
    assert result.times[0] == 1
    assert result.times[-1] == 0
    again = sampler.sample(Leaf(net, path, "v"), CTX, x, path=path, generator=seeded(1), t_start=1.0)
    assert torch.equal(again.x0, result.x0)
    assert again.chain is None


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("sampler", EVERY, ids=name)
def test_times_given_by_hand_shared_per_chunk_or_per_row_give_the_same_chunk(path: Path, sampler: Sampler) -> None:
    x = path.prior(randn((3, 4, 2), seeded(0), dtype=torch.float64))
    field = Leaf(toy_net, path, "v")
    times = torch.tensor(sampler.times(path), dtype=torch.float64)
    plain = sampler.sample(field, CTX, x, path=path, generator=seeded(1)).x0
    for given in (times, times[:, None].expand(-1, 3), times[:, None, None].expand(-1, 3, 4)):
        found = sampler.sample(field, CTX, x, path=path, generator=seeded(1), times=given).x0
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6 if isinstance(sampler, Heun) else 1e-9)


def test_rows_may_wait_and_finish_at_times_of_their_own() -> None:
    path = LinearFlow()
    x = randn((2, 3, 1), seeded(0), dtype=torch.float64)
    field = gaussian_field(path)
    # Row 0 is clean from the start, row 1 finishes first, row 2 walks the plain grid.
    times = torch.tensor([[0, 0, 0, 0, 0], [1, 0.5, 0, 0, 0], [1, 0.75, 0.5, 0.25, 0]], dtype=torch.float64).T
    result = DDIM(DDIM.Config(clip=None)).sample(field, CTX, x, path=path, times=times[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(result.x0[:, 0], x[:, 0])
    for row, steps in ((1, 2), (2, 4)):
        alone = Euler(Euler.Config(num_steps=steps)).sample(field, CTX, x[:, row : row + 1], path=path).x0
        torch.testing.assert_close(result.x0[:, row : row + 1], alone)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("sampler", EVERY, ids=name)
def test_warm_start_walks_the_rest_of_the_grid(path: Path, sampler: Sampler) -> None:
    field = Leaf(toy_net, path, "v")
    x = path.prior(randn((3, 4, 2), seeded(0), dtype=torch.float64))
    grid = sampler.times(path)
    warm = sampler.times(path, grid[2])
    assert warm == grid[2:]
    assert sampler.nfe(path, grid[2]) < sampler.nfe(path)
    between = (grid[1] + grid[2]) / 2
    assert sampler.times(path, between) == (between, *grid[2:])
    if sampler.eta == 0 and not isinstance(sampler, DPMSolver):  # no noise and no memory: continuing is the same as going through
        full = sampler.sample(field, CTX, x, path=path, record=True)
        assert full.chain is not None
        torch.testing.assert_close(sampler.sample(field, CTX, full.chain[2], path=path, t_start=grid[2]).x0, full.x0)


def test_warm_start_from_a_good_guess_stays_near_it() -> None:
    path = VPCosine()
    guess = torch.full((1, 4, 2), MU, dtype=torch.float64)
    noise = randn(guess.shape, seeded(0), dtype=torch.float64)
    t = 0.1
    x = path.perturb(guess, noise, torch.tensor([t]))
    found = DDIM(DDIM.Config(num_steps=100, clip=None)).sample(gaussian_field(path), CTX, x, path=path, t_start=t).x0
    torch.testing.assert_close(found, closed_form(path, x, t), rtol=0, atol=0.02)


@pytest.mark.parametrize("sampler", EVERY, ids=name)
def test_row_generators_make_a_row_independent_of_its_batch(sampler: Sampler) -> None:
    path = VPCosine()
    field = Leaf(toy_net, path, "eps")

    def walk(seeds: list[int]) -> Tensor:
        generators = [seeded(seed) for seed in seeds]
        x = path.prior(randn((len(seeds), 4, 2), generators))
        return sampler.sample(field, CTX, x, path=path, generator=generators).x0

    together = walk([7, 8, 9])
    assert torch.equal(walk([8])[0], together[1])
    assert torch.equal(walk([9, 7])[1], together[0])
    assert not torch.equal(together[0], together[1])


def test_stochastic_sampler_without_a_generator_says_so() -> None:
    with pytest.raises(ValueError, match="no generator was given"):
        DDPM().sample(Leaf(toy_net, PATHS[0], "eps"), CTX, torch.zeros(1, 4, 2), path=PATHS[0])
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn((3, 1), [seeded(0), seeded(1)])


def test_gradients_flow_through_a_walk() -> None:
    path = LinearFlow()
    gain = torch.ones(1, requires_grad=True)
    x = randn((2, 4, 2), seeded(0))
    Heun().sample(lambda x, t, c: path.predict(x, t, gain * x, "flow"), CTX, x, path=path).x0.sum().backward()
    assert gain.grad is not None
    assert gain.grad.abs() > 0


def test_ddpm_on_a_path_without_a_table_asks_for_steps() -> None:
    with pytest.raises(ConfigError, match="no table of its own; set num_steps"):
        DDPM().sample(Leaf(toy_net, LinearFlow(), "flow"), CTX, torch.zeros(1, 4, 2), path=LinearFlow(), generator=seeded(0))


@pytest.mark.parametrize("entry", sorted(SAMPLERS))
def test_every_registered_sampler_is_built_from_its_configuration(entry: str) -> None:
    cls, config = component("sampler", {"type": entry, "num_steps": 3}, SAMPLERS)
    assert len(cls(config).times(VPCosine())) == 4
    with pytest.raises(ConfigError, match="num_steps"):
        component("sampler", {"type": entry, "num_step": 3}, SAMPLERS)
