"""``Pairs``: what the teacher makes of noise, at observations of the data; sampled once, and kept beside the run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from robopolicy.data.windows import Windows
from robopolicy.distill.teacher import Teacher
from robopolicy.errors import CheckpointError
from robopolicy.generative.sampler import randn
from robopolicy.train.checkpoint import read_tensors, write_tensors
from robopolicy.train.run import step_seed


@dataclass(frozen=True)
class Pairs:
    """Attributes:
    window: Which window of the data was observed, int64 ``[N]``.
    noise: Unit noise ``[N, H, A]``, float32.
    clean: What the teacher makes of it, normalised, float32.
    vectors: The vector observations ``name -> [N, n_obs_steps, *shape]``, as the teacher saw them; images stay in the data.
    """

    window: np.ndarray
    noise: np.ndarray
    clean: np.ndarray
    vectors: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.window)

    def batch(self, indices: np.ndarray, windows: Windows, *, images: bool) -> dict[str, Any]:
        """The pairs ``indices [B]``; ``images`` says whether there are images to be looked up in ``windows``."""
        obs = dict(windows.batch(self.window[indices])["obs"]) if images else {}
        obs |= {name: values[indices] for name, values in self.vectors.items()}
        return {"obs": obs, "noise": self.noise[indices], "clean": self.clean[indices]}


def turns(num: int, windows: int, seed: int) -> np.ndarray:
    """``num`` window numbers: all take turns, in an order of their own each time round."""
    rounds = range(-(-num // windows))
    return np.concatenate([np.random.default_rng([seed, 7, turn]).permutation(windows) for turn in rounds])[:num]


def sample_pairs(
    teacher: Teacher,
    windows: Windows,
    num: int,
    *,
    seed: int,
    batch_size: int = 512,
    obs_noise: float = 0.0,
    progress: bool = False,
) -> Pairs:
    """Ask the teacher ``num`` times; the result follows from the arguments.

    Args:
        teacher: What is asked.
        windows: Where the observations come from; they take turns.
        num: How many pairs.
        seed: Of the turns and of all noise.
        batch_size: How many are sampled together.
        obs_noise: Std of noise on the normalised vector observations.
        progress: Show a bar on stderr.
    """
    policy = teacher.policy
    window, shape = turns(num, len(windows), seed), (policy.config.horizon, policy.action_transform.dim)
    vectors = [name for name, feature in policy.observation_features.items() if not feature.is_image]
    parts: dict[str, list[Tensor]] = {name: [] for name in ("noise", "clean", *vectors)}
    with tqdm(total=num, desc=f"teacher, {teacher.nfe} calls a chunk", unit="chunk", disable=not progress) as bar:
        for start in range(0, num, batch_size):
            rows = window[start : start + batch_size]
            generator = torch.Generator().manual_seed(step_seed(seed, start))
            noise = randn((len(rows), *shape), generator)
            obs = {name: torch.tensor(value) for name, value in windows.batch(rows)["obs"].items()}
            for name in vectors if obs_noise else ():
                normalizer = policy.normalizer(name)
                value = normalizer.normalize(obs[name].float().to(policy.device))
                value = value + obs_noise * randn(value.shape, generator, device=policy.device)
                obs[name] = normalizer.unnormalize(value).cpu()
            ctx = teacher.encode({n: v.to(policy.device) for n, v in obs.items()})
            clean = teacher.sample(ctx, noise.to(policy.device), generator)
            for name, value in {"noise": noise, "clean": clean.cpu(), **{n: obs[n] for n in vectors}}.items():
                parts[name].append(value)
            bar.update(len(rows))
    whole = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return Pairs(window, whole.pop("noise"), whole.pop("clean"), whole)


def load_pairs(path: Path, identity: Mapping[str, Any]) -> Pairs | None:
    """Pairs that were kept at ``path`` for the same teacher, data and settings; None when there are none."""
    with contextlib.suppress(CheckpointError):
        tensors, document = read_tensors(path)
        if document.get("identity") == identity:
            arrays = {name: value.numpy() for name, value in tensors.items()}
            vectors = {name.removeprefix("obs."): value for name, value in arrays.items() if name.startswith("obs.")}
            return Pairs(arrays["window"], arrays["noise"], arrays["clean"], vectors)
    return None


def save_pairs(path: Path, pairs: Pairs, identity: Mapping[str, Any]) -> None:
    """Keep pairs for a resume."""
    arrays = {"window": pairs.window, "noise": pairs.noise, "clean": pairs.clean}
    arrays |= {f"obs.{name}": values for name, values in pairs.vectors.items()}
    write_tensors(path, {name: torch.from_numpy(value) for name, value in arrays.items()}, {"identity": dict(identity)})
