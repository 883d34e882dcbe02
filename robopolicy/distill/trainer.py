"""``Distiller``: the training loop of imitation, with a teacher's samples for demonstrations and a method's loss."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopolicy.config import component
from robopolicy.distill.config import DistillConfig
from robopolicy.distill.methods.base import Method, Models, Samples
from robopolicy.distill.methods.registry import METHODS
from robopolicy.distill.pairs import Pairs, load_pairs, sample_pairs, save_pairs
from robopolicy.distill.student import untrained, warm_start
from robopolicy.distill.teacher import Teacher
from robopolicy.distill.times import check_walk
from robopolicy.errors import ConfigError
from robopolicy.evaluate.commands import override_noise
from robopolicy.policy import Policy, load_policy, read_provenance
from robopolicy.train.bc import Trainer, to_tensors
from robopolicy.train.checkpoint import find_policy, read_document

_HELD_OUT_SEED = 1_000_003  # added to the run's: the noise that measures is not the noise that teaches


class Distiller(Trainer):
    """One run of distillation in one folder. Arguments as :class:`robopolicy.train.bc.Trainer`."""

    COMMAND = "robopolicy distill TEACHER"
    experiment: DistillConfig

    def __init__(self, experiment: DistillConfig, out: Path, resume: bool = False) -> None:
        cls, config = component("method", experiment.method, METHODS)
        self.method: Method = cls(config)
        folder = find_policy(experiment.teacher)
        policy = load_policy(folder)
        if experiment.teacher_noise is not None:
            override_noise(policy, experiment.teacher_noise, experiment.teacher)
            check_walk(policy, experiment.teacher)
        self.teacher = Teacher(policy, experiment.teacher_sampler)
        self.method.check(self.teacher, experiment.policy)
        self.teacher_origin = {
            "path": experiment.teacher,
            "digest": str(read_document(folder / "policy").get("sha256")),
            "provenance": read_provenance(folder),
        }
        super().__init__(experiment, out, resume=resume)
        self.ema.requires_grad_(False)  # a target: gradients may pass through it but not into it
        self.teacher.policy.to(self.device)
        if resume:
            self.teacher.calls = int(read_provenance(out)["teacher"]["calls"])
        self.images = any(feature.is_image for feature in self.policy.observation_features.values())

    # -- what is learnt ------------------------------------------------------------------------------------------------------

    def build(self) -> Policy:
        config = self.experiment
        unknown = set(self.teacher.policy.observation_features) - set(config.data.observations)
        if unknown:
            raise ConfigError(f"data.observations: the teacher needs {', '.join(sorted(unknown))}, too; add what is missing")
        student = untrained(config.policy, self.teacher.policy, config.seed)
        if config.warm_start:
            warm_start(student, self.teacher.policy)
        return student

    @functools.cached_property
    def pairs(self) -> Pairs:
        """The teacher's samples that are learnt from."""
        return self._kept("pairs", self.experiment.pairs.num, self.experiment.seed)

    @functools.cached_property
    def held_out(self) -> Pairs:
        """The teacher's samples that measure the student."""
        return self._kept("held_out", self.experiment.pairs.held_out, self.experiment.seed + _HELD_OUT_SEED)

    def _kept(self, name: str, num: int, seed: int) -> Pairs:
        path, config = self.out / name, self.experiment.pairs
        windows = self.data.train if name == "pairs" or self.data.val is None else self.data.val
        noise = config.obs_noise if name == "pairs" else 0.0
        identity = {
            "teacher": self.teacher_origin["digest"],
            "sampler": repr(self.teacher.sampler.times(self.teacher.policy.path)),
            "kind": type(self.teacher.sampler).__name__,
            "initial_noise": self.teacher.policy.config.initial_noise,
            "num": num,
            "batch_size": config.batch_size,
            "seed": seed,
            "obs_noise": noise,
            "windows": len(windows),
            "data": self._data_identity()["ends"],
        }
        if (pairs := load_pairs(path, identity)) is None:
            pairs = sample_pairs(
                self.teacher,
                windows,
                num,
                seed=seed,
                batch_size=config.batch_size,
                obs_noise=noise,
                progress=num > 10 * config.batch_size,
            )
            self.out.mkdir(parents=True, exist_ok=True)
            save_pairs(path, pairs, identity)
        return pairs

    @property
    def num_samples(self) -> int:
        return len(self.data.train) if self.method.from_data else self.experiment.pairs.num

    def samples(self, indices: np.ndarray) -> Mapping[str, Any]:
        if self.method.from_data:
            return self.data.train.batch(indices)
        return self.pairs.batch(indices, self.data.train, images=self.images)

    def batch_loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        return self.method.loss(self._samples(batch), Models(self.policy, self.averaged_policy, self.teacher), generator)

    def _samples(self, batch: Mapping[str, Any]) -> Samples:
        if not self.method.from_data:
            return Samples(batch["obs"], batch["noise"], batch["clean"], None)
        clean = self.policy.encode_actions(batch["action"], batch["obs"])
        keep = (~batch["action_is_pad"])[:, :, None].to(clean.dtype)
        return Samples(batch["obs"], torch.zeros_like(clean), clean, keep)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """``val/same_noise``: root mean square of student minus teacher from the same noise, in normalised actions. The map from
        noise to chunk is what all one-step methods are after; only the baselines cannot learn it. Of a teacher whose chunks are
        draws there is no such map: ``val/loss`` is then the method's own."""
        if self.teacher.draws and self.method.from_data:
            return {}
        policy, total, generator = self.averaged_policy, 0.0, torch.Generator().manual_seed(_HELD_OUT_SEED)
        models = Models(policy, policy, self.teacher)
        windows = self.data.train if self.data.val is None else self.data.val
        for rows in np.array_split(np.arange(len(self.held_out)), -(-len(self.held_out) // 256)):
            batch = to_tensors(self.held_out.batch(rows, windows, images=self.images), self.device)
            if self.teacher.draws:
                loss = self.method.loss(Samples(batch["obs"], batch["noise"], batch["clean"], None), models, generator)
                total += float(loss) * len(rows) / len(self.held_out)
            else:
                made = from_noise(policy, policy.encode(batch["obs"]), batch["noise"], generator)
                total += float((made - batch["clean"]).square().sum())
        return {"val/loss": total} if self.teacher.draws else {"val/same_noise": (total / self.held_out.clean.size) ** 0.5}

    # -- the run -------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        if not self.method.from_data:
            _ = self.pairs  # sampled before the loop takes over the signals: Ctrl-C is then at once, and nothing is lost
        _ = self.held_out
        return super().run()

    def origin(self) -> dict[str, Any]:
        return {
            **super().origin(),
            "method": self.experiment.method,
            "teacher": {**self.teacher_origin, "calls": self.teacher.calls},
        }

    def _data_identity(self) -> dict[str, Any]:
        return {**super()._data_identity(), "teacher": self.teacher_origin["digest"]}


def from_noise(policy: Policy, ctx: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """The chunks ``[B, H, A]`` that a policy makes of unit ``noise``; ``generator`` is for samplers that draw more on the way."""
    return policy.walk(policy.start(noise), ctx, generator).x0
