"""Latency of the whole way from observation to action, and of its parts: :func:`measure`.

The clock starts with arrays of observations in their units and stops with arrays of actions in theirs: checks, normalisers, noise
and every step of the sampler are inside. Several contestants take turns in blocks, so that drift of the machine meets all alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from robopolicy.deploy.exported import ExportedPolicy
from robopolicy.features import Feature
from robopolicy.policy import Policy

Obs = Mapping[str, np.ndarray]
Stage = tuple[str, Callable[[Any], Any]]  # name, and what it makes of what the stage before it made
Samples = dict[str, np.ndarray]  # "whole", "cpu" (processor time of the whole, all threads) and each stage -> seconds [n]

_BLOCK = 50  # calls of one contestant before the next has its turn


def stages(policy: Policy | ExportedPolicy, seed: int = 0) -> list[Stage]:
    """The way from observations ``name -> [B, n_obs_steps, *shape]`` to actions ``[B, n_action_steps, A]``, in its parts."""
    if isinstance(policy, Policy):
        return _torch_stages(policy, torch.Generator().manual_seed(seed))
    return _exported_stages(policy, np.random.default_rng(seed))


def _torch_stages(policy: Policy, generator: torch.Generator) -> list[Stage]:
    return [
        ("observe", policy.observe),
        ("encode", lambda obs: (policy.encode(obs), obs)),
        ("sample", lambda state: (policy.sample(state[0], generator), state[1])),
        ("decode", lambda state: policy.decode(*state)),
    ]


def _exported_stages(policy: ExportedPolicy, rng: np.random.Generator) -> list[Stage]:
    executed = policy.n_action_steps

    def noise(obs: Obs) -> tuple[Obs, np.ndarray]:
        return obs, policy.noise(len(next(iter(obs.values()))), rng)

    if policy.manifest.fused:
        return [("observe", policy.observe), ("noise", noise), ("chunk", lambda state: policy.chunk(*state)[:, :executed])]
    return [
        ("observe", policy.observe),
        ("noise", noise),
        ("encode", lambda state: (policy.encode(state[0]), *state)),
        ("sample", lambda state: (policy.sample(state[0], state[2]), state[1])),
        ("decode", lambda state: policy.decode(*state)[:, :executed]),
    ]


def observations(features: Mapping[str, Feature], n_obs_steps: int, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random observations; what they hold makes no difference to how long a network takes."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, feature in features.items():
        shape = (batch, n_obs_steps, *feature.shape)
        made[name] = (
            rng.integers(0, 256, shape, dtype=np.uint8) if feature.is_image else rng.standard_normal(shape, dtype=np.float32)
        )
    return made


def measure(
    contestants: Mapping[str, tuple[Sequence[Stage], Obs]],
    calls: int,
    *,
    warmups: int = 50,
    period: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Samples]:
    """Time ``calls`` passes of every contestant, in blocks that alternate.

    Args:
        contestants: ``name -> (stages, observations)``.
        calls: Of each, after the warm-ups.
        warmups: Passes of each that are thrown away.
        period: Start a pass every so many seconds, as a robot does, instead of at once: caches and clocks cool down between.
        stop: Asked between blocks; ends early when true.

    Returns:
        Seconds of the whole, on the clock and of the processor, and of each stage, for every contestant.
    """
    marks: dict[str, list[list[int]]] = {name: [] for name in contestants}
    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # as control programs do
    try:
        with torch.no_grad():
            for way, obs in contestants.values():
                for _ in range(warmups):
                    _pass(way, obs)
            while any(len(rows) < calls for rows in marks.values()) and not stop():
                for name, (way, obs) in contestants.items():
                    due = time.perf_counter()
                    for _ in range(min(_BLOCK, calls - len(marks[name]))):
                        if period is not None:
                            due += period
                            time.sleep(max(0.0, due - time.perf_counter()))
                        marks[name].append(_pass(way, obs))
    finally:
        if collects:
            gc.enable()
    return {name: _samples([stage for stage, _ in contestants[name][0]], rows) for name, rows in marks.items()}


def _pass(way: Sequence[Stage], obs: Obs) -> list[int]:
    """Clock readings [ns] before the first stage and after each, and last the processor time of all."""
    used = time.process_time_ns()
    marks = [time.perf_counter_ns()]
    state: Any = obs
    for _, stage in way:
        state = stage(state)
        marks.append(time.perf_counter_ns())
    return [*marks, time.process_time_ns() - used]


def _samples(names: Sequence[str], rows: Sequence[Sequence[int]]) -> Samples:
    readings = np.array(rows, dtype=np.int64).reshape(len(rows), len(names) + 2)
    marks, cpu = readings[:, :-1], readings[:, -1]
    spans = np.diff(marks, axis=1) * 1e-9
    return {"whole": (marks[:, -1] - marks[:, 0]) * 1e-9, "cpu": cpu * 1e-9, **dict(zip(names, spans.T, strict=True))}
