"""``meta/episode_ends``: reading it, and what can be wrong with it."""

from __future__ import annotations

import numpy as np
from zarr.abc.store import Store

from robopolicy.data.arrays import open_array, read_rows
from robopolicy.data.layout import ENDS, REPAIR, Layout
from robopolicy.errors import DataError


def read_ends(store: Store, layout: Layout) -> np.ndarray:
    """Values of ``meta/episode_ends`` as the scanned metadata counts them; empty, with a problem noted, when unreadable."""
    if layout.ends is None:
        return np.zeros(0, np.int64)
    try:
        array = open_array(store, ENDS, layout.zarr_format)
        return read_rows(array, ENDS, 0, layout.ends.shape[0]).astype(np.int64)
    except DataError as error:
        reason = str(error).removeprefix(f"{ENDS}: ").partition(";")[0]
        layout.error(ENDS, reason, "restore it from a copy; without it nothing says where episodes end")
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
