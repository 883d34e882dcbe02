"""The weights that held-out demonstrations predict, without a single roll-out: stacking the parents' errors.

Parent ``i`` predicts the noise ``eps`` of a noisy demonstration with error ``e_i``. With ``M_ij = E <e_i, e_j>`` a mean with
weights ``w`` has the squared error ``w' M w``; for two parents it is least at ``w_1 = (M_22 - M_12) / (M_11 + M_22 - 2 M_12)``,
cut to [0, 1]. What nobody can predict enters every ``M_ij`` alike and cancels. The demonstrations must be new to the parents: on
those they were trained on, the one that learnt them by heart wins. Least error is not most success: take it as where to search.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from robopolicy.compose.policy import Composed
from robopolicy.data.windows import Windows
from robopolicy.generative.sampler import randn


class Level(NamedTuple):
    """Errors at one time of the sampler's walk."""

    noise_level: float
    errors: np.ndarray  # M, [parents, parents], per entry of the chunk
    weights: list[float]


class Prediction(NamedTuple):
    """Attributes:
    weights: Those of least error over all levels, each counted as often as the sampler stops there.
    errors: ``M`` of all levels together.
    levels: The same for each level, noisiest first.
    windows: Demonstrated chunks that were used.
    """

    weights: list[float]
    errors: np.ndarray
    levels: list[Level]
    windows: int

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "errors": self.errors.tolist(),
            "windows": self.windows,
            "levels": [
                {"noise_level": level.noise_level, "weights": level.weights, "errors": level.errors.tolist()}
                for level in self.levels
            ],
        }


@torch.no_grad()
def predict_weights(policy: Composed, windows: Windows, generator: torch.Generator, num_windows: int = 4096) -> Prediction:
    """Predict weights for a composition from demonstrations that none of its parents was trained on.

    Args:
        policy: Composition of the parents, by whatever rule and weights; its path and its sampler's times are used.
        windows: Windows of demonstrations with the composition's lengths and observations.
        generator: Chooses windows and draws noise.
        num_windows: How many, at most.
    """
    chosen = torch.randperm(len(windows), generator=generator)[:num_windows].sort().values.numpy()
    times = [t for t in policy.sampler.times(policy.path) if 0 < t < 1]  # at 1 there is nothing to see, at 0 nothing to say
    sums = np.zeros((len(times), len(policy.policies), len(policy.policies)))
    entries = 0.0
    for start in range(0, len(chosen), 512):
        batch = windows.batch(chosen[start : start + 512])
        obs = policy.observe(batch["obs"])
        x0 = policy.encode_actions(torch.as_tensor(batch["action"], device=policy.device), obs)
        ctx = policy.encode(obs)
        keep = (~torch.as_tensor(batch["action_is_pad"], device=policy.device))[None, :, :, None].to(x0.dtype)
        entries += float(keep.sum()) * x0.shape[2]
        for index, time in enumerate(times):
            eps = randn(x0.shape, generator, device=x0.device)
            t = torch.full((len(x0),), time, dtype=torch.float64, device=x0.device)
            seen = policy.each(policy.path.perturb(x0, eps, t), t, ctx)
            error = ((torch.stack([pred.eps for pred in seen]) - eps) * keep).flatten(1).double()
            sums[index] += (error @ error.T).cpu().numpy()
    matrices = sums / max(entries, 1.0)
    levels = [
        Level(float(policy.path.noise_level(torch.tensor(time, dtype=torch.float64))), matrix, stacking_weights(matrix))
        for time, matrix in zip(times, matrices, strict=True)
    ]
    return Prediction(stacking_weights(matrices.mean(0)), matrices.mean(0), levels, len(chosen))


def stacking_weights(errors: np.ndarray | Tensor) -> list[float]:
    """The ``w >= 0`` with sum 1 and least ``w' M w``, for ``M [n, n]`` symmetric and not negative.

    Non-negative least squares: the sum is asked for by one more, heavy row; what is left of its error is scaled away.
    """
    m = np.asarray(errors, dtype=np.float64)
    values, vectors = np.linalg.eigh((m + m.T) / 2)
    scale = max(float(values.max()), 1e-300)
    root = (vectors * np.sqrt(np.clip(values / scale, 0, None))).T
    heavy = 1e4
    weights, _ = nnls(np.vstack([root, np.full(len(m), heavy)]), np.concatenate([np.zeros(len(m)), [heavy]]))
    return [float(w) for w in weights / weights.sum()]
