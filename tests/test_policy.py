"""Policies: what they return, what they refuse, and that a saved one is the same one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.errors import CheckpointError, ConfigError, DataError
from robopolicy.features import Feature
from robopolicy.policy import Policy, PolicyConfig, load_policy, normalizer_modes, read_provenance

OBSERVATIONS = {
    "position": Feature("position", (2,), unit="m"),
    "speed": Feature("speed", (2,), unit="m/s"),
    "camera": Feature("camera", (16, 16, 3), "uint8"),
}
ACTION = Feature("action", (2,), unit="m", names=("x", "y"))


def policy(seed: int = 0, **changes: Any) -> Policy:
    value = {
        "horizon": 8,
        "n_action_steps": 4,
        "net": {"type": "mlp", "width": 16, "depth": 1},
        "encoder": {"type": "multimodal", "rgb": {"widths": [16]}},
    }
    config = parse(PolicyConfig, {**value, **changes})
    rng = np.random.default_rng(seed)
    rows = config.horizon if config.normalize_per_step else 1
    normalizers = {name: Normalizer.fit(rng.normal(1, 3, size=(50, 2))) for name in ("position", "speed")}
    normalizers["action"] = Normalizer.fit(rng.normal(2, 5, size=(50, 2 * rows)), "meanstd")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = Policy(config, OBSERVATIONS, ACTION, normalizers)
        for parameter in made.parameters():  # networks start at zero output, which would hide errors
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def observations(batch: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "position": rng.normal(size=(batch, 2, 2)).astype(np.float32),
        "speed": rng.normal(size=(batch, 2, 2)).astype(np.float32),
        "camera": rng.integers(0, 255, (batch, 2, 16, 16, 3), dtype=np.uint8),
    }


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_actions_have_the_declared_shape_and_follow_the_generator() -> None:
    made, obs = policy(), observations()
    actions = made.act(obs, generators(1, 2, 3))
    assert actions.shape == (3, 4, 2)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions, made.act(obs, generators(1, 2, 3)))
    assert np.abs(actions - made.act(obs, generators(4, 5, 6))).min() > 0


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    made, obs = policy(), observations()
    together = made.act(obs, generators(1, 2, 3))
    alone = made.act({name: value[1:2] for name, value in obs.items()}, generators(2))
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("camera", [0, 1])
def test_every_observation_matters(camera: int) -> None:
    made, obs = policy(), observations()
    before = made.act(obs, generators(1, 2, 3))
    for name in obs:
        changed = {**obs, name: obs[name].copy()}
        changed[name][:, camera] = changed[name][:, camera][:, ::-1] * 0 + (200 if name == "camera" else 5)
        assert np.abs(made.act(changed, generators(1, 2, 3)) - before).max() > 1e-4, name


def test_relative_actions_move_with_their_reference() -> None:
    made = policy(action={"type": "relative", "reference": ["position"]}, normalize_per_step=True)
    with torch.no_grad():  # the network ignores the observations; only the transform sees them
        for parameter in made.net.parameters():
            parameter.zero_()
    obs = observations()
    shifted = {**obs, "position": obs["position"] + np.float32(10)}
    difference = made.act(shifted, generators(1, 2, 3)) - made.act(obs, generators(1, 2, 3))
    np.testing.assert_allclose(difference, 10, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda obs: obs.pop("speed"), "observation 'speed' is missing"),
        (lambda obs: obs.update(speed=obs["speed"][:, :1]), r"observation 'speed' has shape \(3, 1, 2\)"),
        (lambda obs: obs.update(camera=obs["camera"][..., :1]), "observation 'camera' has shape"),
        (lambda obs: obs["speed"].__setitem__((1, 0, 1), np.nan), "observation 'speed' holds NaN or infinity"),
        (lambda obs: obs.update(speed=obs["speed"][:2]), "'speed' is of a batch of 2, 'position' of 3"),
        (lambda obs: obs["speed"].__setitem__((1, 0, 1), 3e38), r"answers row 1 .* NaN or infinity.* 3e\+38 in 'speed'"),
    ],
)
def test_observations_that_do_not_fit_are_refused(change: Callable[[dict], Any], expected: str) -> None:
    obs = observations()
    change(obs)
    with pytest.raises(DataError, match=expected):
        policy().act(obs, generators(1, 2, 3))


def test_rotations_keep_their_range_unless_named() -> None:
    features = {"tilt": Feature("tilt", (6,), unit="rot6d"), "place": Feature("place", (3,), unit="m")}
    assert normalizer_modes(PolicyConfig(), features) == {"tilt": "identity", "place": "minmax", "action": "minmax"}
    named = PolicyConfig(normalize={"tilt": "meanstd"})
    assert normalizer_modes(named, features)["tilt"] == "meanstd"
    with pytest.raises(ConfigError, match="no vector observation 'tlit'; did you mean 'tilt'"):
        normalizer_modes(PolicyConfig(normalize={"tlit": "meanstd"}), features)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="exceeds horizon 8"):
        policy(n_action_steps=8)
    with pytest.raises(ConfigError, match="set clip: null"):
        policy(sampler={"type": "ddim"}, normalize={"action": "meanstd"})
    eps = {"path": {"type": "vp_cosine"}, "prediction": "eps", "normalize": {"action": "meanstd"}}
    with pytest.raises(ConfigError, match=r"set clip: 3 or more \(eps needs a bound\)"):
        policy(sampler={"type": "ddim"}, **eps)
    policy(sampler={"type": "ddim", "clip": 3.0}, **eps)
    with pytest.raises(ConfigError, match="reference 'elbow' is not observed"):
        policy(action={"type": "relative", "reference": ["elbow"]})
    with pytest.raises(DataError, match="no normaliser for speed"):
        Policy(policy().config, OBSERVATIONS, ACTION, {n: Normalizer(2) for n in ("position", "action")})
    with pytest.raises(DataError, match="a policy commands a vector"):
        Policy(policy().config, OBSERVATIONS, Feature("action", (2, 2)), {})


def test_a_saved_policy_acts_alike(tmp_path: Path) -> None:
    made, obs = policy(), observations()
    made.save(tmp_path / "saved", {"task": {"name": "toy"}})
    loaded = load_policy(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.act(obs, generators(1, 2, 3)), made.act(obs, generators(1, 2, 3)))
    assert loaded.observation_features == OBSERVATIONS
    assert loaded.action_feature == ACTION
    assert read_provenance(tmp_path / "saved") == {"task": {"name": "toy"}}
    assert not loaded.training


DOCUMENT_DAMAGE: dict[str, tuple[Callable[[dict], Any], str]] = {
    "newer format": (lambda d: d.update(format=99), "Update robopolicy"),
    "no format": (lambda d: d.pop("format"), "has format None"),
    "no config": (lambda d: d.pop("config"), "'config'"),
    "unknown key": (lambda d: d["config"].update(horizn=3), "did you mean 'horizon'"),
    "wrong type": (lambda d: d["config"].update(horizon="long"), "key 'horizon'"),
    "unknown network": (lambda d: d["config"]["net"].update(type="mpl"), "did you mean 'mlp'"),
    "network that is no class": (lambda d: d["config"]["net"].update(type="os:system"), "no nested Config"),
    "network of another size": (lambda d: d["config"]["net"].update(width=32), "do not fit"),
    "no observations": (lambda d: d.pop("observations"), "'observations'"),
    "observations are a list": (lambda d: d.update(observations=["a"]), "garbles"),
    "foreign declaration": (lambda d: d["observations"]["speed"].update(units="m/s"), "feature 'speed'"),
    "action without a name": (lambda d: d["action"].pop("name"), "'name'"),
    "action of another size": (lambda d: d["action"].update(shape=[3], names=[]), "do not fit"),
    "unknown normaliser": (lambda d: d["config"].update(default_normalize="minimax"), "key 'default_normalize'"),
}


@pytest.mark.parametrize("damage", DOCUMENT_DAMAGE)
def test_a_policy_document_that_was_tampered_with_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    policy().save(tmp_path)
    change, expected = DOCUMENT_DAMAGE[damage]
    document = json.loads((tmp_path / "policy.json").read_text())
    change(document)
    (tmp_path / "policy.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        load_policy(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["observation.state", "keys"])
def test_observation_names_that_modules_cannot_have_are_explained(name: str) -> None:
    with pytest.raises(DataError, match=r"rename it in data\.features"):
        Policy(parse(PolicyConfig, {}), {name: Feature(name, (2,))}, ACTION, {})
