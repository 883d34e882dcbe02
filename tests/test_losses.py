"""The denoising loss: its optimum, its masks, its times and its weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robopolicy.config import parse
from robopolicy.errors import ConfigError
from robopolicy.generative.losses import LossConfig, denoising_loss, denoising_terms, draw_times, staircase, weight
from robopolicy.generative.path import EDM, Kind, LinearFlow, Path, VPCosine, broadcast_time

PATHS = [VPCosine(), LinearFlow(), EDM()]
KINDS: list[Kind] = ["eps", "x0", "v", "flow"]
CTX = torch.zeros(1, 0)


def name(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zero_net(x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_network_that_knows_the_clean_chunk_has_no_loss(path: Path, kind: Kind, per_row: bool) -> None:
    x0 = torch.randn(6, 4, 2, generator=seeded(), dtype=torch.float64)
    t = path.t_of(torch.logspace(-1, 1, 24, dtype=torch.float64)).view(6, 4)
    t = t if per_row else t[:, 0]

    def net(x: Tensor, net_t: Tensor, ctx: Tensor) -> Tensor:
        assert torch.equal(net_t, path.net_time(t))
        state = x / path.net_input(torch.ones_like(x), t)[0]
        alpha, sigma = (broadcast_time(c, x) for c in path.coefficients(t))
        return path.target(x0, (state - alpha * x0) / sigma, t, kind)

    loss = denoising_terms(net, path, kind, x0, CTX, None, seeded(1), LossConfig(), t=t)
    assert loss.mean < 1e-20
    assert torch.equal(loss.t, t)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_the_zero_network_is_the_variance_of_the_target(kind: Kind) -> None:
    x0 = 0.5 * torch.randn(4000, 4, 2, generator=seeded())
    t = torch.full((4000,), 0.3)
    expected = {"eps": 1.0, "x0": 0.25, "flow": 1.25, "v": (0.7**2 + 0.3**2 * 0.25) / (0.7**2 + 0.3**2)}[kind]
    loss = denoising_terms(zero_net, LinearFlow(), kind, x0, CTX, None, seeded(1), LossConfig(), t=t)
    assert loss.mean.item() == pytest.approx(expected, rel=0.03)
    assert loss.rows.shape == (4000, 4)
    assert loss.rows.mean().item() == pytest.approx(loss.mean.item(), rel=1e-5)


@pytest.mark.parametrize("per_entry", [False, True])
def test_padded_targets_do_not_matter(per_entry: bool) -> None:
    is_pad = torch.zeros(3, 5, dtype=torch.bool)
    is_pad[1, 3:] = True
    x0 = torch.randn(3, 5, 2, generator=seeded())
    other = torch.where(is_pad[:, :, None], x0 + 7, x0)
    mask = is_pad[:, :, None].expand(-1, -1, 2) if per_entry else is_pad

    def loss(chunk: Tensor, config: LossConfig) -> Tensor:
        return denoising_terms(zero_net, LinearFlow(), "flow", chunk, CTX, mask, seeded(1), config)

    masked, same = loss(x0, LossConfig()), loss(other, LossConfig())
    assert torch.equal(masked.mean, same.mean)
    assert (masked.rows[is_pad] == 0).all()
    assert masked.mean.item() == pytest.approx(masked.rows[~is_pad].mean().item(), rel=1e-6)
    hold = LossConfig(mask_padding=False)
    assert loss(x0, hold).mean != loss(other, hold).mean


def test_a_batch_of_nothing_but_padding_has_no_loss() -> None:
    pad = torch.ones(2, 3, dtype=torch.bool)
    assert denoising_loss(zero_net, LinearFlow(), "flow", torch.ones(2, 3, 1), CTX, pad, seeded(), LossConfig()) == 0


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_times_cover_the_path_and_follow_their_distribution(path: Path) -> None:
    def draw(**settings: object) -> Tensor:
        t = draw_times((20_000,), path, parse(LossConfig, settings), seeded(3))
        assert t.dtype == torch.float64
        assert (t >= path.t_min - 1e-12).all()
        assert (t <= 1).all()
        return (t - path.t_min) / (1 - path.t_min)

    uniform = draw(time="uniform")
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.003)
    beta = draw(time="beta", beta_a=1.5, beta_b=1.0)
    assert beta.mean().item() == pytest.approx(0.6, abs=0.01)
    assert beta.var().item() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.003)
    normal = draw(time="logit_normal", logit_normal_mean=0.5, logit_normal_std=0.8).logit()
    assert normal.mean().item() == pytest.approx(0.5, abs=0.03)
    assert normal.std().item() == pytest.approx(0.8, abs=0.03)


def test_default_times_are_the_table_where_there_is_one() -> None:
    path = VPCosine(VPCosine.Config(num_steps=10))
    t = draw_times((5000,), path, LossConfig(), seeded())
    values, counts = t.unique(return_counts=True)
    assert torch.equal(values, torch.arange(1, 11).double() / 10)
    assert counts.min() > 400
    assert draw_times((100,), LinearFlow(), LossConfig(), seeded()).unique().numel() == 100
    with pytest.raises(ConfigError, match="has none; use uniform"):
        draw_times((1,), LinearFlow(), LossConfig(time="table"), seeded())


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_x0_weighting_makes_every_kind_measure_the_clean_chunk(path: Path, kind: Kind) -> None:
    """An error of the prediction, weighted, is the squared error of the clean chunk that it stands for."""
    t = path.t_of(torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64))
    x0, eps = (torch.randn(3, 4, 2, generator=seeded(s), dtype=torch.float64) for s in (0, 1))
    x = path.perturb(x0, eps, t)
    wrong = path.target(x0, eps, t, kind) + 0.1
    error = (path.predict(x, t, wrong, kind).x0 - x0).square().mean((1, 2))
    torch.testing.assert_close(weight(path, t, kind, LossConfig(weighting="x0")) * 0.01, error)


def test_min_snr_weight_is_bounded_and_flat_for_eps_at_high_noise() -> None:
    path, config = VPCosine(), LossConfig(weighting="min_snr", min_snr_gamma=5.0)
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    snr = path.noise_level(t) ** -2
    torch.testing.assert_close(weight(path, t, "x0", config), snr.clamp_max(5))
    torch.testing.assert_close(weight(path, t, "eps", config), (5 / snr).clamp_max(1))
    assert weight(path, t, "flow", LossConfig()).eq(1).all()


def test_the_same_seed_gives_the_same_loss_and_another_does_not() -> None:
    x0 = torch.randn(4, 4, 2, generator=seeded())

    def loss(seed: int) -> float:
        return denoising_loss(zero_net, VPCosine(), "eps", x0, CTX, None, seeded(seed), LossConfig()).item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_training_on_the_loss_recovers_the_posterior_mean() -> None:
    """For Gaussian data the best linear network is known; least squares on the loss finds it."""
    path, t, s = LinearFlow(), 0.4, 0.3
    x0 = s * torch.randn(20_000, 1, 1, generator=seeded(), dtype=torch.float64)
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    time = torch.full((20_000,), t)
    loss = denoising_loss(lambda x, _, c: slope * x, path, "flow", x0, CTX, None, seeded(1), LossConfig(), t=time)
    (gradient,) = torch.autograd.grad(loss, slope, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient, slope)
    found = slope - gradient / curvature  # Newton's step solves a quadratic
    expected = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    assert found.item() == pytest.approx(expected, abs=6 / math.sqrt(20_000))


def test_low_precision_networks_are_compared_in_the_precision_of_the_chunk() -> None:
    x0 = torch.randn(4, 4, 2, generator=seeded())
    loss = denoising_loss(lambda x, t, c: x.bfloat16(), LinearFlow(), "flow", x0, CTX, None, seeded(1), LossConfig())
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_a_prefix_is_clean_at_time_0_and_does_not_count(path: Path) -> None:
    """Training-time real-time chunking: rows from "now" on, of a number that is drawn evenly."""
    config, lengths = LossConfig(prefix=3), []
    x0 = torch.randn(400, 6, 2, generator=seeded())

    def net(x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        known = t == path.net_time(torch.zeros(())).to(t.dtype)
        lengths.extend(known.sum(1).tolist())
        assert not known[:, 0].any()  # before now
        assert (known[:, 1:4].int().diff(dim=1) <= 0).all()  # from now on, without a gap
        assert not known[:, 4:].any()
        clean = path.net_input(x0, torch.zeros(400, 6))[0]
        torch.testing.assert_close(x[known], clean[known])
        assert ((t - t[:, :1]) * ~known == 0).all()  # all others at one time
        return torch.zeros_like(x)

    loss = denoising_terms(net, path, "x0", x0, CTX, None, seeded(1), config, now=1)
    counts = torch.tensor(lengths).bincount()
    assert len(counts) == 4
    assert counts.min() > 60
    assert ((loss.rows == 0).sum(1) == torch.tensor(lengths)).all()
    expected = torch.cat([row[~(row == 0)] for row in loss.rows]).mean()
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_a_staircase_rises_by_groups_and_a_plan_takes_it_down_one_stair(path: Path) -> None:
    before, after = (staircase(7, 2, torch.full((1,), share), path)[0] for share in (1.0, 0.0))
    assert before.shape == (7,)
    assert (after[:2] == 0).all()
    assert before[-1] == 1
    torch.testing.assert_close(after[2:], before[:5])  # what the group before had: move on by a group, and nothing has changed
    assert (before.diff() >= 0).all()
    assert before.unique().numel() == 4


def test_staircase_training_mixes_with_ordinary_times() -> None:
    config = LossConfig(staircase=0.5, stairs=2)
    x0 = torch.randn(1000, 7, 1, generator=seeded())
    loss = denoising_terms(zero_net, LinearFlow(), "flow", x0, CTX, None, seeded(1), config, now=1)
    climbs = (loss.t[:, 1:].diff(dim=1) != 0).any(1)
    assert 430 < climbs.sum() < 570
    assert (loss.t[climbs, 0] == 0).all()  # before now: clean, and not counted
    assert (loss.rows[climbs, 0] == 0).all()
    assert (loss.t[~climbs] == loss.t[~climbs, :1]).all()
    assert (loss.rows[~climbs, 0] > 0).all()
    with pytest.raises(ConfigError, match="exclude each other"):
        parse(LossConfig, {"prefix": 2, "staircase": 0.5})
