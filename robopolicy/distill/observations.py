"""At which observations the teacher is asked: those of the demonstrations that it was trained on, or of a store that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robopolicy.config import load_yaml
from robopolicy.errors import CheckpointError, ConfigError
from robopolicy.policy import Policy
from robopolicy.train.checkpoint import find_policy


def recorded_data(checkpoint: str | Path) -> dict[str, Any]:
    """The section ``data`` of the run that trained a checkpoint; of the base's, where the run was one of `finetune`.

    Raises:
        ConfigError: No config says what it was trained on.
    """
    seen: list[str] = []
    place = str(checkpoint)
    while place not in seen:
        seen.append(place)
        try:
            folder = find_policy(place)
        except CheckpointError as error:
            raise ConfigError(f"'{checkpoint}' was made from '{place}', which is not there; {_MEND}") from error
        source = next((p / "config.yaml" for p in (folder, *folder.parents[:2]) if (p / "config.yaml").exists()), None)
        document = {} if source is None else load_yaml(source)
        if isinstance(document.get("data"), dict):
            return dict(document["data"])
        if not isinstance(document.get("base"), str):
            break
        place = document["base"]
    raise ConfigError(f"no config.yaml beside '{place}' says on what '{checkpoint}' was trained; {_MEND}")


_MEND = "name a store with --data; `robopolicy data rollout TEACHER --episodes 200 --out STORE` makes one of its own episodes"


def data_section(teacher: Policy, checkpoint: str | Path, store: str | None) -> dict[str, Any]:
    """The section ``data``: the teacher's demonstrations, or ``store``, with all observations that the teacher needs."""
    observations, action = list(teacher.observation_features), teacher.action_feature.name
    if store is not None:
        return {"path": store, "observations": observations, "action": action}
    return {**recorded_data(checkpoint), "observations": observations}
