"""Composed fields (card 0.6, T6)."""

import pytest
import torch

from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Convex, Leaf
from robopolicy.generative.path import LinearFlow, VPCosine
from robopolicy.generative.sampler import DDIM, Euler

LINEAR = [torch.nn.Linear(3, 3) for _ in range(2)]
PARENTS = {"flow": LinearFlow(), "vp": VPCosine()}


def leaf(index: int, name: str) -> Leaf:
    return Leaf(lambda x, t, ctx: LINEAR[index](x) + t[:, None, None], PARENTS[name], "flow" if name == "flow" else "v")


@torch.no_grad()
def chunk(field: object, name: str) -> torch.Tensor:
    sampler = Euler() if name == "flow" else DDIM(DDIM.Config(eta=1.0, clip=None))
    noise = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return sampler.sample(field, torch.zeros(4, 1), noise, path=PARENTS[name], generator=generator).x0  # type: ignore[arg-type]


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


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.6], [1.5, -0.5], []])
def test_weights_that_are_no_mean_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        Convex([leaf(0, "flow"), leaf(1, "flow")], weights)
