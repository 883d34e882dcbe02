"""``Windows``: training samples cut from episodes, as vectorised gathers into pooled buffers.

A window is ``horizon`` consecutive steps. The first ``n_obs_steps`` are observed; row 0 of the action chunk belongs to the OLDEST
observation. Windows overlap both ends of an episode by ``n_obs_steps - 1`` steps before and ``n_action_steps - 1`` after, filled
by repeating the edge, so that the first and the last step of an episode are trained as they will be executed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from robopolicy.data.cache import frames
from robopolicy.data.episodes import Episodes
from robopolicy.errors import DataError, nearest

IN_MEMORY_BYTES = 2**30  # larger features are memory mapped, as images always are


class Batch(TypedDict):
    """What :meth:`Windows.batch` returns. ``obs[name]``: ``[B, n_obs_steps, *shape]``, uint8 images, float32 otherwise."""

    obs: dict[str, np.ndarray]
    action: np.ndarray  # float32 [B, horizon, A]
    action_is_pad: np.ndarray  # bool [B, horizon]; True where a row repeats the edge of the episode


class Pool:
    """Buffers that are used again once nobody holds them.

    Page faults of fresh megabyte arrays cost several times the copy into them. A buffer is free when the pool holds the only
    reference; views and tensors made from it count as holders.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        probe = [np.empty(0)]
        self._free_count = sys.getrefcount(probe[0])  # references to a buffer that only a list holds, as counted below
        self._buffers: dict[tuple[tuple[int, ...], np.dtype[Any]], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        with self._lock:
            buffers = self._buffers.setdefault((shape, dtype), [])
            for index in range(len(buffers)):
                if sys.getrefcount(buffers[index]) == self._free_count:
                    return buffers[index]
            buffer = np.empty(shape, dtype)
            if len(buffers) < 16:
                buffers.append(buffer)
            return buffer


def window_table(ends: np.ndarray, n_obs_steps: int, horizon: int, n_action_steps: int, episode_ids: np.ndarray) -> np.ndarray:
    """All windows of the chosen episodes, in order.

    Args:
        ends: Cumulative ends of all episodes, int64 ``[E]``.
        n_obs_steps, horizon, n_action_steps: Lengths in steps.
        episode_ids: Episodes to cut, int64.

    Returns:
        int64 ``[W, 3]``: first step of the window (it may lie before its episode), first and past-the-end step of the episode.
    """
    rows: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
    for episode in episode_ids.tolist():
        low, high = int(ends[episode - 1]) if episode else 0, int(ends[episode])
        first = np.arange(low - (n_obs_steps - 1), high - horizon + n_action_steps, dtype=np.int64)
        rows.append(np.stack([first, np.full_like(first, low), np.full_like(first, high)], axis=1))
    return np.concatenate(rows)


def split_episodes(n: int, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Episode numbers for training and validation, disjoint, sorted; at least one each if ``val_fraction > 0`` and ``n > 1``."""
    count = 0 if val_fraction <= 0 or n < 2 else min(max(1, round(n * val_fraction)), n - 1)
    chosen = np.random.default_rng(seed).permutation(n)[:count]
    is_val = np.zeros(n, bool)
    is_val[chosen] = True
    return np.flatnonzero(~is_val).astype(np.int64), np.flatnonzero(is_val).astype(np.int64)


class Windows:
    """Random access to windows of a store.

    Args:
        episodes: The demonstrations.
        obs: Names of the observed features.
        action: Name of the action feature.
        n_obs_steps, horizon, n_action_steps: Lengths in steps.
        episode_ids: Which episodes; default all.
        cache_dir: Where decoded images are kept; default beside the store.

    Raises:
        DataError: A feature is unknown, lengths do not fit, the data are not finite, or no episode is long enough.
    """

    def __init__(
        self,
        episodes: Episodes,
        obs: Sequence[str],
        action: str,
        n_obs_steps: int,
        horizon: int,
        n_action_steps: int,
        episode_ids: np.ndarray | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if min(n_obs_steps, n_action_steps) < 1 or n_obs_steps - 1 + n_action_steps > horizon:
            raise DataError(
                f"windows: n_obs_steps {n_obs_steps} - 1 + n_action_steps {n_action_steps} must fit into horizon {horizon}, "
                "all at least 1"
            )
        for name in (*obs, action):
            if name not in episodes.features:
                raise DataError(f"'{episodes.path}' has no feature '{name}'; {nearest(name, episodes.features)}")
        ids = np.arange(len(episodes)) if episode_ids is None else np.asarray(episode_ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(episodes)):
            raise DataError(f"windows: episode {ids.max()} or {ids.min()} is outside 0:{len(episodes)} of '{episodes.path}'")
        self.episodes, self.obs, self.action = episodes, tuple(obs), action
        self.n_obs_steps, self.horizon, self.n_action_steps = n_obs_steps, horizon, n_action_steps
        self.episode_ids = ids
        self.table = window_table(episodes.ends, n_obs_steps, horizon, n_action_steps, ids)
        if not len(self.table):
            raise DataError(
                f"'{episodes.path}': none of its {len(ids)} episodes is long enough for horizon {horizon}; "
                "shorten the horizon or record more"
            )
        self._arrays = {name: _load(episodes, name, cache_dir) for name in dict.fromkeys((*self.obs, action))}
        if self._arrays[action].dtype != np.float32:
            self._arrays[action] = self._arrays[action].astype(np.float32)
        self._pool = Pool()

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, indices: np.ndarray, *, images: bool = True) -> Batch:
        """The windows ``indices [B]``; ``images=False`` leaves image observations out.

        The arrays come from a pool: one is filled again only after every reference to it (views and tensors included) is gone.
        """
        first, low, high = self.table[indices].T
        steps = first[:, None] + np.arange(self.horizon)
        inside = np.clip(steps, low[:, None], high[:, None] - 1)
        observed = inside[:, : self.n_obs_steps]
        names = [n for n in self.obs if images or not self.episodes.features[n].is_image]
        return {
            "obs": {name: self._gather(name, observed) for name in names},
            "action": self._gather(self.action, inside),
            "action_is_pad": steps != inside,
        }

    def _gather(self, name: str, steps: np.ndarray) -> np.ndarray:
        source = self._arrays[name]
        out = self._pool.take((*steps.shape, *source.shape[1:]), source.dtype)
        # "clip" spares numpy the copy that bounds checking into `out` costs; steps are inside by construction.
        np.take(source, steps, axis=0, out=out, mode="clip")
        return out


def _load(episodes: Episodes, name: str, cache_dir: str | Path | None) -> np.ndarray:
    """The whole feature: images and very large features memory mapped, others in RAM as float32."""
    feature = episodes.features[name]
    if feature.is_image or feature.size * 4 * episodes.num_steps > IN_MEMORY_BYTES:
        return frames(episodes, name, cache_dir)
    values = np.empty((episodes.num_steps, *feature.shape), np.float32)
    start = 0
    for block in episodes.blocks(name):
        if block.dtype.kind == "f" and not np.isfinite(block).all():
            row = start + int(np.argmin(np.isfinite(block.reshape(len(block), -1)).all(axis=1)))
            raise DataError(
                f"'{episodes.path}': feature '{name}' holds NaN or infinity at step {row}; "
                "run `robopolicy data repair` to drop that episode"
            )
        values[start : start + len(block)] = block
        start += len(block)
    return values
