"""`robopolicy data demos`: demonstrations by a task's scripted expert.

An episode is a function of its seed alone, and episodes are stored in the order of their seeds, so the result is the same for any
number of worker processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from robopolicy.data.episodes import Episodes
from robopolicy.data.store import check_absent
from robopolicy.errors import DataError, TaskError
from robopolicy.provenance import provenance
from robopolicy.task import Task, TaskSpec

SEED_LIMIT = 100_000  # seeds from here on belong to validation and test, and must never be demonstrated
_EXPERT_STREAM = 1  # keeps the expert's noise apart from the task's own draws from the same seed
_PATIENCE = 50  # failures in a row after which the expert is taken to be unfit for the task


class Recorded(NamedTuple):
    episodes: int
    steps: int
    failed: list[int]  # seeds on which the expert failed


def record(
    spec: TaskSpec,
    out: str | Path,
    episodes: int,
    *,
    noise: float = 0.0,
    seed_start: int = 0,
    workers: int = 1,
    keep_failures: bool = False,
    progress: bool = False,
) -> Recorded:
    """Record demonstrations into a new store.

    Observations are those BEFORE each action. Failed episodes are left out, so seeds run on until ``episodes`` are stored.
    Interrupted or killed, the store holds the episodes recorded so far.

    Args:
        spec: The task; it needs a scripted expert.
        out: A directory that does not exist.
        episodes: How many to store.
        noise: Scale of the expert's exploration noise; 0 none.
        seed_start: Seed of the first episode.
        workers: Processes.
        keep_failures: Store failed episodes too.
        progress: Show a bar on stderr.

    Raises:
        DataError: ``out`` exists, or seeds leave those reserved for demonstrations.
        TaskError: The task has no expert, or its expert keeps failing.
    """
    if episodes < 1 or seed_start < 0 or workers < 1 or noise < 0:
        raise DataError(
            f"demos: episodes {episodes}, seed start {seed_start}, workers {workers}, noise {noise}; "
            "expected at least 1, 0, 1 and 0 respectively"
        )
    if seed_start + episodes > SEED_LIMIT:
        raise DataError(
            f"demos: seeds {seed_start}..{seed_start + episodes} reach {SEED_LIMIT}, where validation seeds begin; start lower"
        )
    check_absent(Path(out))
    task = spec.make()
    try:
        action = task.action_feature
        features = {**task.observation_features, action.name: action}
        about = {"task": spec.name, "task_args": dict(spec.kwargs), "source": "scripted expert", "noise": noise, **provenance()}
        task.reset(seed=seed_start)
        task.expert(np.random.default_rng(0), noise)  # no expert: say so before anything is written
    finally:
        task.close()
    failed: list[int] = []
    in_a_row = 0
    with (
        Episodes.create(out, features, attrs=about) as store,
        tqdm(total=episodes, desc=f"demonstrate {spec.name}", disable=not progress) as bar,
    ):
        for seed, success, episode in _demonstrations(spec, noise, seed_start, workers):
            if not success:
                failed.append(seed)
                in_a_row += 1
            if success or keep_failures:
                in_a_row = 0
                store.set_attrs({**about, "seeds": {"start": seed_start, "stop": seed + 1, "failed": failed}}, publish=False)
                store.append(episode)
                bar.update()
                bar.set_postfix(failed=len(failed), refresh=False)
            if len(store) == episodes:
                return Recorded(len(store), store.num_steps, failed)
            if in_a_row == _PATIENCE:
                raise TaskError(
                    f"the expert of '{spec.name}' failed on {_PATIENCE} seeds in a row, the last {seed}; "
                    f"lower the noise ({noise}); {len(store)} episodes are in '{out}'"
                )
        raise DataError(f"demos: seeds ran out at {SEED_LIMIT} with {len(store)} of {episodes} episodes; start at a lower seed")


_Demonstration = tuple[int, bool, dict[str, np.ndarray]]


def _demonstrations(spec: TaskSpec, noise: float, seed_start: int, workers: int) -> Iterator[_Demonstration]:
    """Episodes of consecutive seeds, in order."""
    seeds = iter(range(seed_start, SEED_LIMIT))
    if workers == 1:
        task = spec.make()
        try:
            for seed in seeds:
                yield demonstrate(task, seed, noise)
        finally:
            task.close()
        return
    # Spawned, not forked: simulators and zarr keep threads, which a fork would leave behind broken.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(spec, noise)) as pool:
        ahead: deque[Future[_Demonstration]] = deque(pool.submit(_work, seed) for seed in itertools.islice(seeds, 2 * workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(_work, seed) for seed in itertools.islice(seeds, 1))
        except BrokenProcessPool as error:
            raise TaskError(f"a worker process of task '{spec.name}' died; run with --workers 1 to see why") from error
        finally:
            pool.shutdown(cancel_futures=True)


def demonstrate(task: Task, seed: int, noise: float) -> _Demonstration:
    """One episode by the expert: its seed, whether it ever succeeded, and its features as ``[T, *shape]``."""
    observation, _ = task.reset(seed=seed)
    expert = task.expert(np.random.default_rng([seed, _EXPERT_STREAM]), noise)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*task.observation_features, task.action_feature.name)}
    success = ended = False
    while not ended:
        action = np.asarray(expert.act(), task.action_feature.dtype)
        for name in task.observation_features:
            rows[name].append(np.array(observation[name]))
        rows[task.action_feature.name].append(action)
        observation, _, terminated, truncated, info = task.step(action)
        success = success or bool(info["is_success"])
        ended = terminated or truncated
    return seed, success, {name: np.stack(values) for name, values in rows.items()}


_worker: dict[str, Any] = {}  # the task of this worker process


def _start_worker(spec: TaskSpec, noise: float) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _worker.update(task=spec.make(), noise=noise)


def _work(seed: int) -> _Demonstration:
    return demonstrate(_worker["task"], seed, _worker["noise"])
