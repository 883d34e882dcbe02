"""Opening and reading single zarr arrays, with damage turned into one line that names the array."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import zarr
from zarr.abc.store import Store

from robopolicy.data.layout import REPAIR, ZarrFormat
from robopolicy.errors import DataError


def open_array(store: Store, path: str, zarr_format: ZarrFormat, mode: Literal["r", "r+"] = "r") -> Any:
    """A zarr array whose metadata :func:`robopolicy.data.layout.scan` found safe. Raises DataError when zarr cannot use it."""
    try:
        array = zarr.open_array(store, path=path, mode=mode, zarr_format=zarr_format)
        # Missing chunks must stay recognisable as damage, so all-zero chunks are written too.
        return array.with_config({"write_empty_chunks": True})
    except Exception as error:  # whatever zarr and the codecs raise on settings they do not like
        raise DataError(f"{path}: metadata that zarr cannot use ({_line(error)}); restore it from a copy, or {REPAIR}") from error


def read_rows(array: Any, path: str, start: int, stop: int) -> np.ndarray:
    """Rows ``start:stop``. Raises DataError when they cannot be decoded."""
    try:
        return np.asarray(array[start:stop])
    except MemoryError:
        raise
    except Exception as error:  # a codec may raise anything on damaged bytes
        raise DataError(
            f"{path}: steps {start}:{stop} cannot be decoded ({_line(error)}); {REPAIR}, it keeps the rest"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
