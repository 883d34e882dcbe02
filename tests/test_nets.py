"""Denoising networks: shapes, times per row, the published U-Net's function, and convolutions by another road."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robopolicy.config import component, full
from robopolicy.errors import ConfigError
from robopolicy.nets.embedding import sinusoidal
from robopolicy.nets.registry import NETS
from robopolicy.nets.unet1d import Conv, ConvUp, Norm, UNet1d

SMALL: list[dict[str, Any]] = [
    {"type": "mlp", "width": 32, "depth": 2, "time_dim": 16},
    {"type": "unet1d", "down_dims": [16, 32, 64], "time_dim": 16},
    {"type": "unet1d", "down_dims": [16], "time_dim": 16, "kernel_size": 3, "activation": "mish"},
    {"type": "dit", "width": 32, "depth": 2, "heads": 4, "time_dim": 16, "activation": "gelu"},
]
B, H, A, C = 3, 8, 2, 5


def ids(value: dict[str, Any]) -> str:
    return f"{value['type']}-{len(value)}"


def build(settings: dict[str, Any] | str, horizon: int = H, ctx_dim: int = C) -> nn.Module:
    cls, config = component("net", settings, NETS)
    torch.manual_seed(0)  # initial weights only
    net: nn.Module = cls(config, action_dim=A, horizon=horizon, ctx_dim=ctx_dim)
    return net


def inputs(batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, H, A, generator=g), torch.rand(batch, generator=g) * 100, torch.randn(batch, C, generator=g)


def shake(net: nn.Module) -> nn.Module:
    """Random weights everywhere, so that layers which start at zero take part."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return net


@pytest.mark.parametrize("settings", SMALL, ids=ids)
def test_equal_times_in_all_rows_are_one_time_per_chunk(settings: dict[str, Any]) -> None:
    net = shake(build(settings)).double()
    x, t, ctx = (value.double() for value in inputs())
    shared = net(x, t, ctx)
    assert shared.shape == (B, H, A)
    torch.testing.assert_close(net(x, t[:, None].expand(B, H), ctx), shared, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", SMALL, ids=ids)
def test_each_rows_own_time_the_context_and_every_row_are_felt(settings: dict[str, Any]) -> None:
    net = shake(build(settings))
    x, t, ctx = inputs()
    rows = t[:, None].repeat(1, H)
    plain = net(x, rows, ctx)
    for row in (0, 3, H - 1):
        later = rows.clone()
        later[:, row] += 20
        assert (net(x, later, ctx) - plain)[:, row].abs().max() > 1e-4
        moved = x.clone()
        moved[:, row] += 0.5
        assert (net(moved, rows, ctx) - plain)[:, row].abs().max() > 1e-4
    # Which row has which time matters, not only how many have it.
    a, b = rows.clone(), rows.clone()
    a[:, 1] += 30
    b[:, H - 2] += 30
    assert (net(x, a, ctx) - net(x, b, ctx)).abs().max() > 1e-4
    assert (net(x, t, ctx + 1) - net(x, t, ctx)).abs().max() > 1e-4


@pytest.mark.parametrize("settings", SMALL, ids=ids)
def test_rows_of_the_batch_do_not_mix(settings: dict[str, Any]) -> None:
    net = shake(build(settings)).double()
    x, t, ctx = (value.double() for value in inputs(4))
    torch.testing.assert_close(net(x[1:2], t[1:2], ctx[1:2]), net(x, t, ctx)[1:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", SMALL, ids=ids)
def test_every_parameter_learns(settings: dict[str, Any]) -> None:
    net = shake(build(settings))
    net(*inputs()).square().sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
        assert parameter.is_contiguous(), key  # safetensors stores contiguous tensors only


@pytest.mark.parametrize("settings", SMALL, ids=ids)
def test_bf16_autocast_stays_close(settings: dict[str, Any]) -> None:
    net = build(settings)
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
    exact = net(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(*inputs())
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        ({"type": "mlp", "preset": "tiny"}, 0.38),
        ({"type": "unet1d", "preset": "tiny"}, 0.32),
        ({"type": "unet1d", "preset": "small"}, 1.2),
        ({"type": "unet1d", "preset": "base"}, 4.6),
        ({"type": "dit", "preset": "tiny"}, 0.41),
        ({"type": "dit", "preset": "small"}, 1.6),
        ({"type": "dit", "preset": "base"}, 7.4),
    ],
    ids=str,
)
def test_presets_have_the_size_they_say(settings: dict[str, Any], millions: float) -> None:
    count = sum(p.numel() for p in build(settings, horizon=16, ctx_dim=40).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


def test_preset_is_expanded_and_its_values_can_be_overridden() -> None:
    value = {"type": "unet1d", "preset": "published", "activation": "silu"}
    _, config = component("net", value, NETS)
    assert full(value, config) == {
        "type": "unet1d",
        "down_dims": [256, 512, 1024],
        "time_dim": 256,
        "kernel_size": 5,
        "groups": 8,
        "activation": "silu",
    }
    with pytest.raises(ConfigError, match="unknown preset 'publshed': did you mean 'published'"):
        component("net", {"type": "unet1d", "preset": "publshed"}, NETS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "unet1d", "down_dims": [12]}, "not positive multiples of groups 8"),
        ({"type": "unet1d", "kernel_size": 4}, "kernel_size 4 is even"),
        ({"type": "dit", "width": 30, "heads": 4}, "width 30 is not a multiple of heads 4"),
        ({"type": "mlp", "activation": "relu"}, "activation"),
        ({"type": "mlp", "widht": 8}, "did you mean 'width'"),
        ({"type": "mpl"}, "did you mean 'mlp'"),
    ],
    ids=str,
)
def test_configurations_name_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(settings)


def test_horizon_that_cannot_be_halved_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="horizon 10 is not a multiple of 4"):
        build({"type": "unet1d", "down_dims": [16, 32, 64]}, horizon=10)


# --- the U-Net's own layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 200])  # few rows take the matrix product, many the convolution
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0)])
def test_convolution_on_rows_is_torchs_with_its_gradients(batch: int, kernel: int, stride: int, padding: int) -> None:
    check_layer(lambda cls: cls(6, 12, kernel, stride=stride, padding=padding), Conv, nn.Conv1d, batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_transposed_convolution_on_rows_is_torchs_with_its_gradients(batch: int) -> None:
    check_layer(lambda cls: cls(6, 5, 4, stride=2, padding=1), ConvUp, nn.ConvTranspose1d, batch)


def test_group_norm_on_rows_is_torchs_with_its_gradients() -> None:
    check_layer(lambda cls: cls(3, 6), Norm, nn.GroupNorm, 3)


def check_layer(make: Callable[[Any], nn.Module], ours: type[nn.Module], torchs: type[nn.Module], batch: int) -> None:
    mine, reference = make(ours).double(), make(torchs).double()
    mine.load_state_dict(reference.state_dict())
    x = torch.randn(batch, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, expected = mine(x.requires_grad_()), reference(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((y * weights).sum(), [x, *net.parameters()]) for y, net in ((found, mine), (expected, reference))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_sinusoidal_embedding_has_the_documented_frequencies() -> None:
    found = sinusoidal(torch.tensor([[3.0, 50.0]]), 8)
    frequency = torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])
    torch.testing.assert_close(found[0, 1], torch.cat([(50 * frequency).sin(), (50 * frequency).cos()]), rtol=1e-4, atol=1e-6)
    assert found.shape == (1, 2, 8)


# --- the published network -----------------------------------------------------------------------------------------------------

# Rows 0, 1, 7, 15 of the output of lerobot 0.4.4's DiffusionConditionalUnet1d (down_dims 256, 512, 1024; step embedding 256;
# 8 groups; kernel 5; FiLM with scale; context 40) for the weights and inputs below, float32 on a CPU. Ours matched it there to
# 1.8e-6, its gradients to 1.6e-6 of the largest.
PUBLISHED = [
    [1.175586, 0.181231, 0.633059, 0.541553, 1.746731, -0.877939, 0.907766, -0.744222],
    [0.577442, -0.189216, 0.29392, -0.189799, 1.114252, -0.506046, 0.787958, -0.726147],
    [1.756719, -0.169268, 0.717744, 0.174434, 2.357749, -1.618415, 0.937155, -0.740217],
    [1.404687, -0.24195, 0.520225, -0.333479, 1.509751, -0.289493, 1.154687, -0.353403],
]


def wave(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * 0.7 + len(shape)).sin().view(shape).float()


def test_published_preset_computes_the_published_function() -> None:
    with torch.device("meta"):  # skips the random initialisation of 65.8 M weights
        net = UNet1d(UNet1d.Config.model_validate({"preset": "published"}), action_dim=2, horizon=16, ctx_dim=40)
    assert sum(p.numel() for p in net.parameters()) == 65_783_298
    net.to_empty(device="cpu")
    # Entry j of parameter i: a number in [-0.5, 0.5) from exact integer arithmetic, periodic in j; scaled to keep variances.
    j = torch.arange(65537)
    with torch.no_grad():
        for i, (key, parameter) in enumerate(net.named_parameters()):
            value = ((31 * j * j + 17 * j + 1009 * i) % 65537).double() / 65537 - 0.5
            if parameter.ndim > 1:
                value *= (12 / parameter[0].numel()) ** 0.5
            else:
                value = 0.2 * value + (1.0 if key.endswith("norm.weight") else 0.0)
            count = parameter.numel()
            parameter.copy_(value.float().repeat(-(-count // 65537))[:count].view_as(parameter))
        found = net(wave(4, 16, 2), torch.tensor([0.0, 7.0, 50.0, 99.0]), wave(4, 40))
    torch.testing.assert_close(found[:, [0, 1, 7, 15]].flatten(1), torch.tensor(PUBLISHED), rtol=0, atol=1e-5)
    assert found.double().sum().item() == pytest.approx(61.518458, abs=1e-4)
