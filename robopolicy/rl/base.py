"""What a fine-tuning run starts from: a checkpoint, or an untrained policy for training from scratch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from robopolicy.config import load_yaml, parse
from robopolicy.data.actions import ActionTransform
from robopolicy.data.normalize import Normalizer
from robopolicy.distill.times import lineage, trained_times
from robopolicy.errors import ConfigError
from robopolicy.policy import Policy, PolicyConfig, action_statistics_size, load_policy, normalizer_modes, read_provenance
from robopolicy.rl.config import FinetuneConfig
from robopolicy.rl.envs import training_seed
from robopolicy.rl.ppo import Demonstrated
from robopolicy.task import TaskSpec
from robopolicy.train.checkpoint import find_policy, read_document
from robopolicy.train.experiment import Experiment, open_data


class Base(NamedTuple):
    policy: Policy
    digest: str  # of its weights, so that a resumed run notices another one
    provenance: dict[str, Any]


def load_base(config: FinetuneConfig, device: torch.device) -> Base:
    """The policy that the run improves. Raises CheckpointError, or ConfigError for a YAML file that does not describe one."""
    if config.base.endswith((".yaml", ".yml")):
        document = load_yaml(config.base)
        if "policy" not in document:
            raise ConfigError(f"'{config.base}' has no section 'policy'; name a checkpoint, or a config that describes a policy")
        settings = parse(PolicyConfig, document["policy"], where=f"{config.base}, policy")
        digest = hashlib.sha256(json.dumps(settings.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        policy = untrained(settings, config.task.spec, config.seed).to(device)
        return Base(policy, digest, {"source": "from scratch"})
    folder = find_policy(config.base)
    document, provenance = read_document(folder / "policy"), read_provenance(folder)
    for name, _, made in lineage(f"'{config.base}'", document, provenance):
        if trained_times(made) is not None:
            raise ConfigError(
                f"{name} was distilled by {made['method']['type']}: its network knows only the times of its own "
                f"steps, and fine-tuning walks it through others; finetune its teacher ('{made['teacher'].get('path')}') and "
                "distil that, or distil by reflow"
            )
    return Base(load_policy(folder, device), str(document.get("sha256")), provenance)


def untrained(config: PolicyConfig, spec: TaskSpec, seed: int, num_steps: int = 2_000) -> Policy:
    """A policy with random weights for training from scratch.

    Observations are normalised by what random actions meet, to zero mean and unit std where the config does not say otherwise;
    the range of the action space becomes [-1, 1], so unit noise covers it. Raises ConfigError when the action space is unbounded.
    """
    if config.frozen_above is not None:
        raise ConfigError("policy.frozen_above: what is frozen there must have been trained before; drop it")
    task = spec.make()
    try:
        rng = np.random.default_rng([seed, 1])
        low, high = (np.asarray(getattr(task.action_space, end), np.float64) for end in ("low", "high"))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ConfigError(f"task '{spec.name}' has an unbounded action space; fine-tune a checkpoint instead")
        features = dict(task.observation_features)
        seen: dict[str, list[np.ndarray]] = {name: [] for name, f in features.items() if not f.is_image}
        episode = 0
        obs, _ = task.reset(seed=_training_start(seed, episode))
        for _ in range(num_steps):
            for name, values in seen.items():
                values.append(np.asarray(obs[name], np.float32).reshape(-1))
            obs, _, terminated, truncated, _ = task.step(rng.uniform(low, high).astype(np.float32))
            if terminated or truncated:
                episode += 1
                obs, _ = task.reset(seed=_training_start(seed, episode))
        transform = ActionTransform(config.action, task.action_feature, features)
        if action_statistics_size(config, transform) != len(low):
            raise ConfigError("training from scratch takes absolute actions with one scale for all steps; drop policy.action")
        modes = normalizer_modes(config, features)
        chosen = set(modes) if "default_normalize" in config.model_fields_set else set(config.normalize)
        normalizers = {
            name: Normalizer.fit(np.stack(values), modes[name] if name in chosen else "meanstd") for name, values in seen.items()
        }
        normalizers["action"] = Normalizer.fit(np.stack([low, high]), "minmax")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return Policy(config, features, task.action_feature, normalizers).eval()
    finally:
        task.close()


def _training_start(seed: int, episode: int) -> int:
    return training_seed(seed, 1_000_000, episode)  # an environment index that no run has


def demonstrations(config: FinetuneConfig, policy: Policy) -> Callable[[int, torch.Generator], Demonstrated]:
    """Draws random windows of what the base was trained on, by number and generator.

    Raises ConfigError when the run that trained the base, or its data, is not there.
    """
    path = find_policy(config.base)
    source = next((p / "config.yaml" for p in (path, *path.parents[:2]) if (p / "config.yaml").exists()), None)
    if source is None:
        raise ConfigError(
            f"ppo.bc.source demonstrations: no config.yaml beside '{config.base}' says what it was trained on; use source base"
        )
    document = load_yaml(source)
    if "data" not in document:
        raise ConfigError(f"ppo.bc.source demonstrations: '{config.base}' was not trained on any, says {source}; use source base")
    imitation = {key: value for key, value in document.items() if key in Experiment.model_fields}  # a distilled one says more
    windows = open_data(parse(Experiment, imitation, where=str(source))).train
    images = any(feature.is_image for feature in policy.observation_features.values())

    def draw(num: int, generator: torch.Generator) -> Demonstrated:
        indices = torch.randint(len(windows), (num,), generator=generator).numpy()
        batch = windows.batch(indices, images=images)
        with torch.no_grad():
            obs = policy.observe(batch["obs"])
            chunk = policy.encode_actions(torch.as_tensor(batch["action"], device=policy.device), obs)
            return Demonstrated(policy.encode(obs), chunk, torch.as_tensor(batch["action_is_pad"], device=policy.device))

    return draw
