"""``DistillConfig``: everything that one run of `robopolicy distill` needs."""

from __future__ import annotations

from typing import Any

import pydantic

from robopolicy.config import Config, component, full
from robopolicy.distill.methods.registry import METHODS
from robopolicy.errors import ConfigError
from robopolicy.train.experiment import Experiment


class PairsConfig(Config):
    """Noise and what the teacher makes of it, sampled once and kept in the run folder.

    Attributes:
        num: How many. Observations of the data take turns, each time with fresh noise.
        batch_size: Of sampling.
        obs_noise: Std of noise on the normalised vector observations that the teacher, and then the student, is asked at: a
            student hears then what its teacher does a little off the data, where it will get itself.
        held_out: Pairs of held-out episodes (of the same ones where the data hold none out) that measure the student.
    """

    num: int = pydantic.Field(default=50_000, ge=1)
    batch_size: int = pydantic.Field(default=512, ge=1)
    obs_noise: float = pydantic.Field(default=0.0, ge=0)
    held_out: int = pydantic.Field(default=1024, ge=1)


class DistillConfig(Experiment):
    """One run. ``data`` are the observations at which the teacher is asked, ``policy`` is the student.

    Attributes:
        teacher: A checkpoint.
        teacher_sampler: How the teacher is sampled; None: as it says itself, without noise on the way.
        teacher_noise: Scale of the noise that it starts from; None: as it says itself. Its student starts from the same.
        warm_start: Start from the teacher's weights wherever names and shapes fit.
    """

    teacher: str
    teacher_sampler: dict[str, Any] | None = None
    teacher_noise: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    method: dict[str, Any] = {"type": "same_noise"}
    pairs: PairsConfig = PairsConfig()
    warm_start: bool = True

    @pydantic.field_validator("method", mode="after")
    @classmethod
    def _write_defaults(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            _, config = component("method", value, METHODS)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return full(value, config)

    @pydantic.model_validator(mode="after")
    def _linear(self) -> DistillConfig:
        if self.policy.path["type"] != "flow":
            raise ValueError(
                f"policy.path is {self.policy.path['type']}; students live on the linear path, use path: {{type: flow}}"
            )
        return self
