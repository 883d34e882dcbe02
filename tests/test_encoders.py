"""Observation encoders: what they concatenate, where they crop, and that they see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robopolicy.config import component
from robopolicy.errors import ConfigError
from robopolicy.features import Feature
from robopolicy.nets.encoders.rgb import RGBBranch, RGBConfig, crop_window, spatial_softmax
from robopolicy.nets.registry import ENCODERS

POS = Feature("agent_pos", (2,))
FORCE = Feature("force", (2, 3))
CAMERA = Feature("camera", (24, 32, 3), "uint8")
DEPTH = Feature("wrist", (20, 20, 1), "uint8")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(value: dict[str, Any] | str, *features: Feature, n_obs_steps: int = 2) -> Any:
    cls, config = component("encoder", value, ENCODERS)
    torch.manual_seed(0)  # initial weights only
    return cls(config, features={f.name: f for f in features}, n_obs_steps=n_obs_steps)


def observe(*features: Feature, batch: int = 3, n_obs_steps: int = 2) -> dict[str, Tensor]:
    g, obs = seeded(1), {}
    for f in features:
        shape = (batch, n_obs_steps, *f.shape)
        obs[f.name] = (
            torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) if f.is_image else torch.randn(shape, generator=g)
        )
    return obs


def test_state_is_the_window_of_all_features_side_by_side() -> None:
    encoder, obs = build("state", POS, FORCE), observe(POS, FORCE)
    assert encoder.ctx_dim == 2 * 2 + 2 * 6
    expected = torch.cat([obs["agent_pos"].reshape(3, 4), obs["force"].reshape(3, 12)], dim=1)
    assert torch.equal(encoder(obs), expected)


def test_state_mlp_ends_linear_at_the_declared_width() -> None:
    encoder, obs = build({"type": "state", "hidden": [8, 5]}, POS), observe(POS)
    assert encoder.ctx_dim == 5
    assert encoder(obs).shape == (3, 5)
    assert isinstance(encoder.mlp[-1], nn.Linear)


def test_images_and_vectors_are_mixed_in_any_combination() -> None:
    rgb = {"widths": [16], "dim": 6, "keypoints": 4}
    for features, width in (((POS,), 4), ((CAMERA,), 12), ((CAMERA, POS), 16), ((POS, CAMERA, DEPTH, FORCE), 40)):
        encoder = build({"type": "multimodal", "rgb": rgb}, *features)
        out = encoder(observe(*features))
        assert encoder.ctx_dim == width
        assert out.shape == (3, width)
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()


def test_frames_of_a_window_are_encoded_one_by_one_in_order() -> None:
    encoder = build("multimodal", CAMERA).eval()
    obs = observe(CAMERA)
    swapped = {"camera": obs["camera"].flip(1)}
    a, b = encoder(obs).unflatten(1, (2, -1)), encoder(swapped).unflatten(1, (2, -1))
    torch.testing.assert_close(a.flip(1), b, rtol=1e-4, atol=1e-5)
    assert (a[:, 0] - a[:, 1]).abs().max() > 1e-4


def test_crops_are_random_in_training_and_central_in_evaluation() -> None:
    branch = RGBBranch(RGBConfig(crop=0.5), CAMERA, 2)
    assert branch.crop == (12, 16)
    images = observe(CAMERA, batch=64)["camera"]
    centre = images[:, :, 6:18, 8:24]
    assert torch.equal(branch.eval()._crop(images, None), centre)
    branch.train()
    crops = branch._crop(images, seeded(5))
    assert crops.shape == centre.shape
    assert torch.equal(crops, branch._crop(images, seeded(5)))
    assert not torch.equal(crops, branch._crop(images, seeded(6)))
    places = set()
    for sample, crop in zip(images, crops, strict=True):
        # Every crop is a window of its own image, at the same place in all frames of the observation window.
        found = [(y, x) for y in range(13) for x in range(17) if torch.equal(sample[:, y : y + 12, x : x + 16], crop)]
        assert len(found) == 1
        places.add(found[0])
    rows, columns = zip(*places, strict=True)
    assert len(places) > 40
    assert min(rows) <= 1
    assert max(rows) >= 11
    assert min(columns) <= 1
    assert max(columns) >= 15


def test_crop_window_reaches_both_corners() -> None:
    images = observe(CAMERA, batch=2)["camera"]
    found = crop_window(images, 20, 30, torch.tensor([0, 4]), torch.tensor([0, 2]))
    assert torch.equal(found[0], images[0, :, :20, :30])
    assert torch.equal(found[1], images[1, :, 4:, 2:])


def test_whole_image_is_kept_when_nothing_is_cropped() -> None:
    branch = RGBBranch(RGBConfig(crop=1.0), CAMERA, 2).train()
    images = observe(CAMERA)["camera"]
    assert torch.equal(branch._crop(images, seeded()), images)


def test_spatial_softmax_finds_where_the_peak_is() -> None:
    logits = torch.zeros(1, 3, 5, 9)
    logits[0, 0, 0, 0] = logits[0, 1, 4, 8] = logits[0, 2, 2, 6] = 100
    torch.testing.assert_close(spatial_softmax(logits), torch.tensor([[-1.0, 1.0, 0.5, -1.0, 1.0, 0.0]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(spatial_softmax(torch.zeros(2, 1, 4, 6)), torch.zeros(2, 2), rtol=0, atol=1e-6)


def test_every_parameter_learns_and_is_stored_contiguously() -> None:
    encoder = build({"type": "multimodal", "state": {"hidden": [4]}}, POS, CAMERA)
    encoder(observe(POS, CAMERA)).square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
        assert parameter.is_contiguous(), key


def test_encoder_learns_to_see_where_a_square_is() -> None:
    """Regression of the position of a bright square from pixels: the point of the whole branch."""
    camera = Feature("camera", (32, 32, 3), "uint8")
    encoder = build({"type": "multimodal", "rgb": {"crop": 1.0, "widths": [16], "keypoints": 8, "dim": 2}}, camera, n_obs_steps=1)
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
    g = seeded(2)
    for _ in range(60):
        corner = torch.randint(0, 26, (32, 2), generator=g)
        images = torch.randint(0, 60, (32, 1, 32, 32, 3), generator=g, dtype=torch.uint8)
        for image, (y, x) in zip(images, corner.tolist(), strict=True):
            image[0, y : y + 6, x : x + 6] = 250
        loss = (encoder({"camera": images}) - (corner / 12.5 - 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.03  # blind: 0.36


def test_resnet18_preset_has_its_size() -> None:
    branch = RGBBranch(RGBConfig.model_validate({"preset": "resnet18", "dim": 64}), Feature("image", (96, 96, 3), "uint8"), 2)
    body = sum(p.numel() for module in (branch.stem, branch.stages) for p in module.parameters())
    assert body == 11_176_512  # torchvision's resnet18 without its classifier; group norms have as many weights as batch norms


@pytest.mark.parametrize(
    ("value", "features", "message"),
    [
        ("state", (POS, CAMERA), "camera are images; use encoder 'multimodal'"),
        ("multimodal", (), "declare at least one observation"),
        (
            {"type": "multimodal", "rgb": {"widths": [10]}},
            (CAMERA,),
            r"widths \[10\] are not positive multiples of group_width 16",
        ),
        ({"type": "multimodal", "rgb": {"crop": 1.5}}, (CAMERA,), "rgb.crop"),
        ({"type": "multimodal", "rgb": {"keypoint": 5}}, (CAMERA,), "did you mean 'keypoints'"),
        ({"type": "state", "hidden": [0]}, (POS,), "must be positive"),
        ("multimodl", (POS,), "did you mean 'multimodal'"),
    ],
    ids=str,
)
def test_configurations_name_what_is_wrong(value: Any, features: tuple[Feature, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(value, *features)
