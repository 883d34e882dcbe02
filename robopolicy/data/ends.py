"""``meta/episode_ends``: reading it, and what can be wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from robopolicy.data.layout import ENDS, REPAIR, Layout


def read_ends(store: Any, layout: Layout) -> np.ndarray:
    """Values of ``meta/episode_ends`` as the scanned metadata counts them; empty, with a problem noted, when unreadable."""
    if layout.ends is None:
        return np.zeros(0, np.int64)
    try:
        array = zarr.open_array(store, path=ENDS, mode="r", zarr_format=layout.zarr_format)
        return np.asarray(array[: layout.ends.shape[0]]).astype(np.int64)
    except MemoryError:
        raise
    except Exception as error:  # a codec may raise anything on damaged bytes
        layout.error(ENDS, f"cannot be decoded ({error})", "restore it from a copy; without it nothing says where episodes end")
        return np.zeros(0, np.int64)


def check_ends(ends: np.ndarray, layout: Layout, named: set[str] | None = None) -> None:
    """Note what is wrong with the ends, also against the lengths of the arrays (of those ``named``, when given)."""
    steps = np.diff(ends, prepend=0)
    if bad := np.flatnonzero(ends < 0).tolist():
        layout.error(ENDS, f"entry {bad[0]} is negative ({ends[bad[0]]})", f"{REPAIR} to drop those episodes")
    elif bad := np.flatnonzero(steps == 0).tolist():
        layout.error(ENDS, f"episode {bad[0]} has no steps (ends at {ends[bad[0]]} like the one before)", f"{REPAIR} to drop it")
    elif bad := np.flatnonzero(steps < 0).tolist():
        layout.error(
            ENDS,
            f"entry {bad[0]} ({ends[bad[0]]}) is before the one preceding it ({ends[bad[0] - 1]})",
            f"{REPAIR} to drop those episodes",
        )
    last = int(ends.max()) if len(ends) else 0
    for name, info in layout.arrays.items():
        if named is not None and name not in named:
            continue
        if info.shape[0] < last:
            layout.error(info.path, f"{info.shape[0]} steps, but episodes end at {last}", f"{REPAIR} to drop the episodes beyond")
        elif info.shape[0] > last:
            text = f"{info.shape[0] - last} steps beyond the last episode end ({last}); a writer was killed before it ended one"
            layout.warning(info.path, text, "harmless; opening for append or `robopolicy data repair` removes them")
