"""What training runs of every kind share: device, seeds of steps, signals, and what may not change before a resume."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
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


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first key that differs, in words; empty when none does."""
    changed = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    return f"{changed[0]} was {then.get(changed[0])!r}, now {now.get(changed[0])!r}" if changed else ""


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
