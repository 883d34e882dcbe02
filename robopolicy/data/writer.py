"""``EpisodeWriter``: record an episode step by step without the control loop ever waiting for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Literal

import numpy as np

from robopolicy.data.episodes import Episodes, check_values
from robopolicy.errors import DataError, nearest

_Block = dict[str, np.ndarray]
_Request = tuple[Literal["commit", "discard", "stop"], Future[int]]


class EpisodeWriter:
    """Streams steps into a store opened with ``mode="a"``.

    ``add`` copies the step into a block in memory; a thread writes full blocks behind the published shape of the store, where no
    reader sees them, and ``commit`` publishes the episode. Killed at any instant, at most the episode in progress is lost.
    Use as a context manager: leaving it drops an uncommitted episode and stops the thread; the store stays open.

    Args:
        episodes: The store; append to it through this writer only, while it lives.
        block: Steps per block.
        max_blocks: Blocks that may wait for the disk before ``add`` gives up.
        wait: Then wait for the disk instead: of steps that come from files, which time does not lose.
    """

    def __init__(self, episodes: Episodes, block: int = 32, max_blocks: int = 32, *, wait: bool = False) -> None:
        self._episodes = episodes
        self._size, self._wait = block, wait
        self._queue: queue.Queue[_Block | _Request] = queue.Queue()
        self._waiting = threading.Semaphore(max_blocks)
        self._block: _Block = {}
        self._filled = 0
        self._error: DataError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="episode-writer", daemon=True)
        self._thread.start()

    def add(self, step: Mapping[str, np.ndarray]) -> None:
        """Add one time step, every feature ``[*shape]``. Never waits for the disk, unless asked to.

        Raises:
            DataError: A feature is missing, unknown, of the wrong shape or dtype, or not finite (the step is not added); or an
                earlier block could not be written or too many wait (the episode is lost: call :meth:`discard` and go on).
        """
        self._raise_error()
        features = self._episodes.features
        if step.keys() != features.keys():
            odd = min(step.keys() ^ features.keys())
            raise DataError(
                f"step {'lacks' if odd in features else 'has an undeclared'} feature '{odd}'; {nearest(odd, features)}"
            )
        row = {name: check_values(np.asarray(step[name])[None], feature)[0] for name, feature in features.items()}
        if not self._block:
            self._block = {name: np.empty((self._size, *f.shape), f.dtype) for name, f in features.items()}
        for name, value in row.items():
            self._block[name][self._filled] = value
        self._filled += 1
        if self._filled == self._size:
            self._hand_over()

    def commit(self) -> int:
        """End the episode; returns its index once it is safely on disk. Raises DataError when it could not be written."""
        self._raise_error()
        if self._filled:
            self._hand_over()
        return self._request("commit")

    def discard(self) -> None:
        """Drop the episode in progress, and the error that ended it, if any."""
        self._block, self._filled = {}, 0
        self._request("discard")
        self._error = None

    def close(self) -> None:
        """Drop an uncommitted episode and stop the thread."""
        if not self._closed:
            self.discard()
            self._request("stop")
            self._thread.join()
            self._closed = True

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _raise_error(self) -> None:
        if self._closed:
            raise DataError("the episode writer is closed; make a new one")
        if self._error is not None:
            raise DataError(
                f"{self._error}; the episode in progress is lost, call discard() and record it again"
            ) from self._error

    def _hand_over(self) -> None:
        if not self._waiting.acquire(blocking=self._wait):
            self._error = DataError(f"'{self._episodes.path}': the disk is too slow for this rate and image size")
            self._raise_error()
        block = {name: values[: self._filled] for name, values in self._block.items()}
        self._block, self._filled = {}, 0
        self._queue.put(block)

    def _request(self, what: Literal["commit", "discard", "stop"]) -> int:
        answer: Future[int] = Future()
        self._queue.put((what, answer))
        return answer.result()

    def _work(self) -> None:
        """The thread: the only one that touches the store."""
        while True:
            item = self._queue.get()
            if isinstance(item, dict):
                self._waiting.release()
                if self._error is None:
                    try:
                        self._episodes.extend(item)
                    except DataError as error:
                        self._error = error
                    except Exception as error:  # nothing may end this thread silently: the next commit would wait for ever
                        self._error = DataError(f"'{self._episodes.path}': writing failed ({type(error).__name__}: {error})")
                continue
            what, answer = item
            try:
                if what == "commit":
                    if self._error is not None:
                        raise self._error
                    answer.set_result(self._episodes.commit())
                else:
                    self._episodes.rollback()
                    answer.set_result(-1)
            except Exception as error:  # handed to the thread that asked
                answer.set_exception(error)
            if what == "stop":
                return
