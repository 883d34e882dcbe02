"""``FinetuneConfig``: everything that one fine-tuning run needs; and the presets, which are data with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from robopolicy.config import Config, component, full, load_yaml
from robopolicy.errors import ConfigError, nearest
from robopolicy.nets.values import ValueNet
from robopolicy.rl.envs import RewardConfig
from robopolicy.rl.guard import GuardConfig
from robopolicy.rl.heads.registry import HEADS
from robopolicy.rl.ppo import PPOConfig
from robopolicy.train.experiment import TaskConfig

PRESETS = Path(__file__).parent / "presets"


class EnvConfig(Config):
    """Attributes:
    num_envs: Environments that advance together, N. num_workers: Processes that step them; results do not depend on it.
    num_chunks: Chunks per environment and iteration, S. reward: What a step is worth.
    scale_reward: Divide by the running std of returns.
    """

    num_envs: int = pydantic.Field(default=32, ge=1)
    num_workers: int = pydantic.Field(default=0, ge=0)
    num_chunks: int = pydantic.Field(default=36, ge=1)
    reward: RewardConfig = RewardConfig()
    scale_reward: bool = True


class FinetuneEvalConfig(Config):
    """Attributes:
    every: Iterations between evaluations on validation seeds. episodes: Of each; 0: none.
    test_episodes: At the end, base and result on the same test seeds; 0: leave that to `robopolicy compare`.
    films: Seeds that are filmed before and after. num_envs, num_workers: Of the evaluations.
    """

    every: int = pydantic.Field(default=20, ge=1)
    episodes: int = pydantic.Field(default=100, ge=0)
    test_episodes: int = pydantic.Field(default=400, ge=0)
    films: int = pydantic.Field(default=2, ge=0)
    num_envs: int = pydantic.Field(default=50, ge=1)
    num_workers: int = pydantic.Field(default=0, ge=0)


class FinetuneConfig(Config):
    """One run of `robopolicy finetune`; what it writes to ``config.yaml``."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = pydantic.Field(default=0, ge=0)
    base: str  # a checkpoint; or a YAML file with a `policy` section: then training starts from scratch
    task: TaskConfig
    method: dict[str, Any] = {"type": "dppo"}
    iterations: int = pydantic.Field(default=200, ge=1)
    env: EnvConfig = EnvConfig()
    value: ValueNet.Config = ValueNet.Config()
    ppo: PPOConfig = PPOConfig()
    eval: FinetuneEvalConfig = FinetuneEvalConfig()
    guard: GuardConfig = GuardConfig()
    device: str = "auto"  # where the networks run: CUDA when there is one
    threads: int = pydantic.Field(default=1, ge=1)  # of torch; small networks are slower on more
    checkpoint_every: int = pydantic.Field(default=20, ge=1)  # iterations

    @pydantic.field_validator("method", mode="after")
    @classmethod
    def _write_defaults(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            _, config = component("method", value, HEADS)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return full(value, config)


def presets(method: str) -> dict[str, dict[str, Any]]:
    """The presets of a method: name -> partial :class:`FinetuneConfig`, with its ``source`` as text; none for one of your own."""
    path = PRESETS / f"{method}.yaml"
    return load_yaml(path) if path.exists() else {}


def preset(method: str, name: str) -> dict[str, Any]:
    """One preset, ready to be merged with overrides. Raises ConfigError for an unknown name."""
    known = presets(method)
    if name not in known:
        raise ConfigError(f"method '{method}' has no preset '{name}'; {nearest(name, known)}")
    chosen = merge(known.get(known[name].get("like", ""), {}), known[name])
    return {key: value for key, value in chosen.items() if key not in ("source", "like")}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second over the first."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
