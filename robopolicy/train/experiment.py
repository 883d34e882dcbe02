"""``Experiment``: the complete configuration of one training run, and the data and policy that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pydantic
import torch

from robopolicy.config import Config
from robopolicy.data.actions import ActionTransform
from robopolicy.data.episodes import Episodes, FeatureSource
from robopolicy.data.normalize import Normalizer
from robopolicy.data.windows import Windows, split_episodes
from robopolicy.errors import ConfigError, nearest
from robopolicy.policy import Policy, PolicyConfig, action_statistics_size, normalizer_modes
from robopolicy.task import TaskSpec
from robopolicy.train.ema import EMAConfig


class TaskConfig(Config):
    """The task that the policy is for; evaluation during training runs on it, and `eval` takes it as its default."""

    name: str
    args: dict[str, Any] = {}

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(self.name, self.args)


class DataConfig(Config):
    """Which demonstrations, and which of their features.

    ``features`` maps names onto the arrays of a store that declares none (`robopolicy data info PATH` prints a draft).
    """

    path: str
    observations: tuple[str, ...] = pydantic.Field(min_length=1)
    action: str = "action"
    features: dict[str, FeatureSource] | None = None
    max_episodes: int | None = pydantic.Field(default=None, ge=1)
    val_fraction: float = pydantic.Field(default=0.02, ge=0.0, lt=1.0)
    cache_dir: str | None = None

    @pydantic.model_validator(mode="after")
    def _not_the_answer(self) -> DataConfig:
        if self.action in self.observations:
            raise ValueError(f"observations hold '{self.action}', the action that is to be learnt; leave it out")
        return self


class TrainConfig(Config):
    steps: int = pydantic.Field(default=100_000, ge=1)
    batch_size: int = pydantic.Field(default=256, ge=1)
    lr: float = pydantic.Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = pydantic.Field(default=1e-6, ge=0)
    warmup_steps: int = pydantic.Field(default=500, ge=0)
    grad_clip: float = pydantic.Field(default=1.0, gt=0)
    ema: EMAConfig = EMAConfig()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    device: str = "auto"
    threads: int = pydantic.Field(default=1, ge=1)  # of torch on the CPU; small networks are slower on more
    log_every: int = pydantic.Field(default=100, ge=1)
    checkpoint_every: int = pydantic.Field(default=2_000, ge=1)
    keep_best: int = pydantic.Field(default=2, ge=0)


class EvalConfig(Config):
    """Roll-outs during training, on validation seeds; 0 episodes: none."""

    every: int = pydantic.Field(default=20_000, ge=1)
    episodes: int = pydantic.Field(default=0, ge=0)
    num_envs: int = pydantic.Field(default=50, ge=1)
    num_workers: int = pydantic.Field(default=0, ge=0)


class Experiment(Config):
    """One run: everything that `robopolicy train` needs, and what it writes to ``config.yaml``."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = pydantic.Field(default=0, ge=0)
    task: TaskConfig | None = None
    data: DataConfig
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @pydantic.model_validator(mode="after")
    def _evaluable(self) -> Experiment:
        if self.eval.episodes and self.task is None:
            raise ValueError("eval.episodes is set but there is no task; set task.name or eval.episodes=0")
        return self


class TrainingData(NamedTuple):
    episodes: Episodes
    train: Windows
    val: Windows | None


def open_data(experiment: Experiment) -> TrainingData:
    """Open the demonstrations and cut them into windows.

    Raises:
        ConfigError: A feature that the config names is not in the store.
        DataError: The store is damaged.
    """
    data, policy = experiment.data, experiment.policy
    episodes = Episodes.open(data.path, features=data.features)
    for name in (*data.observations, data.action):
        if name not in episodes.features:
            raise ConfigError(
                f"data.observations/action: '{data.path}' has no feature '{name}'; {nearest(name, episodes.features)}"
            )
    count = len(episodes) if data.max_episodes is None else min(data.max_episodes, len(episodes))
    train_ids, val_ids = split_episodes(count, data.val_fraction, experiment.seed)

    def windows(ids: np.ndarray) -> Windows:
        return Windows(
            episodes,
            data.observations,
            data.action,
            n_obs_steps=policy.n_obs_steps,
            horizon=policy.horizon,
            n_action_steps=policy.n_action_steps,
            episode_ids=ids,
            cache_dir=data.cache_dir,
        )

    return TrainingData(episodes, windows(train_ids), windows(val_ids) if len(val_ids) else None)


def build_untrained(experiment: Experiment, data: TrainingData) -> Policy:
    """A policy with fresh weights (from the experiment's seed) and normalisers fitted on the training windows."""
    observations = {name: data.episodes.features[name] for name in experiment.data.observations}
    action_feature = data.episodes.features[experiment.data.action]
    transform = ActionTransform(experiment.policy.action, action_feature, observations)
    if experiment.policy.frozen_above is not None:
        raise ConfigError("policy.frozen_above: what is frozen there must have been trained before; drop it, fine-tuning sets it")
    normalizers = fit_normalizers(experiment.policy, data.train, transform, observations)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(experiment.seed)  # torch's initialisers take no generator
        return Policy(experiment.policy, observations, action_feature, normalizers)


def fit_normalizers(
    config: PolicyConfig, windows: Windows, transform: ActionTransform, observations: dict[str, Any], max_windows: int = 200_000
) -> dict[str, Normalizer]:
    """Fit one normaliser per vector feature, and one on the actions as the network will see them (after the transform)."""
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), max_windows)).astype(np.int64)
    vectors = [name for name, feature in observations.items() if not feature.is_image]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in [*vectors, "action"]}
    for start in range(0, len(chosen), 4096):
        batch = windows.batch(chosen[start : start + 4096], images=False)
        reference = {name: torch.from_numpy(batch["obs"][name][:, -1]).float() for name in vectors}
        action = transform.encode(torch.from_numpy(batch["action"]), reference)
        columns["action"].append(action.reshape(-1, action_statistics_size(config, transform)).numpy().copy())
        for name in vectors:
            columns[name].append(batch["obs"][name][:, -1].reshape(len(batch["action"]), -1).copy())
    modes = normalizer_modes(config, observations)
    return {name: Normalizer.fit(np.concatenate(values), modes[name]) for name, values in columns.items()}


def default_output(experiment: Experiment) -> Path:
    return Path("outputs") / experiment.name
