"""Card 0.6 T1 and the tables: every conversion on every path, its inverse, and what the reference schedules say."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.config import component
from robopolicy.errors import ConfigError
from robopolicy.generative.path import EDM, PATHS, Kind, LinearFlow, Path, VPCosine, broadcast_time

ALL = [VPCosine(), VPCosine(VPCosine.Config(num_steps=20)), LinearFlow(), EDM(), EDM(EDM.Config(sigma_min=0.02))]
KINDS: list[Kind] = ["eps", "x0", "v", "flow"]


def name(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


def gaussians(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("path", ALL, ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_row", [False, True])
def test_prediction_of_the_target_gives_back_clean_chunk_and_noise(path: Path, kind: Kind, per_row: bool) -> None:
    x0, eps = gaussians(64, 8, 3), gaussians(64, 8, 3, seed=1)
    # Inside the range where even the ill-posed kinds keep 1e-10: noise levels from 1e-4 to 1e4.
    level = torch.logspace(-4, 3.3, 64, dtype=torch.float64)
    t = path.t_of(level)
    t = t[:, None].repeat(1, 8).roll(3, 1) if per_row else t
    x = path.perturb(x0, eps, t)
    pred = path.predict(x, t, path.target(x0, eps, t, kind), kind)
    assert (pred.x0 - x0).abs().max() < 1e-10
    assert (pred.eps - eps).abs().max() < 1e-10


@settings(deadline=None, max_examples=60)
@given(
    index=st.integers(0, len(ALL) - 1),
    t=st.floats(1e-3, 1.0),
    x0=st.floats(-3, 3),
    eps=st.floats(-5, 5),
    kind=st.sampled_from(["v", "flow"]),
)
def test_v_and_flow_are_well_posed_up_to_both_ends(index: int, t: float, x0: float, eps: float, kind: Kind) -> None:
    path = ALL[index]
    clean, noise = torch.full((1, 1, 1), x0, dtype=torch.float64), torch.full((1, 1, 1), eps, dtype=torch.float64)
    time = torch.tensor([t], dtype=torch.float64)
    pred = path.predict(path.perturb(clean, noise, time), time, path.target(clean, noise, time, kind), kind)
    assert abs(pred.x0.item() - x0) < 1e-10
    assert abs(pred.eps.item() - eps) < 1e-10


@pytest.mark.parametrize("path", ALL, ids=name)
def test_noise_level_rises_and_t_of_is_its_inverse(path: Path) -> None:
    t = torch.linspace(0, 0.9999, 1001, dtype=torch.float64)
    level = path.noise_level(t)
    assert level[0] == 0
    assert (level.diff() > 0).all()
    torch.testing.assert_close(path.t_of(level), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(path.noise_level(path.t_of(level)), level, rtol=1e-9, atol=1e-15)
    assert path.t_of(torch.tensor(math.inf)) == 1


@pytest.mark.parametrize("path", ALL, ids=name)
def test_time_zero_is_exactly_clean(path: Path) -> None:
    alpha, sigma = path.coefficients(torch.zeros(3))
    assert (alpha == 1).all()
    assert (sigma == 0).all()


@pytest.mark.parametrize("path", ALL, ids=name)
def test_x0_gain_is_the_slope_of_the_clean_chunk_in_the_prediction(path: Path) -> None:
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x, y = gaussians(3, 2, 2), gaussians(3, 2, 2, seed=1)
    for kind in KINDS:
        slope = (path.predict(x, t, y + 1e-3, kind).x0 - path.predict(x, t, y, kind).x0).abs() / 1e-3
        torch.testing.assert_close(slope, broadcast_time(path.x0_gain(t, kind), x).expand_as(slope), rtol=1e-6, atol=0)


def test_score_gives_the_clean_chunk_by_tweedies_formula() -> None:
    path, t = VPCosine(), torch.tensor([0.3, 0.8], dtype=torch.float64)
    x0, eps = gaussians(2, 4, 2), gaussians(2, 4, 2, seed=1)
    x = path.perturb(x0, eps, t)
    score = path.score(path.predict(x, t, eps, "eps"), t)
    alpha, sigma = (broadcast_time(c, x) for c in path.coefficients(t))
    torch.testing.assert_close((x + sigma**2 * score) / alpha, x0)


@pytest.mark.parametrize("steps", [20, 50, 100, 1000])
def test_cosine_table_is_that_of_diffusers(steps: int) -> None:
    reference = DDIMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    path = VPCosine(VPCosine.Config(num_steps=steps))
    for dtype in (torch.float32, torch.float64):  # float32 times of the table hit the table too
        t = ((torch.arange(steps) + 1).double() / steps).to(dtype)
        assert (path.alpha(t) ** 2 - reference).abs().max() < 1e-6
        torch.testing.assert_close(path.alpha(t) ** 2, reference, rtol=2e-4, atol=0)  # their float32 product drifts
        assert torch.equal(path.net_time(t), torch.arange(steps).double())


def test_cosine_table_obeys_its_definition() -> None:
    path, product = VPCosine(), 1.0
    for i in range(100):
        ratio = (math.cos(((i + 1) / 100 + 0.008) / 1.008 * math.pi / 2) / math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2)) ** 2
        product *= 1 - min(1 - ratio, 0.999)
        alpha, sigma = path.coefficients(torch.tensor((i + 1) / 100))
        assert alpha.item() == pytest.approx(math.sqrt(product), rel=1e-9)
        assert sigma.item() == pytest.approx(math.sqrt(1 - product), rel=1e-9)
    assert product == pytest.approx(2.43e-7, rel=1e-2)


def test_between_table_points_the_log_noise_level_is_linear() -> None:
    path = VPCosine()
    a, middle, b = path.noise_level(torch.tensor([0.5, 0.505, 0.51], dtype=torch.float64))
    assert middle.item() == pytest.approx(math.sqrt(a.item() * b.item()), rel=1e-12)
    zero, half, first = path.noise_level(torch.tensor([0.0, 0.005, 0.01], dtype=torch.float64))
    assert zero == 0
    assert half.item() == pytest.approx(first.item() / 2, rel=1e-12)


def test_grids_fall_from_one_to_zero_and_are_those_documented() -> None:
    for path in ALL:
        for steps in (1, 2, 3, 7, 20):
            grid = path.grid(steps)
            assert grid.shape == (steps + 1,)
            assert grid[0] == 1
            assert grid[-1] == 0
            assert (grid.diff() < 0).all()
    ddim = DDIMScheduler(num_train_timesteps=100, timestep_spacing="trailing")
    for steps in (1, 3, 10, 100):
        ddim.set_timesteps(steps)
        assert torch.equal(VPCosine().net_time(VPCosine().grid(steps)[:-1]).long(), ddim.timesteps)
    assert LinearFlow().grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    rho, low, high = 7.0, 0.002, 80.0
    karras = [(high ** (1 / rho) + i / 9 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(10)]
    torch.testing.assert_close(EDM().sigma(EDM().grid(10))[:-1], torch.tensor(karras, dtype=torch.float64), rtol=1e-9, atol=0)


def test_edm_network_input_has_unit_scale_for_data_of_the_declared_scale() -> None:
    path = EDM()
    t = torch.linspace(0.3, 1, 8, dtype=torch.float64)
    x, time = path.net_input(path.perturb(0.5 * gaussians(8, 100, 50), gaussians(8, 100, 50, seed=1), t), t)
    torch.testing.assert_close(x.std(dim=(1, 2)), torch.ones(8, dtype=torch.float64), rtol=0.03, atol=0)
    torch.testing.assert_close(time, 25 * path.sigma(t).log())


def test_prior_is_unit_noise_at_the_scale_of_time_one() -> None:
    noise = gaussians(2, 3, 1)
    assert torch.equal(LinearFlow().prior(noise), noise)
    assert torch.equal(EDM().prior(noise), 80 * noise)
    torch.testing.assert_close(VPCosine().prior(noise), noise, rtol=2e-7, atol=0)


def test_time_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        broadcast_time(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))


def test_more_steps_than_the_table_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="num_steps 101 on a path of 100"):
        VPCosine().grid(101)


def test_configurations_name_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sigma_max'"):
        component("path", {"type": "edm", "sigma_mx": 1.0}, PATHS)
    with pytest.raises(ConfigError, match=r"sigma_min 2\.0 must be below sigma_max 1\.0"):
        component("path", {"type": "edm", "sigma_min": 2.0, "sigma_max": 1.0}, PATHS)
    for entry in PATHS:
        cls, config = component("path", entry, PATHS)
        assert issubclass(cls, Path)
        cls(config)
