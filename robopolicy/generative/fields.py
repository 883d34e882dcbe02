"""Fields: anything that sees a clean chunk and a noise in a noisy chunk. A network is one; expressions of networks are others."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from robopolicy.generative.path import Kind, Path, Pred


class Denoiser(Protocol):
    """A network: ``(x [B, H, A], time [B] or [B, H], ctx [B, C]) -> [B, H, A]``; :meth:`Path.net_input` makes its inputs."""

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Tensor: ...


class Field(Protocol):
    """``(x [B, H, A], t [B] or [B, H], ctx) -> Pred``: the state is on the path that the field belongs to."""

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred: ...


class Leaf:
    """A network as a field.

    Args:
        net: The network.
        path: The path on which it was trained.
        kind: What it predicts.
    """

    def __init__(self, net: Denoiser, path: Path, kind: Kind) -> None:
        self.net = net
        self.path = path
        self.kind: Kind = kind

    def __call__(self, x: Tensor, t: Tensor, ctx: Tensor, /) -> Pred:
        x_in, t_in = self.path.net_input(x, t)
        y = self.net(x_in, t_in, ctx)
        return self.path.predict(x, t, y.to(x.dtype), self.kind)
