"""Real-time chunking as fields: the exact Jacobian, and what it does where everything is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robopolicy.errors import ConfigError
from robopolicy.generative.guidance import Guided
from robopolicy.generative.path import EDM, LinearFlow, Path, Pred, VPCosine, broadcast_time
from robopolicy.generative.prefix import Inpainted, Pinned, residual_gradient, soft_mask
from robopolicy.generative.sampler import DDIM, DPMSolver, Euler, Heun, Jump, Sampler

PATHS = [VPCosine(), LinearFlow(), EDM()]
CTX = torch.zeros(4, 0)
SHAPE = (4, 6, 2)


def name(value: object) -> str:
    return type(value).__name__


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=seeded(seed), dtype=dtype)


def gaussian(path: Path, mean: float = 0.5, std: float = 0.7) -> object:
    """The exact field of rows that are the same number, N(mean, std^2) in each of two columns: rows are bound to each other."""

    def field(x: Tensor, t: Tensor, ctx: Tensor, to: Tensor | None = None) -> Pred:
        a, b = (broadcast_time(c, x) for c in path.coefficients(t))
        rows = x.shape[1]
        total = (x - a * mean).sum(1, keepdim=True)
        x0 = mean + (a * std**2 * total / (rows * a**2 * std**2 + b**2)).expand_as(x)
        return Pred(x0, (x - a * x0) / b.clamp_min(1e-12))

    return field


def bent(path: Path) -> object:
    """A field without symmetry, differentiable, in double precision."""
    mix = torch.randn(12, 12, generator=seeded(5), dtype=torch.float64) / 3

    def field(x: Tensor, t: Tensor, ctx: Tensor, to: Tensor | None = None) -> Pred:
        a, b = (broadcast_time(c, x) for c in path.coefficients(t))
        x0 = torch.tanh(x.flatten(1) @ mix / (a + b).flatten(1)).view_as(x)
        return Pred(x0, (x - a * x0) / b.clamp_min(1e-12))

    return field


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_the_gradient_is_that_of_finite_differences(path: Path, outside: type) -> None:
    field, x, chunk, weights = bent(path), noise(1), noise(2), torch.rand(SHAPE, generator=seeded(3), dtype=torch.float64)
    t = path.t_of(torch.full((4,), 0.8, dtype=torch.float64))
    with outside():
        pred, gradient = residual_gradient(field, x.clone(), t.clone(), CTX, chunk, weights)  # type: ignore[arg-type]

    def cost(x: Tensor) -> Tensor:
        return 0.5 * (weights * (chunk - field(x, t, CTX).x0).square()).sum()  # type: ignore[operator]

    torch.testing.assert_close(pred.x0, field(x, t, CTX).x0)  # type: ignore[operator]
    for index in [(0, 0, 0), (1, 2, 1), (3, 5, 0)]:
        step = torch.zeros_like(x)
        step[index] = 1e-6
        slope = (cost(x - step) - cost(x + step)) / 2e-6
        assert gradient[index].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("jacobian", ["true", "identity"])
def test_guidance_within_guidance_is_refused_where_there_is_no_gradient(jacobian: str) -> None:
    """A cost below real-time chunking hides its gradient from it; above, it finds none. The identity approximation needs none."""
    path, t, weights = LinearFlow(), torch.full((4,), 0.5, dtype=torch.float64), torch.ones(4, 6, dtype=torch.float64)

    def pushed(field: object) -> Guided:
        return Guided(field, lambda x0: x0.square().sum((1, 2)), 1.0, path, jacobian)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="jacobian identity"):
        Inpainted(pushed(bent(path)), path, noise(2), weights)(noise(1), t, CTX)
    above = pushed(Inpainted(bent(path), path, noise(2), weights))  # type: ignore[arg-type]
    if jacobian == "true":
        with pytest.raises(ConfigError, match="jacobian identity"):
            above(noise(1), t, CTX)
    else:
        assert above(noise(1), t, CTX).x0.isfinite().all()
    assert Inpainted(pushed(bent(path)), path, noise(2), weights, jacobian="identity")(noise(1), t, CTX).x0.isfinite().all()


def test_on_the_linear_path_the_rule_is_the_published_one() -> None:
    """v' = v + min(beta, (1 - tau) / (tau r2)) g in the velocity towards the data, tau = 1 - t."""
    path, x, chunk = LinearFlow(), noise(1), noise(2)
    weights = torch.rand(4, 6, generator=seeded(3), dtype=torch.float64)
    for time in (1.0, 0.9, 0.5, 0.2):
        t = torch.full((4,), time, dtype=torch.float64)
        plain, gradient = residual_gradient(bent(path), x, t, CTX, chunk, weights[:, :, None])  # type: ignore[arg-type]
        guided = Inpainted(bent(path), path, chunk, weights, limit=5.0)(x, t, CTX)  # type: ignore[arg-type]
        tau = 1 - time
        r2 = time**2 / (tau**2 + time**2)
        factor = 5.0 if tau == 0 else min(5.0, time / (tau * r2))
        torch.testing.assert_close(guided.x0 - guided.eps, plain.x0 - plain.eps + factor * gradient)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("jacobian", ["true", "identity"])
def test_the_pair_still_explains_the_state(path: Path, jacobian: str) -> None:
    t = path.t_of(torch.tensor([0.1, 0.5, 1.0, 8.0], dtype=torch.float64))
    x = noise(1)
    guided = Inpainted(bent(path), path, noise(2), torch.ones(4, 6), 5.0, jacobian)(x, t, CTX)  # type: ignore[arg-type]
    a, b = (broadcast_time(c, x) for c in path.coefficients(t))
    torch.testing.assert_close(a * guided.x0 + b * guided.eps, x)


@pytest.mark.parametrize("sampler", [DDIM(), Euler(), Heun(), DPMSolver()], ids=name)
def test_without_weight_it_is_the_plain_sample_to_the_bit(sampler: Sampler) -> None:
    path = LinearFlow()
    field = gaussian(path)
    drawn = Inpainted(field, path, noise(2), torch.zeros(4, 6))  # type: ignore[arg-type]
    pinned = Pinned(field, path, noise(2), torch.zeros(4, 6, dtype=torch.bool))  # type: ignore[arg-type]
    expected = sampler.sample(field, CTX, noise(), path=path).x0  # type: ignore[arg-type]
    assert torch.equal(sampler.sample(drawn, CTX, noise(), path=path).x0, expected)
    torch.testing.assert_close(sampler.sample(pinned, CTX, noise(), path=path).x0, expected)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_with_full_weight_and_no_limit_a_gaussian_ends_at_the_chunk(path: Path) -> None:
    chunk = torch.linspace(-0.5, 1.5, 4, dtype=torch.float64)[:, None, None].expand(SHAPE)  # rows alike, as the data have them
    sampler = DDIM(DDIM.Config(num_steps=60, clip=None))
    drawn = Inpainted(gaussian(path), path, chunk, torch.ones(4, 6), limit=1e6)  # type: ignore[arg-type]
    x0 = sampler.sample(drawn, CTX, path.prior(noise()), path=path).x0
    assert (x0 - chunk).abs().max() < 0.05
    plain = sampler.sample(gaussian(path), CTX, path.prior(noise()), path=path).x0  # type: ignore[arg-type]
    assert (plain - chunk).abs().max() > 0.5


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_the_true_jacobian_carries_the_prefix_on_and_the_identity_does_not(path: Path) -> None:
    """Rows of this Gaussian are equal. Told the first two, the true Jacobian moves all of them; identity tears them apart."""
    chunk, weights = torch.full(SHAPE, 1.5, dtype=torch.float64), torch.zeros(4, 6)
    weights[:, :2] = 1
    t = path.t_of(torch.ones(4, dtype=torch.float64))
    field = gaussian(path)
    plain = field(noise(), t, CTX).x0  # type: ignore[operator]
    true, identity = (
        Inpainted(field, path, chunk, weights, 5.0, jacobian)(noise(), t, CTX).x0  # type: ignore[arg-type]
        for jacobian in ("true", "identity")
    )
    assert true.std(1).max() < 1e-9  # on the data
    assert ((1.5 - true).abs() < (1.5 - plain).abs()).all()
    assert identity.std(1).max() > 0.1
    assert torch.equal(identity[:, 2:], plain[:, 2:])


@pytest.mark.parametrize("sampler", [DDIM(), Euler(), Heun(), DPMSolver()], ids=name)
def test_pinned_rows_end_where_they_were_told_and_the_network_sees_them_clean(sampler: Sampler) -> None:
    path, chunk = LinearFlow(), noise(2).clamp(-1, 1)
    pinned = torch.zeros(4, 6, dtype=torch.bool)
    pinned[:, :2] = True

    def field(x: Tensor, t: Tensor, ctx: Tensor) -> Pred:
        assert torch.equal(x[:, :2], chunk[:, :2])
        assert (t[:, :2] == 0).all()
        assert (t[:, 2:] == t[:, 2:3]).all()
        x0 = x[:, :2].mean(1, keepdim=True).expand_as(x) * 0.5
        return Pred(x0, (x - (1 - t[:, :, None]) * x0) / t[:, :, None].clamp_min(1e-12))

    x0 = sampler.sample(Pinned(field, path, chunk, pinned), CTX, noise(), path=path).x0
    torch.testing.assert_close(x0[:, :2], chunk[:, :2])
    torch.testing.assert_close(x0[:, 2:], (chunk[:, :2].mean(1, keepdim=True) * 0.5).expand(-1, 4, -1))


def test_flow_maps_are_told_where_they_go() -> None:
    path, asked = LinearFlow(), []

    def field(x: Tensor, t: Tensor, ctx: Tensor, to: Tensor) -> Pred:
        asked.append(to)
        return Pred(x * 0.5, x * 0.5)

    weights = torch.zeros(4, 6, dtype=torch.float64)
    weights[:, 0] = 1
    jump = Jump(Jump.Config(num_steps=1))
    jump.sample(Inpainted(field, path, noise(2), weights), CTX, noise(), path=path)  # type: ignore[arg-type]
    jump.sample(Pinned(field, path, noise(2), weights > 0), CTX, noise(), path=path)  # type: ignore[arg-type]
    assert [tuple(to.shape) for to in asked] == [(4,), (4, 6)]
    assert all((to == 0).all() for to in asked)


def test_the_soft_mask() -> None:
    settled, known = torch.tensor([2, 0, 0, 5]), torch.tensor([5, 4, 0, 3])
    mask = soft_mask(6, settled, known)
    assert mask.shape == (4, 6)
    c = torch.tensor([3 / 4, 2 / 4, 1 / 4])
    expected = c * torch.expm1(c) / torch.expm1(torch.ones(()))
    torch.testing.assert_close(mask[0], torch.tensor([1.0, 1.0, *expected.tolist(), 0.0]))
    assert 0 < mask[1, 0] < 1  # no delay: even the first row is free to change
    assert (mask[2] == 0).all()
    assert mask[3].tolist() == [1, 1, 1, 0, 0, 0]  # settled beyond what is known: only the known
    assert soft_mask(6, settled, known, "ones")[0].tolist() == [1, 1, 1, 1, 1, 0]
    torch.testing.assert_close(soft_mask(6, settled, known, "linear")[0, 2:5], c)
