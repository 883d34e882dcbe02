"""Demonstrations that no parent was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robopolicy.compose.policy import Composed
from robopolicy.config import load_yaml, parse
from robopolicy.data.episodes import Episodes
from robopolicy.data.windows import Windows, split_episodes
from robopolicy.errors import ConfigError, DataError, RobopolicyError, nearest
from robopolicy.train.checkpoint import find_policy
from robopolicy.train.experiment import DataConfig, Experiment


def held_out(policy: Composed, parents: list[str], path: Path | None) -> Windows | str:
    """Windows with the composition's observations and lengths.

    Args:
        policy: The composition.
        parents: Checkpoints of its parents; the ``config.yaml`` beside each says what it was trained on.
        path: New demonstrations. None: the episodes that all parents' runs kept back for validation.

    Returns:
        The windows, or why there are none.

    Raises:
        DataError: ``path`` is no store, or lacks an observation.
    """
    runs = [_experiment(parent) for parent in parents]
    features: dict[str, Any] = {}
    for run in runs:
        features |= (run.data.features or {}) if run is not None else {}
    if path is not None:
        episodes, chosen = Episodes.open(path, features=features or None), None
    else:
        first = runs[0]
        if first is None or any(run is None or _kept(run.data, run.seed) != _kept(first.data, first.seed) for run in runs):
            return "the parents' runs did not keep back the same demonstrations"
        try:
            episodes = Episodes.open(first.data.path, features=features or None)
        except RobopolicyError as error:
            return str(error)
        total = min(len(episodes), first.data.max_episodes or len(episodes))
        _, chosen = split_episodes(total, first.data.val_fraction, first.seed)
        if not len(chosen):
            return "the parents' runs kept back no demonstrations (data.val_fraction)"
    action = policy.action_feature.name
    for name in (*policy.observation_features, action):
        if name not in episodes.features:
            reason = f"'{episodes.path}' has no feature '{name}'; {nearest(name, episodes.features)}"
            if path is None:
                return reason
            raise DataError(reason)
    return Windows(
        episodes,
        list(policy.observation_features),
        action,
        n_obs_steps=policy.n_obs_steps,
        horizon=policy.horizon,
        n_action_steps=policy.n_action_steps,
        episode_ids=chosen,
    )


def _kept(data: DataConfig, seed: int) -> tuple[object, ...]:
    """What decides which episodes are kept back."""
    return (str(Path(data.path).resolve()), data.max_episodes, data.val_fraction, seed)


def _experiment(checkpoint: str) -> Experiment | None:
    """The run of `robopolicy train` that made a checkpoint, if it is beside it."""
    path = find_policy(checkpoint)
    source = next((p / "config.yaml" for p in (path, *path.parents[:2]) if (p / "config.yaml").exists()), None)
    if source is None:
        return None
    document = load_yaml(source)
    try:
        return parse(Experiment, document, where=str(source)) if "data" in document else None
    except ConfigError:
        return None
