"""What training runs of every kind share: device, seeds of steps, signals, and what may not change before a resume."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pydantic
import torch

from robopolicy.config import Config
from robopolicy.errors import ConfigError


def pick_device(name: str, key: str) -> torch.device:
    """``auto`` takes CUDA when there is one. Raises ConfigError, naming ``key``, for a device that torch does not see."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{key} '{name}' is no torch device; use auto, cpu or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"{key} '{name}': torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return device


def step_seed(seed: int, step: int) -> int:
    """A well-mixed 63-bit seed for the noise of one step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def recipe(config: Config, may_change: Sequence[str]) -> dict[str, Any]:
    """The configuration as dotted keys, without what may change between a stop and a resume."""
    flat = _flatten(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{free}.") for free in may_change)}


def changed_keys(then: Mapping[str, Any], config: Config, may_change: Sequence[str]) -> str:
    """The first key whose value differs from the recipe ``then`` of a checkpoint, in words; empty when none does.

    A key that the recipe lacks is newer than the checkpoint: what the older version did is what the key's default means, so the
    default is no change. It is said on stderr which keys these are.
    """
    now = recipe(config, may_change)
    added = sorted(set(now) - set(then))
    before = {**then, **{key: value for key, value in _defaults(config, added).items() if key in added}}
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        return f"{changed[0]} was {before.get(changed[0])!r}, now {now.get(changed[0])!r}"
    if added:
        print(
            f"note: the checkpoint is of an older version, which knew no {', '.join(added)}; "
            "the defaults of these mean what it did, and are taken",
            file=sys.stderr,
        )
    return ""


def _defaults(config: Config, keys: Sequence[str]) -> dict[str, Any]:
    """The configuration as dotted keys, as if these had not been set."""
    value = config.model_dump(mode="json")
    for key in keys:
        *parents, name = key.split(".")
        at: Any = value
        for parent in parents:
            at = at.get(parent) if isinstance(at, dict) else None
        if not isinstance(at, dict) or name not in at:
            return {}
        del at[name]
    try:
        return _flatten(type(config).model_validate(value).model_dump(mode="json"))
    except pydantic.ValidationError:  # one of them has no default
        return {}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


@contextlib.contextmanager
def signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Route SIGINT and SIGTERM to ``handler`` for the duration."""
    previous = {number: signal.signal(number, lambda n, _frame: handler(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
