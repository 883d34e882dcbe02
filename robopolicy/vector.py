"""``VectorEnv``: many copies of one task, stepped a chunk of actions at a time, in this process or in several.

Workers are fresh interpreters: not forks, so that torch, OpenGL and locks of this process cannot follow, and not
multiprocessing's spawn, which would import the caller's main module, torch and all, once more. Observations and actions
travel through anonymous shared memory: it has no name, so nothing is left behind however a process dies. One message per
chunk and worker goes over a socket; a worker whose socket closes ends. An environment lives at one index in one worker and is
touched by nothing else, hence results do not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import numpy as np

from robopolicy.errors import RobopolicyError, TaskError
from robopolicy.features import Feature
from robopolicy.task import Observation, Task, TaskSpec

THREAD_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


class ChunkStep(NamedTuple):
    """What came of one chunk of ``T`` actions in each of ``N`` environments."""

    obs: dict[str, np.ndarray]  # name -> [N, T, *shape], after each action; after the end of an episode its last one repeats
    reward: np.ndarray  # [N, T] float64; 0 where no step was taken
    success: np.ndarray  # [N, T] bool; False where no step was taken
    length: np.ndarray  # [N] int64: steps taken; 0 for an inactive or ended environment
    terminated: np.ndarray  # [N] bool: the episode ended by itself, in this chunk or before
    truncated: np.ndarray  # [N] bool: the episode reached its limit, in this chunk or before


@dataclass(frozen=True)
class _Signature:
    """What a task declares, as much of it as the caller's side needs."""

    observation_features: dict[str, Feature]
    action_feature: Feature
    rate: float
    max_episode_steps: int

    @classmethod
    def of(cls, task: Task) -> _Signature:
        return cls(dict(task.observation_features), task.action_feature, float(task.rate), int(task.max_episode_steps))


class _Buffers:
    """The shared arrays of ``num_envs`` environments and chunks of at most ``capacity`` steps, laid over memory ``fd``.

    Arrays without a time axis come first, so that a larger capacity leaves them in place.
    """

    def __init__(self, fd: int, signature: _Signature, num_envs: int, capacity: int) -> None:
        observed = signature.observation_features.items()
        steps = (num_envs, capacity)
        layout: dict[str, tuple[tuple[int, ...], str]] = {
            "length": ((num_envs,), "int64"),
            "terminated": ((num_envs,), "bool"),
            "truncated": ((num_envs,), "bool"),
            **{f"last/{name}": ((num_envs, *feature.shape), feature.dtype) for name, feature in observed},
            "action": ((*steps, *signature.action_feature.shape), signature.action_feature.dtype),
            "reward": (steps, "float64"),
            "success": (steps, "bool"),
            **{f"obs/{name}": ((*steps, *feature.shape), feature.dtype) for name, feature in observed},
        }
        offsets, size = [], 0
        for shape, dtype in layout.values():
            offsets.append(size)
            size += math.ceil(math.prod(shape) * np.dtype(dtype).itemsize / 64) * 64
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        arrays: dict[str, np.ndarray] = {}
        for (key, (shape, dtype)), offset in zip(layout.items(), offsets, strict=True):
            arrays[key] = np.ndarray(shape, dtype, memory, offset)
        self.capacity = capacity
        self.length, self.terminated, self.truncated = arrays["length"], arrays["terminated"], arrays["truncated"]
        self.action, self.reward, self.success = arrays["action"], arrays["reward"], arrays["success"]
        self.last = {name: arrays[f"last/{name}"] for name, _ in observed}
        self.obs = {name: arrays[f"obs/{name}"] for name, _ in observed}


class _Slab:
    """Environments ``start .. stop - 1``, on the side of the process border where they live."""

    def __init__(self, spec: TaskSpec, fd: int, start: int, stop: int, num_envs: int) -> None:
        self.tasks = {i: spec.make() for i in range(start, stop)}
        self.signature = _Signature.of(self.tasks[start])
        self._name, self._fd, self._num_envs = spec.name, fd, num_envs
        self.buffers = _Buffers(fd, self.signature, num_envs, 1)

    def reset(self, seeds: Sequence[int | None]) -> None:
        for i, task in self.tasks.items():
            if seeds[i] is None:
                continue
            obs, _ = task.reset(seed=seeds[i])
            self._check(obs)
            for name, last in self.buffers.last.items():
                last[i] = obs[name]
            self.buffers.terminated[i] = self.buffers.truncated[i] = False

    def step(self, num_steps: int, capacity: int, active: Sequence[bool]) -> None:
        if capacity != self.buffers.capacity:
            self.buffers = _Buffers(self._fd, self.signature, self._num_envs, capacity)
        to = self.buffers
        for i, task in self.tasks.items():
            taken = 0
            while active[i] and taken < num_steps and not (to.terminated[i] or to.truncated[i]):
                obs, reward, terminated, truncated, info = task.step(to.action[i, taken].copy())
                for name, rows in to.obs.items():
                    rows[i, taken] = obs[name]
                to.reward[i, taken] = reward
                to.success[i, taken] = info["is_success"]
                to.terminated[i], to.truncated[i] = terminated, truncated
                taken += 1
            to.length[i] = taken
            to.reward[i, taken:num_steps] = 0.0
            to.success[i, taken:num_steps] = False
            for name, rows in to.obs.items():
                if taken:
                    to.last[name][i] = rows[i, taken - 1]
                rows[i, taken:num_steps] = to.last[name][i]

    def render(self, indices: Sequence[int]) -> dict[int, Any]:
        return {i: self.tasks[i].render() for i in indices if i in self.tasks}

    def close(self) -> None:
        for task in self.tasks.values():
            task.close()

    def _check(self, obs: Observation) -> None:
        for name, feature in self.signature.observation_features.items():
            if name not in obs or np.shape(obs[name]) != feature.shape:
                found = f"shape {np.shape(obs[name])}" if name in obs else "nothing"
                raise TaskError(f"task '{self._name}': reset returned {found} for observation '{name}', declared {feature.shape}")


class _WorkerTraceback(Exception):
    """Carries a worker's traceback as text, for ``--debug``."""


class _Worker:
    """A process that runs a slab, seen from the caller's side."""

    def __init__(self, index: int, spec: TaskSpec, fd: int, start: int, stop: int, num_envs: int) -> None:
        self.connection, theirs = Pipe()
        self._label = f"worker {index} (environments {start}..{stop - 1})"
        environment = {**os.environ, **dict.fromkeys(THREAD_POOLS, "1"), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = f"from robopolicy.vector import _serve; _serve({theirs.fileno()})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", command],
                env=environment,
                pass_fds=(theirs.fileno(), fd),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what simulators print must not mix with results
                start_new_session=True,  # Ctrl-C is the caller's to handle
            )
        self.send(spec, fd, start, stop, num_envs)

    def send(self, *message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            self._died()

    def receive(self) -> Any:
        try:
            error, value = self.connection.recv()
        except (EOFError, OSError):
            self._died()
        if error is None:
            return value
        message, mendable = error
        raise TaskError(message if mendable else f"{self._label}: {message}") from _WorkerTraceback(value)

    def _died(self) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        status = self.process.poll()
        how = "closed its connection" if status is None else f"exited with status {status}"
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        hint = "; if memory ran out, use fewer environments or workers" if status == -signal.SIGKILL else "; its output says why"
        raise TaskError(f"{self._label}, process {self.process.pid}, {how}{hint}") from None


def _serve(socket: int) -> None:
    """The main function of a worker: answers messages until the socket closes."""
    connection = Connection(socket)
    slab: _Slab | None = None
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            break
        answer: tuple[tuple[str, bool] | None, Any]
        try:
            if slab is None:
                slab = _Slab(*message)
                answer = None, slab.signature
            else:
                answer = None, getattr(slab, message[0])(*message[1:])
        except Exception as error:
            mendable = isinstance(error, RobopolicyError)
            text = " ".join((str(error) if mendable else f"{type(error).__name__}: {error}").split())
            answer = (text, mendable), traceback.format_exc()
        try:
            connection.send(answer)
        except OSError:
            break
    if slab is not None:
        slab.close()


def _stop(workers: Sequence[_Worker], fd: int) -> None:
    """End the workers, politely for two seconds and then not; release the shared memory."""
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        try:
            worker.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
    os.close(fd)


def anonymous_memory() -> int:
    """A file descriptor of growing shared memory that vanishes with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("robopolicy")
    with tempfile.TemporaryFile() as file:  # without a name as well, only not certainly in memory
        return os.dup(file.fileno())


class VectorEnv:
    """``num_envs`` copies of a task. Nothing resets by itself: an ended environment stays ended until :meth:`reset`.

    Args:
        spec: The task. With workers its class must be importable by name: one that lives in ``__main__`` is not.
        num_envs: Number of copies, N.
        num_workers: 0 steps them in this process, where errors keep their own type and traceback; otherwise the number of
            processes that share them. Whatever it is, results are the same.

    Raises:
        TaskError: The task cannot be built, or a worker failed or died; the environments are closed then.
    """

    def __init__(self, spec: TaskSpec, num_envs: int, num_workers: int = 0) -> None:
        if num_envs < 1 or num_workers < 0:
            raise TaskError(f"VectorEnv: {num_envs} environments on {num_workers} workers; need at least 1 and at least 0")
        if num_workers and spec.name.startswith("__main__:"):
            raise TaskError(f"task '{spec.name}' cannot run in workers: move its class into a module, or use num_workers=0")
        self.num_envs = num_envs
        self._slab: _Slab | None = None
        self._workers: list[_Worker] = []
        fd = anonymous_memory()
        self._finalizer = weakref.finalize(self, _stop, self._workers, fd)  # also when collected, and at exit
        with self._closing_on_failure():
            if num_workers == 0:
                self._slab = _Slab(spec, fd, 0, num_envs, num_envs)
                self._signature = self._slab.signature
                self._buffers = self._slab.buffers
            else:
                count = min(num_workers, num_envs)
                bounds = [num_envs * k // count for k in range(count + 1)]
                for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
                    self._workers.append(_Worker(index, spec, fd, start, stop, num_envs))
                signatures = [worker.receive() for worker in self._workers]
                self._signature = signatures[0]
                self._buffers = _Buffers(fd, self._signature, num_envs, 1)
        self._fd = fd
        self._started = np.zeros(num_envs, bool)

    @property
    def observation_features(self) -> dict[str, Feature]:
        return self._signature.observation_features

    @property
    def action_feature(self) -> Feature:
        return self._signature.action_feature

    @property
    def rate(self) -> float:
        """Control steps per second [Hz]."""
        return self._signature.rate

    @property
    def max_episode_steps(self) -> int:
        return self._signature.max_episode_steps

    def reset(self, seeds: Sequence[int | None]) -> dict[str, np.ndarray]:
        """Start an episode in every environment whose seed is not None.

        Args:
            seeds: N seeds; None leaves an environment as it is.

        Returns:
            Name -> ``[N, *shape]``, the latest observation of each environment (zeros where there has been none).
        """
        if len(seeds) != self.num_envs:
            raise TaskError(
                f"VectorEnv.reset: {len(seeds)} seeds for {self.num_envs} environments; give one each, None to leave it"
            )
        seeds = [None if seed is None else int(seed) for seed in seeds]
        self._call("reset", seeds)
        self._started |= [seed is not None for seed in seeds]
        return {name: last.copy() for name, last in self._buffers.last.items()}

    def step(self, actions: np.ndarray, active: np.ndarray | None = None) -> ChunkStep:
        """Take the steps of one chunk, in each environment until its episode ends.

        Args:
            actions: ``[N, T, A]`` in the units of the action feature.
            active: ``[N]`` bool: which environments to step; None for all. Ended ones are never stepped.
        """
        actions = np.asarray(actions, self.action_feature.dtype)
        shape = self.action_feature.shape
        if (
            actions.ndim != 2 + len(shape)
            or actions.shape[0] != self.num_envs
            or actions.shape[2:] != shape
            or not actions.shape[1]
        ):
            raise TaskError(f"VectorEnv.step: actions have shape {actions.shape}; expected ({self.num_envs}, T >= 1, {shape[0]})")
        stepping = np.ones(self.num_envs, bool) if active is None else np.asarray(active, bool)
        if stepping.shape != (self.num_envs,):
            raise TaskError(f"VectorEnv.step: active has shape {stepping.shape}; expected ({self.num_envs},)")
        if not self._started[stepping].all():
            raise TaskError(
                f"VectorEnv.step: environment {int(np.argmax(stepping & ~self._started))} was never reset; reset it first"
            )
        stepping = stepping & ~(self._buffers.terminated | self._buffers.truncated)
        bad = stepping & ~np.isfinite(actions).all(axis=(1, 2))
        if bad.any():
            raise TaskError(
                f"VectorEnv.step: the actions of environment {int(np.argmax(bad))} are not finite; the policy diverged"
            )

        num_steps = actions.shape[1]
        if num_steps > self._buffers.capacity:
            self._buffers = _Buffers(self._fd, self._signature, self.num_envs, num_steps)
        done = self._buffers
        done.action[:, :num_steps] = actions
        self._call("step", num_steps, done.capacity, stepping.tolist())
        return ChunkStep(
            obs={name: rows[:, :num_steps].copy() for name, rows in done.obs.items()},
            reward=done.reward[:, :num_steps].copy(),
            success=done.success[:, :num_steps].copy(),
            length=done.length.copy(),
            terminated=done.terminated.copy(),
            truncated=done.truncated.copy(),
        )

    def render(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Frames ``[H, W, 3]`` uint8 of the environments named, in that order."""
        frames: dict[int, np.ndarray] = {}
        for part in self._call("render", [int(i) for i in indices]):
            frames.update(part)
        return [frames[int(i)] for i in indices]

    def close(self) -> None:
        """End the workers and free the memory. May be called twice."""
        if self._slab is not None and self._finalizer.alive:
            self._slab.close()
        self._finalizer()

    def __enter__(self) -> VectorEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Have every slab do the same; its answers in order."""
        if not self._finalizer.alive:
            raise TaskError("VectorEnv is closed, by close() or by an error; make a new one")
        if self._slab is not None:
            return [getattr(self._slab, method)(*args)]
        with self._closing_on_failure():
            for worker in self._workers:
                worker.send(method, *args)
            return [worker.receive() for worker in self._workers]

    @contextlib.contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        """After an exception, Ctrl-C included, questions and answers may be out of step: end the workers at once."""
        try:
            yield
        except BaseException:
            for worker in self._workers:
                worker.process.kill()
            self._finalizer()
            raise
