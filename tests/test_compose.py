"""Composed policies: what they are made of, what they refuse, and that they are policies (cards 0.6 and 1)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robopolicy.compose.policy import Composed, compose
from robopolicy.compose.predict import predict_weights, stacking_weights
from robopolicy.compose.superpose import SUPERPOSE
from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.distill.teacher import Teacher
from robopolicy.errors import CheckpointError, ConfigError
from robopolicy.features import Feature
from robopolicy.generative.path import broadcast_time
from robopolicy.generative.sampler import Euler
from robopolicy.policy import Policy, PolicyConfig, load_policy

POSITION, SPEED = Feature("position", (2,), unit="m"), Feature("speed", (3,), unit="m/s")
ACTION = Feature("action", (2,), unit="m")
VP = {"path": {"type": "vp_cosine"}, "prediction": "v", "sampler": {"type": "ddim", "num_steps": 5, "clip": None}}
FLOW = {"path": {"type": "flow"}, "prediction": "flow", "sampler": {"type": "euler", "num_steps": 5}}


def parent(
    seed: int, observed: tuple[Feature, ...] = (POSITION,), scale: tuple[float, ...] = (0.5, 0.4), **changes: Any
) -> Policy:
    value = {"horizon": 6, "n_action_steps": 3, "net": {"type": "mlp", "width": 16, "depth": 1, "time_dim": 8}}
    config = parse(PolicyConfig, {**value, "encoder": {"type": "state"}, **FLOW, **changes})
    normalizers = {feature.name: Normalizer(feature.size, "identity") for feature in observed}
    action = Normalizer(len(scale), "meanstd")
    action.scale.copy_(torch.tensor(scale))
    action.offset.fill_(0.1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = Policy(config, {f.name: f for f in observed}, ACTION, {**normalizers, "action": action})
        for parameter in made.parameters():  # networks start at zero output, which would hide errors
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def observations(batch: int = 3, steps: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {f.name: rng.normal(size=(batch, steps, *f.shape)).astype(np.float32) for f in (POSITION, SPEED)}


def act(policy: Policy, steps: int = 2) -> np.ndarray:
    return policy.act(observations(steps=steps), torch.Generator().manual_seed(0))


A = parent(1, (POSITION,), **VP)
B = parent(2, (SPEED, POSITION), **FLOW)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("rule", "weights", "asked"),
    [
        ("convex", [1, 0], [1, 0]),
        ("convex", [0.5, 0.5], [1, 1]),
        ("product", [0, 1], [0, 1]),
        ("guidance", [1, 0], [1, 0]),
        ("guidance", [0, 1], [0, 1]),
        ("guidance", [1.5, -0.5], [1, 1]),
        ("and", None, [1, 1]),
    ],
)
def test_network_calls_are_those_that_are_made(rule: Any, weights: list[float] | None, asked: list[int]) -> None:
    both, calls = compose([A, B], rule=rule, weights=weights), [0, 0]
    for index, one in enumerate(both.policies):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        one.net.register_forward_hook(count)
    act(both)
    steps = len(both.sampler.times(both.path)) - 1
    assert calls == [steps * one for one in asked]
    assert both.nfe == sum(calls)


class Pushed(Euler):
    """A sampler with a walk of its own."""

    def sample(self, field: Any, ctx: Any, x_init: Any, **walk: Any) -> Any:
        return super().sample(field, ctx, x_init, **walk)


def test_what_a_parent_s_own_walk_adds_is_not_lost_without_a_word() -> None:
    own = {"type": "test_compose:Pushed", "num_steps": 3}
    pushed, plain = parent(3, sampler=own), parent(4)
    for parents, settings in (
        ([plain, pushed], {}),
        ([pushed, plain], {"rule": "and"}),
        ([pushed, plain], {"sampler": B.config.sampler}),
    ):
        with pytest.raises(ConfigError, match=r"is walked by sampler 'test_compose:Pushed' .* is lost"):
            compose(parents, **settings)
    assert isinstance(compose([pushed, plain]).sampler, Pushed)
    assert isinstance(compose([plain, pushed], sampler=own).sampler, Pushed)
    compose([plain, pushed.varied(sampler=B.config.sampler)])
    with pytest.raises(ConfigError, match=r"'test_compose:Pushed' walks in a way of its own, .* drop --teacher-sampler"):
        Teacher(pushed, {"type": "euler"})
    assert isinstance(Teacher(pushed, {**own, "num_steps": 9}).sampler, Pushed)


# ---- what it computes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(A, B), (B, A)], ids=["diffusion first", "flow first"])
def test_weight_one_is_the_parent_to_the_bit_by_its_own_path_and_sampler(order: tuple[Policy, Policy]) -> None:
    first, second = order
    assert np.array_equal(act(compose(order, weights=[1, 0])), act(first))
    like_second = compose(order, weights=[0, 1], path=second.config.path, sampler=second.config.sampler)
    assert np.array_equal(act(like_second), act(second))
    assert not np.allclose(act(compose(order)), act(first))
    assert np.array_equal(act(compose(order, rule="guidance", weights=[1, 0])), act(first))


@torch.no_grad()
def test_guidance_goes_on_beyond_the_first_parent_away_from_the_second() -> None:
    both = compose([A, B], rule="guidance", weights=[2.5, -1.5])
    assert compose([A, B], rule="guidance").config.weights == (1.5, -0.5)
    ctx, x, t = both.encode(both.observe(observations())), torch.randn(3, 6, 2), torch.full((3,), 0.4)
    first, second = both.each(x, t, ctx)
    seen = both.field(x, t, ctx)
    torch.testing.assert_close(seen.x0, second.x0 + 2.5 * (first.x0 - second.x0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.eps, second.eps + 2.5 * (first.eps - second.eps), rtol=1e-4, atol=1e-5)
    assert np.isfinite(act(both)).all()


def test_the_order_of_parents_does_not_matter_and_a_policy_with_itself_is_itself() -> None:
    settings = {"path": {"type": "flow"}, "sampler": {"type": "euler", "num_steps": 7}}
    np.testing.assert_allclose(
        act(compose([A, B], weights=[0.3, 0.7], **settings)), act(compose([B, A], weights=[0.7, 0.3], **settings)), atol=1e-5
    )
    twice = compose([A, A])
    np.testing.assert_allclose(act(twice), act(A), atol=1e-5)
    assert len({tensor.data_ptr() for tensor in twice.state_dict().values()}) == len(twice.state_dict())


@torch.no_grad()
def test_the_mixture_is_that_of_the_parents_pairs_at_one_noise_level() -> None:
    both = compose([A, B], weights=[0.25, 0.75])
    obs = both.observe(observations())
    ctx, x0, eps = both.encode(obs), torch.randn(3, 6, 2), torch.randn(3, 6, 2)
    assert ctx.shape[1] == both.ctx_dim == A.ctx_dim + B.ctx_dim
    for t in (torch.full((3,), 0.4), torch.rand(3, 6) * 0.5 + 0.2):
        seen = both.field(both.path.perturb(x0, eps, t), t, ctx)
        flow_t = B.path.t_of(A.path.noise_level(t))
        own = [
            A.field(A.path.perturb(x0, eps, t), t, A.encode(obs)),
            B.field(B.path.perturb(x0, eps, flow_t), flow_t, B.encode(obs)),
        ]
        torch.testing.assert_close(seen.x0, 0.25 * own[0].x0 + 0.75 * own[1].x0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.eps, 0.25 * own[0].eps + 0.75 * own[1].eps, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_horizons_and_windows_are_aligned_at_now_and_the_tail_is_the_longer_ones() -> None:
    long = parent(3, (POSITION,), horizon=9, n_obs_steps=1, n_action_steps=4)
    short = parent(4, (SPEED,), horizon=5, n_obs_steps=3, n_action_steps=3)
    both = compose([long, short], weights=[0.5, 0.5])
    assert (both.n_obs_steps, both.horizon, both.n_action_steps) == (3, 11, 3)
    obs = both.observe(observations(steps=3))
    ctx, x, t = both.encode(obs), torch.randn(3, 11, 2), torch.full((3,), 0.5)
    seen = both.field(x, t, ctx)
    alone = [
        long.field(x[:, 2:], t, long.encode({"position": obs["position"][:, -1:]})),
        short.field(x[:, :5], t, short.encode(obs)),
    ]
    torch.testing.assert_close(seen.x0[:, 5:], alone[0].x0[:, 3:])  # beyond the short one's end
    torch.testing.assert_close(seen.x0[:, :2], alone[1].x0[:, :2])  # before the long one's first observation
    torch.testing.assert_close(seen.x0[:, 2:5], (alone[0].x0[:, :3] + alone[1].x0[:, 2:]) / 2)
    for rule in ("product", "and", "or"):
        other = compose([long, short], rule=rule)  # type: ignore[arg-type]
        torch.testing.assert_close(other.field(x, t, ctx).x0[:, 5:], alone[0].x0[:, 3:])
        each = other.each(x, t, ctx)
        torch.testing.assert_close(each[0].x0[:, :2], each[1].x0[:, :2])
        assert np.isfinite(act(other, steps=3)).all()
    only_short = compose([long, short], weights=[0, 1])
    torch.testing.assert_close(only_short.field(x, t, ctx).x0[:, 5:], alone[0].x0[:, 3:])


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("path", ["vp_cosine", "flow", "edm"])
def test_every_path_and_prediction_goes_with_every_other(path: str, kind: str) -> None:
    sampler = {"type": "ddim", "num_steps": 4, "clip": None}
    other = parent(5, (SPEED,), path={"type": path}, prediction=kind, sampler=sampler)
    third = parent(6, (POSITION, SPEED), **FLOW)
    for parents in ([A, other, third], [other, A]):
        actions = act(compose(parents, sampler={**sampler, "clip": 3.0}))
        assert actions.shape == (3, 3, 2)
        assert np.isfinite(actions).all()


@torch.no_grad()
def test_a_network_of_the_composition_is_what_losses_may_ask_for() -> None:
    for path in ({"type": "vp_cosine"}, {"type": "flow"}, {"type": "edm"}):
        both = compose([A, B], path=path)
        obs = both.observe(observations())
        ctx, x = both.encode(obs), torch.randn(3, 6, 2)
        for t in (torch.tensor([0.3, 0.5, 0.9]), torch.rand(3, 6) * 0.6 + 0.3):  # EDM has no noise to speak of below .22
            y = both.denoise(*both.path.net_input(x, t), ctx)
            found = both.path.predict(x, t, y, both.config.prediction)
            torch.testing.assert_close(found.x0, both.field(x, t, ctx).x0, rtol=1e-2, atol=5e-3)
        batch = {"obs": obs, "action": torch.randn(3, 6, 2), "action_is_pad": torch.zeros(3, 6, dtype=torch.bool)}
        assert torch.isfinite(both.loss(batch, torch.Generator().manual_seed(0)))


# ---- normalisers -----------------------------------------------------------------------------------------------------------


def test_other_normalisers_are_refused_and_mapped_on_demand() -> None:
    other = parent(2, (SPEED,), scale=(0.55, 0.44))
    with pytest.raises(ConfigError, match="renormalize=true"):
        compose([A, other])
    assert np.isfinite(act(compose([A, other], renormalize=True))).all()
    with pytest.raises(ConfigError, match=r"ratios .* apart"):
        compose([A, parent(2, scale=(0.5, 0.9))], renormalize=True)


@torch.no_grad()
def test_a_common_factor_between_normalisers_is_exact() -> None:
    """On Gaussian data the field is known in both coordinates: the composition must see the same actions."""
    both = compose([parent(1, scale=(0.5, 0.4)), parent(2, scale=(0.75, 0.6))], weights=[0, 1], renormalize=True)
    own = both.policies[1]

    def truth(x: torch.Tensor, t: torch.Tensor, ctx: torch.Tensor) -> Any:  # actions N(1, 2^2) m in the parent's coordinates
        a, b = (broadcast_time(c, x) for c in own.path.coefficients(t))
        scale, offset = own.normalizer("action").scale, own.normalizer("action").offset
        mean, s = scale * 1 + offset, scale * 2
        slope = a * s**2 / (a**2 * s**2 + b**2)
        x0 = mean + slope * (x - a * mean)
        return type(seen)(x0, (x - a * x0) / b)

    seen = both.each(torch.randn(3, 6, 2), torch.full((3,), 0.5), both.encode(both.observe(observations())))[1]
    mixture = both._mixture.fields[1]
    mixture.field.field = truth  # type: ignore[attr-defined]
    scale, offset = both.normalizer("action").scale, both.normalizer("action").offset
    x, t = torch.randn(3, 6, 2), torch.tensor([0.2, 0.5, 0.8])
    found = mixture(x, t, both.encode(both.observe(observations())))
    a, b = (broadcast_time(c, x) for c in both.path.coefficients(t))
    mean, s = scale * 1 + offset, scale * 2
    want = mean + a * s**2 / (a**2 * s**2 + b**2) * (x - a * mean)
    torch.testing.assert_close(found.x0, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.eps, (x - a * want) / b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scales_by_row_go_with_the_longest_parent() -> None:
    def by_row(seed: int, horizon: int, first: float) -> Policy:
        made = parent(seed, horizon=horizon)
        scale = torch.linspace(first, first + 0.01 * (horizon - 1), horizon).repeat_interleave(2)
        config = parse(PolicyConfig, {**made.config.model_dump(mode="json"), "normalize_per_step": True})
        normalizers = {"position": made.normalizer("position"), "action": Normalizer(2 * horizon, "meanstd")}
        normalizers["action"].scale.copy_(scale)
        return Policy(config, made.observation_features, ACTION, normalizers).eval()

    long, short = by_row(1, 9, 0.5), by_row(2, 6, 0.5)
    both = compose([short, long])
    assert both.reference == 1
    assert act(both).shape == (3, 3, 2)
    with pytest.raises(ConfigError, match="renormalize"):
        compose([long, by_row(2, 6, 0.52)])
    assert np.isfinite(act(compose([parent(3, scale=(0.5, 0.5), horizon=6), long], renormalize=True))).all()


# ---- saving ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["convex", "product", "guidance", "and", "or"])
def test_a_saved_composition_is_the_same_one(rule: str, tmp_path: Path) -> None:
    both = compose([A, B], rule=rule)  # type: ignore[arg-type]
    nested = compose([compose([A, B]), parent(3)], weights=[0.6, 0.4])
    for index, policy in enumerate((both, nested)):
        loaded = load_policy(policy.save(tmp_path / str(index)))
        assert isinstance(loaded, Composed)
        assert np.array_equal(act(loaded), act(policy))
        assert loaded.document() == policy.document()


def test_settings_vary_and_the_weights_stay() -> None:
    both = compose([A, B])
    longer = both.varied(sampler={**both.config.sampler, "num_steps": 9}, weights=[0.9, 0.1])
    assert longer.sampler.num_steps(longer.path) == 9
    assert longer.config.weights == (0.9, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(longer.state_dict().values(), both.state_dict().values(), strict=True))
    tuned = both.varied(frozen_above=0.5)
    early, x = torch.full((3,), 0.8), torch.randn(3, 6, 2)
    ctx = tuned.encode(tuned.observe(observations()))
    before = tuned.field(x, early, ctx).x0
    with torch.no_grad():
        for parameter in tuned.net.parameters():
            parameter.add_(0.1)
    assert torch.equal(tuned.field(x, early, ctx).x0, before)
    assert not torch.allclose(tuned.field(x, early - 0.5, ctx).x0, both.field(x, early - 0.5, ctx).x0)
    again = tuned.varied(sampler={"type": "ddim", "num_steps": 4, "clip": None})
    assert torch.equal(again.field(x, early, ctx).x0, before)
    with pytest.raises(ConfigError, match="frozen_above"):
        tuned.varied(frozen_above=None)
    with pytest.raises(ConfigError, match="way of sampling"):
        compose([A, B], rule="and").varied(sampler={"type": "ddim"})


def test_a_copy_is_independent() -> None:
    both = compose([A, B])
    other = copy.deepcopy(both)
    with torch.no_grad():
        for parameter in other.net.parameters():
            parameter.add_(0.1)
    assert not np.allclose(act(other), act(both))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": []}, "compose two or more"),
        ({"parents": None}, "policy.json"),
        ({"config": {"rule": "convx"}}, "rule"),
        ({"config": {"weights": [0.5]}}, "1 weights for 2"),
        ({"config": {"weights": [0.7, 0.7]}}, "sum 1"),
    ],
)
def test_garbled_documents_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = compose([A, B]).save(tmp_path)
    document = json.loads((folder / "policy.json").read_text())
    for key, value in change.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    (folder / "policy.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        load_policy(folder)


# ---- what does not fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parents", "settings", "message"),
    [
        ([A], {}, "at least two"),
        ([A, B], {"weights": [0.5, 0.6]}, "sum 1"),
        ([A, B], {"weights": [1.5, -0.5]}, "sum 1"),
        ([A, B], {"weights": [1.0]}, "1 weights for 2"),
        ([A, B], {"rule": "guidance", "weights": [1.5, 0.5]}, "1 - scale"),
        ([A, B], {"rule": "guidance", "weights": [-0.5, 1.5]}, "not negative"),
        ([A, B, A], {"rule": "guidance", "weights": [2, -0.5, -0.5]}, "takes two policies"),
        ([A, parent(2, horizon=8)], {"rule": "guidance"}, "same horizon"),
        ([A, B], {"rule": "product", "weights": [0, 0]}, "not all 0"),
        ([A, B], {"rule": "product", "weights": [-1, 2]}, r"weights \[-1.0, 2.0\]: rule product needs exponents"),
        ([compose([A, B], rule="and"), B], {}, "parent 0 is a composition by rule 'and'.*compose its parents"),
        ([A, compose([A, B], rule="or")], {"rule": "and"}, "parent 1 is a composition by rule 'or'"),
        ([A, B], {"rule": "and", "sampler": {"type": "ddim"}}, "way of sampling"),
        ([A, B], {"sampler": {"type": SUPERPOSE, "mode": "or"}}, "belongs to rule"),
        ([A, B], {"sampler": {"type": "jump"}}, "has no way"),
        ([A, B], {"horizon": 4}, "horizon"),
        ([A, B], {"n_action_steps": 7}, "exceeds horizon"),
        (
            [A, parent(2, (Feature("position", (2,), unit="mm"),))],
            {},
            r"observation 'position' is float32 \[2\] in m to one parent and float32 \[2\] in mm to parent 1; rename",
        ),
        ([A, parent(2, action={"type": "relative", "reference": ["position"]})], {}, "representation"),
    ],
)
def test_what_does_not_fit_is_said(parents: list[Policy], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(parents, **settings)


# ---- predicted weights -----------------------------------------------------------------------------------------------------


def test_stacking_weights_are_those_of_the_formula_and_stay_within_the_simplex() -> None:
    m = np.array([[2.0, 0.5], [0.5, 1.0]])
    first = (m[1, 1] - m[0, 1]) / (m[0, 0] + m[1, 1] - 2 * m[0, 1])
    assert stacking_weights(m) == pytest.approx([first, 1 - first], abs=1e-6)
    assert stacking_weights(m + 100) == pytest.approx([first, 1 - first], abs=1e-4)  # what nobody can predict cancels
    assert stacking_weights(np.array([[5.0, 1.2], [1.2, 1.0]])) == pytest.approx([0, 1], abs=1e-6)
    assert stacking_weights(np.diag([1.0, 2.0, 4.0])) == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=1e-6)
    assert sum(stacking_weights(np.zeros((2, 2)))) == pytest.approx(1)


class Held:
    """Windows of demonstrations, as `Windows` gives them."""

    def __len__(self) -> int:
        return 40

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        obs = observations(len(indices))
        pad = np.zeros((len(indices), 6), bool)
        pad[0, 3:] = True
        return {"obs": obs, "action": np.full((len(indices), 6, 2), 0.3, np.float32), "action_is_pad": pad}


def test_the_parent_that_knows_is_predicted_to_deserve_the_weight() -> None:
    both = compose([A, B])
    fields = both._mixture.fields
    target = both.encode_actions(torch.full((1, 6, 2), 0.3), both.observe(observations(1)))

    def knows(x: torch.Tensor, t: torch.Tensor, ctx: torch.Tensor) -> Any:
        a, b = (broadcast_time(c, x) for c in both.path.coefficients(t))
        return type(both.field(x, t, ctx))(target.expand_as(x), (x - a * target) / b)

    plain = predict_weights(both, Held(), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert sum(plain.weights) == pytest.approx(1)
    assert [level.noise_level for level in plain.levels] == sorted((lv.noise_level for lv in plain.levels), reverse=True)
    json.dumps(plain.to_json())
    fields[1] = knows
    sure = predict_weights(both, Held(), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert sure.weights[1] > 0.99
    assert sure.errors[1, 1] < 1e-6
