"""`robopolicy data demos`: demonstrations by a task's scripted expert.

An episode is a function of its seed alone, and episodes are stored in the order of their seeds, so the result is the same for any
number of worker processes.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from robopolicy.data.episodes import Episodes
from robopolicy.data.store import check_absent
from robopolicy.errors import DataError, TaskError
from robopolicy.features import Feature
from robopolicy.provenance import provenance
from robopolicy.task import Task, TaskSpec

SEED_LIMIT = 100_000  # seeds from here on belong to validation and test, and must never be demonstrated
_EXPERT_STREAM = 1  # keeps the expert's noise apart from the task's own draws from the same seed
_PATIENCE = 50  # failures in a row after which the expert is taken to be unfit for the task


class Recorded(NamedTuple):
    episodes: int
    steps: int
    failed: list[int]  # seeds on which the expert, or the policy, failed
    tried: int  # seeds that it took


Demonstration = tuple[int, bool, dict[str, np.ndarray]]  # seed, whether it ever succeeded, and its features as [T, *shape]


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
    seeds = range(seed_start, SEED_LIMIT)
    with contextlib.closing(_demonstrations(spec, noise, seeds, workers)) as source:
        return collect(
            source,
            out,
            episodes,
            features=features,
            about=about,
            seeds=seeds,
            who=f"the expert of '{spec.name}'",
            mend=f"lower the noise ({noise})",
            patience=_PATIENCE,
            keep_failures=keep_failures,
            progress=progress,
        )


def collect(
    source: Iterable[Demonstration],
    out: str | Path,
    episodes: int,
    *,
    features: Mapping[str, Feature],
    about: Mapping[str, Any],
    seeds: range,
    who: str,
    mend: str,
    patience: int,
    keep_failures: bool,
    progress: bool,
) -> Recorded:
    """Store episodes as they come until there are ``episodes``: the part that every way of demonstrating shares.

    Args:
        source: Episodes of consecutive ``seeds``, in order.
        out: The store to make.
        episodes: How many to store.
        features: Of the store.
        about: Provenance; the seeds taken and those failed are added with each episode.
        seeds: Those that the source may take.
        who: What acts, for messages.
        mend: What helps when it keeps failing.
        patience: Failures in a row after which it is taken to be unfit for the task; counted when failures are left out.
        keep_failures: Store failed episodes too.
        progress: Show a bar on stderr.

    Raises:
        DataError: ``out`` exists or cannot be written, or seeds ran out; the store keeps what it has.
        TaskError: ``who`` keeps failing.
    """
    failed: list[int] = []
    in_a_row = 0
    with (
        Episodes.create(out, features, attrs=about) as store,
        tqdm(total=episodes, desc=f"demonstrate {about['task']}", unit="episode", disable=not progress) as bar,
    ):
        for seed, success, episode in source:
            tried = seed + 1 - seeds.start
            if not success:
                failed.append(seed)
                in_a_row += 1
            bar.set_postfix_str(f"success {tried - len(failed)}/{tried}", refresh=not success)
            if success or keep_failures:
                in_a_row = 0
                store.set_attrs({**about, "seeds": {"start": seeds.start, "stop": seed + 1, "failed": failed}}, publish=False)
                store.append(episode)
                bar.update()
            if len(store) == episodes:
                return Recorded(len(store), store.num_steps, failed, tried)
            if in_a_row == patience:
                raise TaskError(
                    f"{who} failed on {patience} seeds in a row, the last {seed}, and succeeded on {tried - len(failed)} of "
                    f"{tried} ({1 - len(failed) / tried:.1%}); {mend}; {len(store)} episodes are in '{out}'"
                )
        raise DataError(f"seeds ran out at {seeds.stop} with {len(store)} of {episodes} episodes; start at a lower seed")


def _demonstrations(spec: TaskSpec, noise: float, seeds: range, workers: int) -> Generator[Demonstration, None, None]:
    """Episodes of consecutive seeds, in order."""
    queue = iter(seeds)
    if workers == 1:
        task = spec.make()
        try:
            for seed in queue:
                yield demonstrate(task, seed, noise)
        finally:
            task.close()
        return
    # Spawned, not forked: simulators and zarr keep threads, which a fork would leave behind broken.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(spec, noise)) as pool:
        ahead: deque[Future[Demonstration]] = deque(pool.submit(_work, seed) for seed in itertools.islice(queue, 2 * workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(_work, seed) for seed in itertools.islice(queue, 1))
        except BrokenProcessPool as error:
            raise TaskError(f"a worker process of task '{spec.name}' died; run with --workers 1 to see why") from error
        finally:
            pool.shutdown(cancel_futures=True)


def demonstrate(task: Task, seed: int, noise: float) -> Demonstration:
    """One episode by the expert."""
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


def _work(seed: int) -> Demonstration:
    return demonstrate(_worker["task"], seed, _worker["noise"])
