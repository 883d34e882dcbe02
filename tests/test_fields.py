"""Fields as an algebra, on Gaussians and mixtures whose scores are known (cards 0.6, 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from robopolicy.compose.superpose import Superpose
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Convex, Field, Leaf, OnPath, OnRows, Product
from robopolicy.generative.guidance import Guidance, Guided
from robopolicy.generative.path import EDM, LinearFlow, Path, Pred, VPCosine, broadcast_time
from robopolicy.generative.sampler import DDIM, Euler, Sampler

LINEAR = [torch.nn.Linear(3, 3) for _ in range(2)]
PARENTS = {"flow": LinearFlow(), "vp": VPCosine()}
PATHS = [VPCosine(), LinearFlow(), EDM()]
CTX = torch.zeros(1, 0)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def leaf(index: int, name: str) -> Leaf:
    return Leaf(lambda x, t, ctx: LINEAR[index](x) + broadcast_time(t, x), PARENTS[name], "flow" if name == "flow" else "v")


@torch.no_grad()
def chunk(field: object, name: str) -> Tensor:
    sampler = Euler() if name == "flow" else DDIM(DDIM.Config(eta=1.0, clip=None))
    noise = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return sampler.sample(field, torch.zeros(4, 1), noise, path=PARENTS[name], generator=generator).x0  # type: ignore[arg-type]


def mixture(path: Path, means: Tensor, shares: Tensor, s: float) -> Field:
    """The exact field of the mixture ``sum share N(mean, s^2 I)``; ``means [M, D]`` are chunks of one row."""

    def field(x: Tensor, t: Tensor, ctx: Tensor) -> Pred:
        a, b = (broadcast_time(c, x) for c in path.coefficients(t))
        apart = x[:, :, None] - a[..., None] * means.to(x)  # [B, 1, M, D]
        variance = (a**2 * s**2 + b**2)[..., None]
        likely = torch.log_softmax(shares.log().to(x) - 0.5 * apart.square().sum(-1) / variance[..., 0], dim=-1).exp()
        eps = (likely[..., None] * b[..., None] * apart / variance).sum(2)
        x0 = (likely[..., None] * (means.to(x) + a[..., None] * s**2 * apart / variance)).sum(2)
        return Pred(x0, eps)

    return field


def gaussian(path: Path, mean: float, s: float) -> Field:
    return mixture(path, torch.tensor([[mean]]), torch.ones(1), s)


@torch.no_grad()
def walk(sampler: Sampler, field: object, path: Path, n: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = path.prior(torch.randn(n, 1, dim, generator=generator, dtype=torch.float64))
    return sampler.sample(field, CTX, noise, path=path, generator=generator).x0[:, 0]  # type: ignore[arg-type]


class Both:
    """Parents for a superposition."""

    def __init__(self, *fields: Field) -> None:
        self.fields = fields

    def each(self, x: Tensor, t: Tensor, ctx: Tensor) -> list[Pred]:
        return [field(x, t, ctx) for field in self.fields]


def explains(path: Path, pred: Pred, x: Tensor, t: Tensor) -> None:
    torch.testing.assert_close(path.perturb(pred.x0, pred.eps, t), x, rtol=1e-5, atol=1e-5)


# ---- convex ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARENTS)
def test_weights_one_and_zero_are_the_parent_to_the_bit(name: str) -> None:
    a, b = leaf(0, name), leaf(1, name)
    assert torch.equal(chunk(Convex([a, b], [1.0, 0.0]), name), chunk(a, name))
    assert torch.equal(chunk(Convex([a, b], [0.0, 1.0]), name), chunk(b, name))
    assert not torch.allclose(chunk(a, name), chunk(b, name))


@pytest.mark.parametrize("name", PARENTS)
def test_a_field_composed_with_itself_is_itself_and_order_does_not_matter(name: str) -> None:
    a, b = leaf(0, name), leaf(1, name)
    torch.testing.assert_close(chunk(Convex([a, a], [0.3, 0.7]), name), chunk(a, name))
    torch.testing.assert_close(chunk(Convex([a, b], [0.3, 0.7]), name), chunk(Convex([b, a], [0.7, 0.3]), name))


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [1.5, -0.5], [], [math.nan, 0.5]])
def test_weights_that_are_no_mean_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        Convex([leaf(0, "flow"), leaf(1, "flow")], weights)


def test_weights_may_differ_by_row() -> None:
    a, b = leaf(0, "flow"), leaf(1, "flow")
    x, t = torch.randn(2, 5, 3), torch.tensor([0.3, 0.9])
    rows = torch.tensor([[1.0, 1, 0.5, 0, 0], [0, 0, 0.5, 1, 1]])
    mixed = Convex([a, b], rows)(x, t, CTX)
    for row, want in ((0, a(x, t, CTX)), (4, b(x, t, CTX)), (2, Convex([a, b], [0.5, 0.5])(x, t, CTX))):
        torch.testing.assert_close(mixed.x0[:, row], want.x0[:, row])


def test_equal_gaussians_mix_to_the_geometric_mean() -> None:
    """``p1^w p2^(1-w)`` of Gaussians with one variance is one around the weighted mean: a compromise, not an intersection."""
    path = LinearFlow()
    field = Convex([gaussian(path, -1, 0.4), gaussian(path, 1, 0.4)], [0.25, 0.75])
    x0 = walk(Euler(Euler.Config(num_steps=100)), field, path, 20_000, 1)
    assert float(x0.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(x0.std()) == pytest.approx(0.4, abs=0.02)


# ---- one noise level on two paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("on", PATHS, ids=lambda path: type(path).__name__)
def test_a_field_on_another_path_sees_the_same_pair(own: Path, on: Path) -> None:
    x0, eps = torch.randn(64, 5, 3), torch.randn(64, 5, 3)
    for t in (torch.rand(64, dtype=torch.float64) * 0.6 + 0.1, torch.rand(64, 5, dtype=torch.float64) * 0.6 + 0.1):

        def truth(x: Tensor, time: Tensor, ctx: Tensor) -> Pred:
            torch.testing.assert_close(own.perturb(x0, eps, time), x, rtol=1e-4, atol=1e-4)
            return Pred(x0, eps)

        explains(on, OnPath(truth, own, on)(on.perturb(x0, eps, t), t, CTX), on.perturb(x0, eps, t), t)


@pytest.mark.parametrize("own", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("on", PATHS, ids=lambda path: type(path).__name__)
def test_both_ends_of_a_path_are_finite_on_another(own: Path, on: Path) -> None:
    field = OnPath(Leaf(lambda x, t, ctx: 0.1 * x, own, "flow"), own, on)
    for end in (0.0, 1.0):
        x = on.prior(torch.randn(2, 5, 3)) if end else torch.randn(2, 5, 3)
        pred = field(x, torch.full((2,), end), CTX)
        assert torch.isfinite(pred.x0).all()
        assert torch.isfinite(pred.eps).all()


@torch.no_grad()
def test_a_diffusion_parent_on_the_flow_path_samples_what_it_samples_at_home() -> None:
    vp, flow = VPCosine(), LinearFlow()
    net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    parent = Leaf(lambda x, t, ctx: net(x) + 0.01 * broadcast_time(t, x), vp, "v")
    noise = torch.randn(32, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    home = DDIM(DDIM.Config(num_steps=20, clip=None)).sample(parent, CTX, noise, path=vp).x0
    times = flow.t_of(vp.noise_level(vp.grid(20)))
    state = flow.perturb(torch.zeros_like(noise), noise, times[0].expand(32))
    abroad = Euler().sample(OnPath(parent, vp, flow), CTX, state, path=flow, times=times).x0
    assert float((home - abroad).abs().max()) < 1e-4
    assert float(home.std()) > 0.1


def test_a_field_of_some_rows_hears_its_own_part() -> None:
    def parent(x: Tensor, t: Tensor, ctx: Tensor) -> Pred:
        assert x.shape == (2, 3, 3)
        assert ctx.tolist() == [[2.0, 3.0]] * 2
        assert t.shape in ((2,), (2, 3))
        return Pred(x + 1, x + 2)

    x, ctx = torch.randn(2, 5, 3), torch.arange(5.0).repeat(2, 1)
    for t in (torch.rand(2), torch.rand(2, 5)):
        pred = OnRows(parent, slice(2, 4), slice(1, 4))(x, t, ctx)
        assert torch.equal(pred.x0[:, 1:4], x[:, 1:4] + 1)
        assert not pred.eps[:, [0, 4]].any()


# ---- product -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_near_the_data_a_product_has_the_score_of_the_product(path: Path) -> None:
    """Precisions add, less the prior's once: ``1/.5^2 + 1/.4^2 - 1/1``."""
    field = Product([gaussian(path, -0.5, 0.5), gaussian(path, 0.8, 0.4)], [1.0, 1.0], path)
    precision = 1 / 0.5**2 + 1 / 0.4**2 - 1
    mean = (-0.5 / 0.5**2 + 0.8 / 0.4**2) / precision
    t = path.t_of(torch.full((50,), 0.02, dtype=torch.float64))
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None, None] * path.alpha(t)[:, None, None]
    found, want = field(x, t, CTX), gaussian(path, mean, precision**-0.5)(x, t, CTX)
    torch.testing.assert_close(found.eps, want.eps, rtol=0.02, atol=0.002)
    explains(path, found, x, t)


def test_a_product_of_sensors_is_sharper_than_their_mean_and_near_bayes() -> None:
    path = LinearFlow()
    parents = [gaussian(path, -0.3, 0.5), gaussian(path, 0.5, 0.5)]
    sampler = DDIM(DDIM.Config(num_steps=100, clip=None))
    product, mean = (walk(sampler, f, path, 20_000, 1) for f in (Product(parents, [1, 1], path), Convex(parents, [0.5, 0.5])))
    assert float(product.std()) < 0.85 * float(mean.std())
    assert float(product.mean()) == pytest.approx(0.2 / 0.5**2 / (2 / 0.5**2 - 1) * 1.0, abs=0.1)


def test_weights_of_sum_one_need_no_prior() -> None:
    path = LinearFlow()
    a, b = gaussian(path, -0.3, 0.5), gaussian(path, 0.5, 0.4)
    x, t = torch.randn(9, 1, 1), torch.rand(9)
    torch.testing.assert_close(Product([a, b], [0.3, 0.7], path)(x, t, CTX), Convex([a, b], [0.3, 0.7])(x, t, CTX))
    bare = Product([a, b], [1, 1], path, prior_std=None)(x, t, CTX)
    torch.testing.assert_close(bare.eps, a(x, t, CTX).eps + b(x, t, CTX).eps)
    explains(path, bare, x, t)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.1], [0.0, 0.0]])
def test_exponents_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        Product([leaf(0, "flow"), leaf(1, "flow")], weights, PARENTS["flow"])


# ---- superposition -------------------------------------------------------------------------------------------------------------

ANGLES = torch.tensor([210.0, 330.0, 90.0], dtype=torch.float64) * math.pi / 180
MODES = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
SHARES = [torch.tensor([0.6, 0.1, 0.3]).double(), torch.tensor([0.1, 0.6, 0.3]).double()]  # the last mode is common to both
SPREAD = 0.2


def modes(x0: Tensor) -> tuple[float, float]:
    """Share of samples in the mode that both parents like, and off all modes."""
    near = torch.cdist(x0, MODES).min(1)
    off = near.values > 3 * SPREAD
    return float(((near.indices == 2) & ~off).double().mean()), float(off.double().mean())


@pytest.mark.parametrize("path", [VPCosine(), LinearFlow()], ids=lambda path: type(path).__name__)
def test_and_prefers_what_both_parents_like_and_or_does_not(path: Path) -> None:
    parents = [mixture(path, MODES, shares, SPREAD) for shares in SHARES]
    found = {}
    for mode in ("and", "or"):
        sampler = Superpose(Superpose.Config(mode=mode, num_steps=50, clip=None))  # type: ignore[arg-type]
        found[mode] = modes(walk(sampler, Both(*parents), path, 1500, 2))
    plain = DDIM(DDIM.Config(num_steps=50, eta=1, clip=None))
    found["mean"] = modes(walk(plain, Convex(parents, [0.5, 0.5]), path, 1500, 2))
    assert found["or"][0] == pytest.approx(0.3, abs=0.05)  # a chunk of the one or of the other
    assert found["mean"][0] < 0.45
    assert found["and"][0] > found["mean"][0] + 0.1
    # Equally likely is also what lies between two modes that each parent likes alone: the price of AND.
    assert found["or"][1] < 0.03
    assert found["mean"][1] < 0.05
    assert 0.05 < found["and"][1] < 0.6


@pytest.mark.parametrize("mode", ["and", "mean"])
def test_and_keeps_the_parents_equally_likely(mode: str) -> None:
    """Against the true densities of two Gaussians at every noise level of the walk, not against the estimate itself."""
    path, s = VPCosine(), 0.5
    means = [torch.tensor([[-0.6, 0.0]]), torch.tensor([[0.6, 0.3]])]
    parents = Both(*(mixture(path, mean, torch.ones(1), s) for mean in means))
    sampler: Sampler = Superpose(Superpose.Config(num_steps=100, clip=None))
    field: Any = parents
    if mode == "mean":
        sampler, field = DDIM(DDIM.Config(num_steps=100, eta=1, clip=None)), Convex(parents.fields, [0.5, 0.5])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 1, 2, generator=generator, dtype=torch.float64)
    result = sampler.sample(field, CTX, noise, path=path, generator=generator, record=True)
    assert result.chain is not None
    t = result.times[-2]
    a, b = path.coefficients(t)
    near_data = result.chain[-2][:, 0]
    log_q = [-0.5 * ((near_data - a * mean) ** 2).sum(1) / (a**2 * s**2 + b**2) for mean in means]
    drift = float((log_q[0] - log_q[1]).abs().mean())
    assert drift < 0.4 if mode == "and" else drift > 1.0, drift


def test_three_equal_parents_are_one_and_three_different_ones_meet() -> None:
    path = LinearFlow()
    one = gaussian(path, 0.3, 0.4)
    for mode in ("and", "or"):
        x0 = walk(Superpose(Superpose.Config(mode=mode, clip=None)), Both(one, one, one), path, 4000, 1)  # type: ignore[arg-type]
        assert float(x0.mean()) == pytest.approx(0.3, abs=0.03), mode
    corners = [mixture(path, torch.tensor([corner]), torch.ones(1), 0.5) for corner in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
    x0 = walk(Superpose(Superpose.Config(num_steps=100, clip=None)), Both(*corners), path, 2000, 2)
    torch.testing.assert_close(x0.mean(0), torch.tensor([0.5, 0.5], dtype=torch.float64), rtol=0, atol=0.05)  # the circumcentre
    assert float((x0 - 0.5).norm(dim=1).mean()) < 0.1


def test_a_superposition_of_a_plain_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="one by one"):
        walk(Superpose(), gaussian(LinearFlow(), 0, 1), LinearFlow(), 4, 1)


# ---- guidance ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_row", [False, True])
def test_guidance_of_scale_one_is_the_conditional_to_the_bit(per_row: bool) -> None:
    a, b = leaf(0, "flow"), leaf(1, "flow")
    x, t = torch.randn(2, 5, 3), torch.rand(2, 5) if per_row else torch.rand(2)
    assert torch.equal(Guidance(a, b, 1)(x, t, CTX).x0, a(x, t, CTX).x0)
    assert torch.equal(Guidance(a, b, 0)(x, t, CTX).eps, b(x, t, CTX).eps)
    far = Guidance(a, b, 3)(x, t, CTX)
    torch.testing.assert_close(far.x0, 3 * a(x, t, CTX).x0 - 2 * b(x, t, CTX).x0)
    explains(PARENTS["flow"], far, x, t)


def cost(x0: Tensor) -> Tensor:
    return (x0.square() * torch.tensor([1.0, 2.0, 0.5], dtype=x0.dtype)).sum((1, 2)) + torch.sin(x0).sum((1, 2))


@pytest.mark.parametrize("per_row", [False, True])
def test_the_gradient_of_a_cost_equals_finite_differences(per_row: bool) -> None:
    path = LinearFlow()
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 6)).double()
    field = Leaf(lambda x, t, ctx: net(x).reshape(x.shape), path, "flow")
    x, t = (
        torch.randn(2, 2, 3, dtype=torch.float64),
        torch.tensor([[0.4, 0.5], [0.6, 0.3]]) if per_row else torch.tensor([0.4, 0.6]),
    )
    t = t.double()
    with torch.no_grad():  # as evaluation runs
        plain, pushed = field(x, t, CTX), Guided(field, cost, 0.01, path, max_shift=100)(x, t, CTX)
        slope = torch.zeros_like(x)
        for index in range(x[0].numel()):
            step = torch.zeros(6, dtype=torch.float64)
            step[index] = 1e-5
            up, down = (cost(field(x + sign * step.reshape(1, 2, 3), t, CTX).x0) for sign in (1, -1))
            slope.reshape(2, 6)[:, index] = (up - down) / 2e-5
        sigma = broadcast_time(path.sigma(t), x)
        torch.testing.assert_close(pushed.eps - plain.eps, 0.01 * sigma * slope, rtol=1e-5, atol=1e-8)
        explains(path, pushed, x, t)
        identity = Guided(field, cost, 0.01, path, jacobian="identity", max_shift=100)(x, t, CTX)
    assert not torch.allclose(identity.x0, pushed.x0)
    explains(path, identity, x, t)


@pytest.mark.parametrize("jacobian", ["true", "identity"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_samples_go_where_the_cost_is_low_and_no_step_is_too_long(path: Path, jacobian: str) -> None:
    def target(x0: Tensor) -> Tensor:
        return (x0 - 1).square().sum((1, 2))

    field = gaussian(path, 0, 0.5)
    sampler = DDIM(DDIM.Config(num_steps=50, clip=None))
    free, pushed = (
        walk(sampler, f, path, 2000, 1)
        for f in (field, Guided(field, target, 1.0, path, jacobian=jacobian))  # type: ignore[arg-type]
    )
    assert abs(float(free.mean())) < 0.05
    assert 0.15 < float(pushed.mean()) < 1.0
    x, t = torch.randn(5, 1, 1), torch.full((5,), 0.5)
    far = Guided(field, lambda x0: 1e6 * target(x0), 1.0, path, jacobian=jacobian, max_shift=0.2)(x, t, CTX)  # type: ignore[arg-type]
    torch.testing.assert_close((far.x0 - field(x, t, CTX).x0).abs(), torch.full_like(x, 0.2))


@pytest.mark.parametrize("jacobian", ["true", "identity"])
def test_a_cost_guides_in_inference_mode_as_without_it(jacobian: Any) -> None:
    def pushed() -> Pred:
        x, t, ctx = (torch.linspace(-1, 1, n).reshape(2, *shape) for n, shape in ((6, (1, 3)), (2, ()), (2, (1,))))
        return Guided(leaf(0, "flow"), cost, 1.0, PARENTS["flow"], jacobian)(x, 0.2 + 0.1 * t.abs(), ctx)

    with torch.inference_mode():
        found = pushed()
    wanted = pushed()
    assert torch.equal(found.x0, wanted.x0)
    assert torch.equal(found.eps, wanted.eps)


def test_a_cap_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_shift"):
        Guided(leaf(0, "flow"), cost, 1.0, PARENTS["flow"], max_shift=0)
