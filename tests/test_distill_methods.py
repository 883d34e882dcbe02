"""Methods of distillation against what is known in closed form: Gaussian data, linear teachers, a ring of modes.

For data ``N(mu, s^2)`` the velocity on the linear path, the flow map and with it every target have formulas.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robopolicy.config import Config, component, parse
from robopolicy.data.normalize import Normalizer
from robopolicy.distill.diagnose import energy_distance, mode_shares, off_support, spread
from robopolicy.distill.methods.base import Method, Models, Samples, direction, jump, noised
from robopolicy.distill.methods.meanflow import mean_velocity
from robopolicy.distill.methods.registry import METHODS
from robopolicy.distill.methods.shortcut import two_halves
from robopolicy.distill.teacher import Teacher
from robopolicy.distill.trainer import from_noise
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.generative.path import broadcast_time
from robopolicy.policy import Policy, PolicyConfig

MU, S = 0.7, 0.4
OBSERVATIONS = {"x": Feature("x", (1,))}
TINY = {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8}


def settings(**changes: Any) -> PolicyConfig:
    value = {"n_obs_steps": 1, "horizon": 2, "n_action_steps": 2, "net": TINY, "default_normalize": "identity"}
    return parse(PolicyConfig, {**value, "encoder": {"type": "state"}, **changes})


def policy(cls: type[Policy] = Policy, seed: int = 0, action_dim: int = 2, **changes: Any) -> Policy:
    normalizers = {"x": Normalizer(1, "identity"), "action": Normalizer(action_dim, "identity")}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = cls(settings(**changes), OBSERVATIONS, Feature("action", (action_dim,)), normalizers)
        for parameter in made.parameters():  # networks start at zero output, which would hide errors
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def flow_map(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """``X(x, t -> u)`` of the probability flow of Gaussian data on the linear path."""
    a, b, c, d = 1 - t, t, 1 - u, u
    return c * MU + (x - a * MU) * ((c**2 * S**2 + d**2) / (a**2 * S**2 + b**2)).sqrt()


class Exact(Policy):
    """The flow map of Gaussian data, and at gap 0 its velocity."""

    def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
        time = broadcast_time(t / 100, x)
        far = torch.zeros_like(time) if gap is None else broadcast_time(gap / 100, x)
        spread = (1 - time) ** 2 * S**2 + time**2
        x0 = MU + (1 - time) * S**2 / spread * (x - (1 - time) * MU)
        velocity = (x - x0) / time.clamp_min(1e-6)
        mean = (x - flow_map(x, time, time - far)) / far.clamp_min(1e-6)
        return torch.where(far > 1e-6, mean, velocity)


class ExactX0(Policy):
    """The consistency function of Gaussian data, as the clean chunk that a network for ``prediction: x0`` gives."""

    def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
        time = broadcast_time(t / 100, x)
        return flow_map(x, time, torch.zeros_like(time))


def batch(rows: int = 256, seed: int = 0) -> tuple[Samples, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 2, 2, generator=generator)
    return Samples({"x": torch.zeros(rows, 1, 1)}, noise, MU + S * noise, None), generator


def method(name: str, **config: Any) -> Method:
    cls, parsed = component("method", {"type": name, **config}, METHODS)
    made: Method = cls(parsed)
    return made


def student(name: str, **config: Any) -> Policy:
    return policy(**method(name, **config).policy())


def target(model: Policy) -> Policy:
    return copy.deepcopy(model).requires_grad_(False)


# -- flow maps ---------------------------------------------------------------------------------------------------------------


def test_a_jump_to_where_it_starts_stays_and_the_boundary_is_exact() -> None:
    model, x = policy(target_time=True), torch.randn(64, 2, 2, generator=torch.Generator().manual_seed(0))
    t, ctx = torch.linspace(0, 1, 64).double(), torch.zeros(64, 1)
    assert torch.equal(jump(model, x, t, t, ctx), x)
    assert torch.equal(model.field(x, torch.zeros(64), ctx).x0, x)  # a consistency function at t = 0
    assert not torch.equal(jump(model, x, t, t * 0.5, ctx)[1:], x[1:])


def test_jumps_of_the_exact_map_and_of_the_policy_agree_with_the_formula() -> None:
    model, (samples, generator) = policy(Exact, target_time=True), batch()
    t = torch.rand(256, generator=generator).double() * 0.9 + 0.1
    u = t * torch.rand(256, generator=generator).double()
    expected = flow_map(samples.noise, broadcast_time(t, samples.noise), broadcast_time(u, samples.noise))
    ctx = torch.zeros(256, 1)
    assert torch.allclose(jump(model, samples.noise, t, u, ctx), expected, atol=1e-5)
    made = from_noise(policy(Exact, target_time=True, sampler={"type": "jump"}), ctx, samples.noise, generator)
    assert torch.allclose(made, samples.clean, atol=1e-5)  # one call from noise to data


@pytest.mark.parametrize(
    ("path", "prediction", "sampler"),
    [
        ({"type": "vp_cosine"}, "eps", {"type": "ddim", "num_steps": 10, "clip": None}),
        ({"type": "edm"}, "x0", {"type": "euler"}),
        ({"type": "flow"}, "flow", {"type": "euler"}),
    ],
)
def test_the_velocity_of_a_teacher_on_any_path_is_that_of_the_linear_path(path: Any, prediction: Any, sampler: Any) -> None:
    class Denoiser(Policy):
        """Gaussian data on the policy's own path, in what it predicts."""

        def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
            alpha, sigma = (broadcast_time(value, x) for value in self.path.coefficients(self.asked))
            state = x * (sigma**2 + 0.25).sqrt() if path["type"] == "edm" else x
            x0 = MU + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (state - alpha * MU)
            return self.path.target(x0, (state - alpha * x0) / sigma, self.asked, prediction)

        def field(self, x: Tensor, t: Tensor, ctx: Tensor, to: Tensor | None = None) -> Any:
            self.asked = t
            return super().field(x, t, ctx)

    teacher = Teacher(policy(Denoiser, path=path, prediction=prediction, sampler=sampler))
    x, t = torch.randn(64, 2, 2, dtype=torch.float64), torch.linspace(0.05, 0.95, 64).double()
    exact = policy(Exact, target_time=True)
    expected = exact.denoise(x, 100 * t, torch.zeros(64, 1))
    assert torch.allclose(teacher.velocity(x, t, torch.zeros(64, 1)), expected, atol=1e-4)
    assert teacher.calls == 64


def test_a_teachers_heun_step_follows_the_flow_and_is_better_than_eulers() -> None:
    teacher, (samples, _) = Teacher(policy(Exact)), batch(64)
    t, u = torch.full((64,), 0.8).double(), torch.full((64,), 0.7).double()
    expected = flow_map(samples.noise, *(broadcast_time(time, samples.noise) for time in (t, u)))
    errors = [(teacher.step(samples.noise, t, u, torch.zeros(64, 1), order) - expected).abs().max() for order in (1, 2)]
    assert errors[1] < 0.2 * errors[0] < 0.01


def test_samplers_that_draw_noise_are_replaced_or_refused() -> None:
    made = Teacher(policy(path={"type": "vp_cosine"}, prediction="eps", sampler={"type": "ddpm", "num_steps": 20}))
    assert (made.sampler.eta, made.nfe) == (0.0, 20)
    assert Teacher(policy(sampler={"type": "dpm_solver", "eta": 1.0})).sampler.eta == 0.0
    with pytest.raises(ConfigError, match="--teacher-sampler"):
        Teacher(policy(sampler={"type": "consistency", "num_steps": 2}))
    with pytest.raises(ConfigError, match="draws noise on the way"):
        Teacher(policy(), {"type": "ddim", "eta": 0.5})


# -- targets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["consistency", "ctm"])
def test_an_exact_student_of_an_exact_teacher_has_nothing_to_learn_and_less_with_finer_steps(name: str) -> None:
    losses = []
    for segments in (4, 16, 64):
        rule = method(name, segments=segments, **({"loss": "square"} if name == "consistency" else {"denoising": 0.0}))
        exact = policy(Exact, target_time=True) if name == "ctm" else policy(ExactX0, prediction="x0")
        samples, generator = batch(2048)
        losses.append(float(rule.loss(samples, Models(exact, target(exact), Teacher(policy(Exact))), generator)))
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 1e-4
    wrong = target(policy(target_time=name == "ctm"))
    samples, generator = batch(2048)
    assert float(rule.loss(samples, Models(wrong, target(wrong), Teacher(policy(Exact))), generator)) > 1e-4


def test_the_meanflow_identity_holds_for_the_exact_map_and_the_derivative_is_the_numerical_one() -> None:
    exact, (samples, generator) = policy(Exact, target_time=True), batch()
    x, ctx = samples.noise.double(), torch.zeros(256, 1).double()
    t = torch.rand(256, generator=generator, dtype=torch.float64) * 0.5 + 0.5
    r = t - 0.4
    velocity = exact.denoise(x, 100 * t, ctx)
    mean, slope = mean_velocity(exact, x, t, r, velocity, ctx)
    assert torch.allclose(mean + broadcast_time(t - r, x) * slope, velocity, atol=1e-6)

    network = policy(target_time=True).double()
    _, slope = mean_velocity(network, x, t, r, velocity, ctx)
    h = 1e-5
    ends = [direction(network, x + sign * h * velocity, t + sign * h, r, ctx) for sign in (1, -1)]
    # Sinusoidal embeddings are computed in float32, which bounds what differences of size h can show.
    assert torch.allclose(slope, (ends[0] - ends[1]) / (2 * h), atol=0.05 * float(slope.abs().max()))
    assert float(slope.abs().max()) > 0.01


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_meanflow_of_the_exact_map_is_at_its_floor(source: str) -> None:
    rule = method("meanflow", power=0.0, source=source)
    exact, (samples, generator) = policy(Exact, target_time=True), batch(2048)
    loss = float(rule.loss(samples, Models(exact, target(exact), Teacher(policy(Exact))), generator))
    assert (loss < 1e-4) == (source == "teacher")  # a single demonstration's velocity is a noisy one


def test_a_shortcut_of_the_exact_map_is_two_halves() -> None:
    exact, (samples, _) = policy(Exact, target_time=True), batch(64)
    ctx, t = torch.zeros(64, 1), torch.ones(64).double()
    for length in (1.0, 0.5, 0.25):
        step = torch.full((64,), length).double()
        whole = direction(exact, samples.noise, t, t - step, ctx)
        assert torch.allclose(two_halves(exact, samples.noise, t, step, ctx, 2**-7), whole, atol=1e-4)
    rule = method("shortcut")
    samples, generator = batch(2048)
    assert float(rule.loss(samples, Models(exact, target(exact), Teacher(policy(Exact))), generator)) < 2e-4


def test_jumps_of_a_shortcut_tile_the_way() -> None:
    t, length = method("shortcut", levels=4)._jumps(4000, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    assert set(length.tolist()) == {1.0, 0.5, 0.25, 0.125}
    assert float((t / length - (t / length).round()).abs().max()) == 0
    assert float(t.min()) == 0.125
    assert float(t.max()) == 1.0
    assert bool((t >= length).all())


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_student_and_no_target(name: str) -> None:
    rule, model = method(name), student(name)
    average, teacher = target(model), Teacher(policy(seed=1))
    samples, generator = batch(32)
    rule.loss(samples, Models(model, average, teacher), generator).backward()
    assert all(p.grad is None for p in [*average.parameters(), *teacher.policy.parameters()])
    reached = [float(p.grad.abs().max()) for p in model.net.parameters() if p.grad is not None]
    assert len(reached) > 4
    assert max(reached) > 0


@pytest.mark.parametrize("name", ["regression", "mip"])
def test_padded_rows_do_not_count(name: str) -> None:
    rule, model = method(name), student(name)
    losses = []
    for spoilt in (0.0, 100.0):
        samples, generator = batch(8)
        keep = torch.ones(8, 2, 1)
        keep[:4, 1] = 0
        samples.clean[:4, 1] += spoilt
        models = Models(model, target(model), Teacher(policy()))
        losses.append(rule.loss(samples._replace(keep=keep), models, generator))
    if name == "regression":  # the other one shows the network the actions
        assert torch.equal(losses[0], losses[1])
    assert float(losses[1]) < 1000


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("consistency", {}, 0.3),
        ("ctm", {}, 0.3),
        ("meanflow", {}, 0.3),
        ("shortcut", {}, 0.3),
        ("meanflow", {"source": "data"}, 1.0),  # data know of no scale: their flow is that of unit noise
        ("shortcut", {"source": "data"}, 1.0),
    ],
)
def test_a_student_of_less_noise_is_taught_where_its_walks_go(
    name: str, config: dict[str, Any], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[float] = []

    def watched(samples: Samples, t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        x, velocity = noised(samples, t, *rest)
        time = broadcast_time(t, x)
        scales.append(float(((x - (1 - time) * samples.clean) / time)[t > 0.01].std()))
        return x, velocity

    monkeypatch.setattr(f"robopolicy.distill.methods.{name}.noised", watched)
    rule = method(name, **config)
    model, (samples, generator) = policy(initial_noise=0.3, **rule.policy()), batch(512)
    rule.loss(samples, Models(model, target(model), Teacher(policy())), generator)
    assert scales == pytest.approx([expected] * (2 if name == "ctm" else 1), rel=0.1)


def test_with_less_noise_ctm_keeps_the_velocity_of_its_teacher() -> None:
    """What joins less noise to fewer chunks is another flow than the teacher's, whose jumps are learnt beside it."""
    losses = {}
    for noise in (1.0, 0.3):
        exact = policy(Exact, target_time=True, initial_noise=noise)
        for denoising in (0.0, 1.0):
            samples, generator = batch(512)
            models = Models(exact, target(exact), Teacher(policy(Exact)))
            losses[noise, denoising] = float(method("ctm", denoising=denoising).loss(samples, models, generator))
    assert losses[1.0, 1.0] - losses[1.0, 0.0] > 0.1  # the velocity of single chunks is a noisy one
    assert losses[0.3, 1.0] - losses[0.3, 0.0] == pytest.approx(0, abs=1e-4)


def test_mip_weighs_its_two_looks_as_published() -> None:
    class Nothing(Policy):
        def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
            self.seen = (x, t)
            return torch.zeros_like(x)

    model, (samples, generator) = policy(Nothing, prediction="x0"), batch(512)
    loss = method("mip", second=0.2).loss(samples, Models(model, model, Teacher(policy())), generator)
    assert float(loss) == pytest.approx(float(samples.clean.square().mean()) * (1 / 0.8**2 + 1 / 0.2**2), rel=1e-5)
    x, t = model.seen
    assert t.unique().tolist() == pytest.approx([20.0, 100.0])
    assert float(x[:512].abs().max()) == 0
    assert float((x[512:] - 0.8 * samples.clean).std()) == pytest.approx(0.2, rel=0.05)


# -- learning ----------------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """``W x + b`` of the flattened chunk: all that a Gaussian teacher takes."""

    class Config(Config):
        pass

    def __init__(self, config: Line.Config, *, action_dim: int, horizon: int, ctx_dim: int) -> None:
        super().__init__()
        self.line = nn.Linear(horizon * action_dim, horizon * action_dim)

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        out: Tensor = self.line(x.flatten(1)).view_as(x)
        return out


def learn(rule: Method, model: Policy, samples: Samples, steps: int, size: int = 256, lr: float = 0.02) -> float:
    """Train on cached pairs; the mean loss of the last tenth."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    models, losses = Models(model, target(model), Teacher(policy())), []
    for _ in range(steps):
        rows = torch.randint(len(samples.clean), (size,), generator=generator)
        part = Samples({n: v[rows] for n, v in samples.obs.items()}, samples.noise[rows], samples.clean[rows], None)
        loss = rule.loss(part, models, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])


def test_from_the_same_noise_nothing_is_left_to_learn_and_from_another_the_whole_variance() -> None:
    teacher = Teacher(policy(Exact, sampler={"type": "euler", "num_steps": 50}))
    noise = batch(4096)[0].noise
    clean = teacher.sample(torch.zeros(len(noise), 1), noise)
    obs = {"x": torch.zeros(len(noise), 1, 1)}
    rule = method("same_noise")
    losses = {}
    for name, drawn in (("same", noise), ("permuted", noise.roll(1, 0))):
        model = policy(**rule.policy(), net={"type": f"{__name__}:Line"})
        losses[name] = learn(rule, model, Samples(obs, drawn, clean, None), 400)
    assert losses["same"] < 1e-4
    assert losses["permuted"] == pytest.approx(float(clean.var()), rel=0.1)


class Ring(Policy):
    """Eight narrow modes on a circle, exactly."""

    ANGLES = torch.arange(8) * math.pi / 4
    CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
    STD = 0.15

    def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
        time = broadcast_time(t / 100, x)
        alpha, variance = 1 - time, ((1 - time) * self.STD) ** 2 + time**2
        away = x - alpha * self.CENTRES  # [B, 1, 2] against [8, 2]
        share = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        x0 = (share * (self.CENTRES + alpha * self.STD**2 / variance * away)).sum(1, keepdim=True)
        return (x - x0) / time.clamp_min(1e-6)


def test_a_student_keeps_all_modes_of_a_ring_where_regression_ends_between_them() -> None:
    one = {"horizon": 1, "n_action_steps": 1}
    teacher = Teacher(policy(Ring, **one, sampler={"type": "euler", "num_steps": 20}))
    noise = torch.randn(12_000, 1, 2, generator=torch.Generator().manual_seed(0))
    obs = {"x": torch.zeros(len(noise), 1, 1)}
    clean = teacher.sample(torch.zeros(len(noise), 1), noise)
    net = {"type": "mlp", "width": 64, "depth": 2, "expansion": 1, "time_dim": 8}
    shares, off, points = {}, {}, {}
    fresh = torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(1))
    ctx = torch.zeros(len(fresh), 1)
    points["teacher"] = teacher.sample(ctx, fresh)[:, 0]
    for name in ("same_noise", "regression"):
        rule = method(name)
        model = policy(**one, **rule.policy(), net=net)
        learn(rule, model, Samples(obs, noise, clean, None), 1000 if name == "same_noise" else 50, lr=5e-3)
        points[name] = from_noise(model, ctx, fresh, torch.Generator()).detach()[:, 0]
    for name, made in points.items():
        shares[name], off[name] = mode_shares(made, Ring.CENTRES, 0.375)
    assert off["teacher"] < 0.04
    assert off["same_noise"] < off["teacher"] + 0.08  # the exact map jumps between modes, and a small network cannot
    error = 4 * math.sqrt(2 * 0.125 * 0.875 / 4000)  # two independent estimates of one share; here they even share their noise
    assert float((shares["same_noise"] - shares["teacher"]).abs().max()) < error
    assert float(shares["same_noise"].min()) > 0.09
    assert off["regression"] == 1.0  # the mean is in the middle
    assert float(off_support(points["teacher"], points["same_noise"])) < 0.15
    assert float(off_support(points["teacher"], points["regression"])) == 1.0
    assert abs(float(energy_distance(points["teacher"], points["same_noise"]))) < 0.01
    assert float(energy_distance(points["teacher"], points["regression"])) > 0.3


# -- diagnostics -------------------------------------------------------------------------------------------------------------


def test_diagnostics_of_equal_shifted_and_collapsed_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 128, 2, 2, generator=generator)
    same = spread(teacher, teacher)
    assert same.std_ratio == pytest.approx(1)
    assert same.same_noise == 0
    assert same.off_support == pytest.approx(0.05, abs=0.03)
    again = spread(teacher, torch.randn(8, 128, 2, 2, generator=generator))
    assert again.std_ratio == pytest.approx(1, abs=0.05)
    assert abs(again.energy) < 0.02
    assert again.same_noise == pytest.approx(math.sqrt(2), abs=0.1)
    collapsed = spread(teacher, teacher.mean(1, keepdim=True).expand_as(teacher))
    assert collapsed.std_ratio == pytest.approx(0, abs=1e-6)
    assert collapsed.energy > 0.2
    shifted = spread(teacher, teacher + 5)
    assert shifted.off_support > 0.95
    assert shifted.energy > 1
