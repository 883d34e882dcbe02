"""Decode a feature once into a memory map, so that training reads random frames at the speed of memory.

Reading random windows through zarr decompresses whole chunks for two frames. A decoded copy on disk, memory mapped, makes that a
copy of the bytes wanted, and the operating system keeps in memory what fits.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from robopolicy.data.episodes import Episodes
from robopolicy.data.layout import ENDS
from robopolicy.data.store import open_files, sync_path
from robopolicy.errors import DataError

_SPARE = 2**28  # bytes to leave free on the disk


def frames(episodes: Episodes, name: str, cache_dir: str | Path | None = None) -> np.ndarray:
    """A read-only memory map ``[num_steps, *shape]`` of one feature, built when absent or stale.

    Args:
        episodes: The store.
        name: The feature.
        cache_dir: Where to keep the file. Default: ``<store>.frames`` beside the store, or the user's cache directory when
            that is not writable.

    Raises:
        DataError: The disk is too full, or the store cannot be decoded.
    """
    folder = _folder(episodes.path, cache_dir)
    recipe, content = _fingerprints(episodes, name)
    path = folder / f"{name}-{recipe}-{content}.npy"
    if not path.exists():
        _build(episodes, name, path)
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _folder(store: Path, cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        folder = Path(cache_dir)
    elif os.access(store.parent, os.W_OK):
        folder = store.parent / f"{store.name}.frames"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        where = hashlib.blake2b(str(store.resolve()).encode(), digest_size=4).hexdigest()
        folder = base / "robopolicy" / f"{store.name}-{where}.frames"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the frame cache '{folder}' ({error}); set data.cache_dir to a writable folder") from error
    return folder


def _fingerprints(episodes: Episodes, name: str) -> tuple[str, str]:
    """Digests of how the feature is read, and of the files it is read from (names, sizes, and CRCs or times of change)."""
    mapped = episodes.mapped[name]
    recipe = hashlib.blake2b(
        repr((mapped.key, mapped.columns, mapped.feature.shape, mapped.feature.dtype)).encode(), digest_size=4
    )
    content = hashlib.blake2b(episodes.ends.tobytes(), digest_size=8)
    files = open_files(episodes.path)
    for entry in sorted([*files.walk(f"data/{mapped.key}"), *files.walk(ENDS)]):
        content.update(repr(entry).encode())
    return recipe.hexdigest(), content.hexdigest()


def _build(episodes: Episodes, name: str, path: Path) -> None:
    """Decode into a temporary file, then rename. A file under the final name is always complete."""
    feature = episodes.features[name]
    dtype = np.dtype(feature.dtype)
    shape = (episodes.num_steps, *feature.shape)
    family = path.name.rpartition("-")[0]
    temporary = path.with_name(f"{family}.partial")
    # A file of its own, never renamed or removed: whoever waits for it waits for the same file as those who come later.
    with path.with_name(f"{family}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builder at a time; a killed builder's lock vanishes and its file is overwritten
        if path.exists():
            return
        needed, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(path.parent).free
        if needed + _SPARE > free:
            raise DataError(
                f"decoding '{name}' of '{episodes.path}' needs {needed / 1e9:.1f} GB in '{path.parent}', which has "
                f"{free / 1e9:.1f} GB free; free some space or set data.cache_dir to another disk"
            )
        try:
            with temporary.open("wb") as file, tqdm(total=shape[0], desc=f"decode {name}", unit="step", leave=False) as bar:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for block in episodes.blocks(name):
                    file.write(np.ascontiguousarray(block).data)
                    bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"cannot write the frame cache '{path}' ({error}); free some space or set data.cache_dir") from error
        for stale in path.parent.glob(f"{family}-*.npy"):
            stale.unlink(missing_ok=True)  # a process that maps it keeps its pages
        temporary.rename(path)
        sync_path(path.parent)
