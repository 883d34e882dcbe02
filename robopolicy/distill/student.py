"""The student: its settings, its untrained policy, and a start from the teacher's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robopolicy.errors import ConfigError
from robopolicy.generative.losses import LossConfig
from robopolicy.policy import Policy, PolicyConfig


def settings(teacher: Policy, method: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``policy`` of a student: the teacher's, on the linear path, from the same initial noise, with what the method
    asks for.

    Dropout is left out: a map that is to be learnt exactly needs no noise in the network.
    """
    value = teacher.config.model_dump(mode="json", include=set(PolicyConfig.model_fields))  # a composed one says more
    value["net"] = {key: 0.0 if key == "dropout" else item for key, item in value["net"].items()}
    changes = {"path": {"type": "flow"}, "frozen_above": None, "obs_noise": 0.0, "target_time": False}
    changes["loss"] = LossConfig().model_dump(mode="json")
    return {**value, **changes, **method}


def untrained(config: PolicyConfig, teacher: Policy, seed: int) -> Policy:
    """A policy with fresh weights from ``seed``, and the teacher's features and normalisers."""
    if config.horizon != teacher.config.horizon or config.n_obs_steps != teacher.config.n_obs_steps:
        raise ConfigError(
            f"policy: horizon {config.horizon} and n_obs_steps {config.n_obs_steps} are not the teacher's "
            f"({teacher.config.horizon}, {teacher.config.n_obs_steps}); a student makes the same chunks from the same steps"
        )
    if config.action != teacher.config.action or config.normalize_per_step != teacher.config.normalize_per_step:
        raise ConfigError("policy.action and normalize_per_step must be the teacher's: its chunks are copied as they are")
    normalizers = {name: copy.deepcopy(teacher.normalizer(name)) for name in teacher.normalizers}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch's initialisers take no generator
        return Policy(config, teacher.observation_features, teacher.action_feature, normalizers)


def warm_start(student: Policy, teacher: Policy) -> list[str]:
    """Copy the teacher's weights wherever names and shapes fit; returns the names of those that were.

    A layer that also hears the target time is wider by the columns of that embedding, which come last: they are set to 0, so that
    a student of a flow teacher starts as its teacher's function.
    """
    theirs, copied = teacher.state_dict(), []
    wider = student.gap.dim if student.gap is not None and teacher.gap is None else 0
    with torch.no_grad():
        for name, own in student.state_dict().items():
            if name in theirs and not name.startswith("normalizers.") and _fits(own, theirs[name], wider):
                own.zero_()
                (own[:, : theirs[name].shape[1]] if own.ndim > 1 else own).copy_(theirs[name])
                copied.append(name)
    return copied


def _fits(own: Tensor, theirs: Tensor, wider: int) -> bool:
    """Equal shapes, or a matrix with ``wider`` columns more."""
    if own.shape == theirs.shape:
        return True
    return own.ndim == theirs.ndim == 2 and own.shape[0] == theirs.shape[0] and own.shape[1] == theirs.shape[1] + wider
