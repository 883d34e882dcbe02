"""What is in a store: its arrays and attributes, read from the metadata alone, before zarr or a codec touches anything.

Everything odd becomes a :class:`Problem`, so that opening a store (which stops at the first error) and `robopolicy data check`
(which lists them all) say the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from robopolicy.data.store import METADATA, TEMPORARY, Files
from robopolicy.errors import DataError
from robopolicy.features import Feature

ZarrFormat = Literal[2, 3]

SCHEMA = 1  # version of what we write under the attribute ROOT_KEY
ROOT_KEY = "robopolicy"
ENDS = "meta/episode_ends"

# Codecs that only transform bytes. Anything else (above all pickle and object codecs, which execute what they read) is refused.
_PLAIN = {"blosc", "zlib", "gzip", "bz2", "lzma", "lz4", "zstd", "crc32", "crc32c", "adler32", "fletcher32"}
_PLAIN |= {"delta", "shuffle", "fixedscaleoffset", "quantize", "bitround", "packbits"}
_PLAIN |= {"bytes", "transpose", "sharding_indexed"}
_IMAGE_PREFIX = "imagecodecs_"  # lossless and lossy image compression, registered by the package imagecodecs
_OBJECT_CODECS = {"pickle", "json2", "msgpack2", "vlen-utf8", "vlen-bytes", "vlen-array", "categorize"}
_MAX_BYTES = 2**56


@dataclass(frozen=True)
class Problem:
    """One finding: ``error`` makes the store unusable as declared, ``warning`` is odd and may be meant."""

    severity: Literal["error", "warning"]
    where: str  # array, attribute or file
    text: str  # what was found, what was expected
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}; {self.mend}"


@dataclass(frozen=True)
class ArrayInfo:
    """One array as its metadata declares it."""

    path: str
    zarr_format: ZarrFormat
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    prefix: str  # of chunk keys: "" in format 2, "c" in format 3
    separator: str
    codecs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def chunk_key(self, index: tuple[int, ...]) -> str:
        """Key below the array of the chunk at ``index`` of the chunk grid."""
        parts = ([self.prefix] if self.prefix else []) + [str(i) for i in index]
        return self.separator.join(parts)

    def chunk_keys(self) -> Iterator[str]:
        """Keys of all chunks that the shape calls for."""
        counts = [math.ceil(n / c) for n, c in zip(self.shape, self.chunks, strict=True)]
        for index in product(*(range(n) for n in counts)):
            yield self.chunk_key(index)

    def first_index(self, key: str) -> int | None:
        """Chunk index along time of a key below the array; None when the key names no chunk."""
        parts = key.split(self.separator)
        if self.prefix and parts[:1] == [self.prefix]:
            parts = parts[1:]
        if len(parts) != len(self.shape) or not all(p.isdecimal() for p in parts):
            return None
        return int(parts[0])


@dataclass
class Layout:
    """What :func:`scan` found."""

    zarr_format: ZarrFormat = 3
    attributes: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, ArrayInfo] = field(default_factory=dict)  # of data/, by name
    ends: ArrayInfo | None = None
    features: dict[str, Feature] | None = None  # declared; None in a foreign store
    provenance: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def error(self, where: str, text: str, mend: str) -> None:
        self.problems.append(Problem("error", where, text, mend))

    def warning(self, where: str, text: str, mend: str) -> None:
        self.problems.append(Problem("warning", where, text, mend))

    @property
    def blosc(self) -> frozenset[str]:
        """Paths of the arrays whose chunks are Blosc containers."""
        arrays = [*self.arrays.values(), *([self.ends] if self.ends else [])]
        return frozenset(a.path for a in arrays if a.codecs and a.codecs[-1].removeprefix("numcodecs.") == "blosc")

    @property
    def errors(self) -> list[Problem]:
        return [p for p in self.problems if p.severity == "error"]


REPAIR = "run `robopolicy data repair`"
RESTORE = "restore the file from a copy, or run `robopolicy data repair` to drop what it damaged"


def scan(files: Files) -> Layout:
    """Read all metadata. Raises DataError only when the path holds no zarr hierarchy at all; the rest goes into ``problems``."""
    layout = Layout()
    top = files.children("")
    if "zarr.json" in top:
        layout.zarr_format = 3
        root = _json(files, "zarr.json", layout)
        layout.attributes = _mapping(root.get("attributes", {}), "zarr.json attributes", layout)
        if root and root.get("node_type") != "group":
            layout.error(
                "zarr.json",
                f"the root is {root.get('node_type')!r}, not a group",
                "point to the folder that holds data/ and meta/",
            )
    elif ".zgroup" in top or ("data" in top and "meta" in top):
        layout.zarr_format = 3 if "zarr.json" in files.children("data") else 2
        root_file = "zarr.json" if layout.zarr_format == 3 else ".zgroup"
        if ".zgroup" in top:
            _json(files, ".zgroup", layout)
        else:
            layout.error(root_file, "absent from the root, and the declared features with it", REPAIR)
        layout.attributes = _json(files, ".zattrs", layout) if ".zattrs" in top else {}
    else:
        raise DataError(
            f"'{files.path}' holds no zarr group (neither zarr.json nor .zgroup); "
            "expected a store with data/ and meta/episode_ends"
        )
    layout.ends = _ends(files, layout)  # before the data: a writer publishes it last, so what it names is there by then
    for name in files.children("data"):
        if name in METADATA or name.startswith("."):
            continue
        info = _array(files, f"data/{name}", layout)
        if info is not None:
            layout.arrays[name] = info
    if not layout.arrays and not layout.errors:
        layout.error(
            "data", "holds no arrays", "record at least an observation and an action, each as data/<name> with time on axis 0"
        )
    _declared(layout)
    return layout


def missing_chunks(files: Files, info: ArrayInfo, steps: int | None = None) -> list[str]:
    """Keys of chunks that the first ``steps`` (default: all) call for and the store lacks; zarr reads them as the fill value.

    Beyond the last episode gaps mean nothing: a writer killed while it removed what its predecessor left makes them.
    """
    if steps is not None:
        info = replace(info, shape=(min(steps, info.shape[0]), *info.shape[1:]))
    prefix = len(info.path) + 1
    present = {key[prefix:] for key, _, _ in files.walk(info.path)}
    return [key for key in info.chunk_keys() if key not in present]


def stale_files(files: Files, info: ArrayInfo) -> list[str]:
    """Keys left behind by killed writers: temporary files, and chunks wholly beyond the shape."""
    keys = []
    last = math.ceil(info.shape[0] / info.chunks[0])
    for key, _, _ in files.walk(info.path):
        index = info.first_index(key[len(info.path) + 1 :])
        if key.endswith(TEMPORARY) or (index is not None and index >= last):
            keys.append(key)
    return keys


def _json(files: Files, key: str, layout: Layout) -> dict[str, Any]:
    try:
        content = files.read(key)
    except DataError as error:
        layout.error(key, str(error), RESTORE)
        return {}
    if content is None:
        layout.error(key, "metadata file is absent", RESTORE)
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        layout.error(key, f"metadata is not valid JSON ({error})", RESTORE)
        return {}
    return _mapping(value, key, layout)


def _mapping(value: Any, where: str, layout: Layout) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    layout.error(where, f"holds a {type(value).__name__}; expected a mapping", RESTORE)
    return {}


def _array(files: Files, path: str, layout: Layout) -> ArrayInfo | None:
    """The array at ``path``; None, with a problem noted, when there is none that can be read safely."""
    names = files.children(path)
    if "zarr.json" in names:
        if layout.zarr_format == 2:
            layout.error(path, "zarr format 3 inside a format 2 store", "convert the store with its own software, or re-record")
            return None
        value = _json(files, f"{path}/zarr.json", layout)
        parse = _parse_v3
    elif ".zarray" in names:
        if layout.zarr_format == 3:
            layout.error(path, "zarr format 2 inside a format 3 store", "convert the store with its own software, or re-record")
            return None
        value = _json(files, f"{path}/.zarray", layout)
        parse = _parse_v2
    elif ".zgroup" in names:
        layout.warning(path, "a group inside data/; only arrays directly under data/ are read", "move its arrays up")
        return None
    else:
        layout.error(path, "no array metadata (.zarray or zarr.json)", "delete the folder, or restore its metadata from a copy")
        return None
    if not value:
        return None
    if parse is _parse_v3 and value.get("node_type") == "group":
        layout.warning(path, "a group inside data/; only arrays directly under data/ are read", "move its arrays up")
        return None
    try:
        return _checked(parse(path, value))
    except _BadMetadata as error:
        layout.error(path, error.text, error.mend)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        layout.error(path, f"metadata lacks or garbles {error}", RESTORE)
    return None


class _BadMetadata(Exception):
    def __init__(self, text: str, mend: str) -> None:
        super().__init__(text)
        self.text, self.mend = text, mend


def _parse_v2(path: str, value: Mapping[str, Any]) -> ArrayInfo:
    raw = value["dtype"]
    codecs = [codec["id"] for codec in [*(value.get("filters") or []), value.get("compressor")] if codec]
    return ArrayInfo(
        path=path,
        zarr_format=2,
        shape=tuple(value["shape"]),
        chunks=tuple(value["chunks"]),
        dtype=_dtype(raw, codecs),
        prefix="",
        separator=value.get("dimension_separator", "."),
        codecs=tuple(codecs),
    )


def _parse_v3(path: str, value: Mapping[str, Any]) -> ArrayInfo:
    codecs: list[str] = []
    for codec in value["codecs"]:
        codecs.append(codec["name"])
        if codec["name"] == "sharding_indexed":
            codecs += [
                inner["name"] for inner in [*codec["configuration"]["codecs"], *codec["configuration"].get("index_codecs", [])]
            ]
    encoding = value["chunk_key_encoding"]
    if encoding["name"] not in ("default", "v2"):
        raise _BadMetadata(f"chunk key encoding '{encoding['name']}' is unknown", "rewrite the store with the encoding 'default'")
    default = encoding["name"] == "default"
    return ArrayInfo(
        path=path,
        zarr_format=3,
        shape=tuple(value["shape"]),
        chunks=tuple(value["chunk_grid"]["configuration"]["chunk_shape"]),
        dtype=_dtype(value["data_type"], codecs),
        prefix="c" if default else "",
        separator=encoding.get("configuration", {}).get("separator", "/" if default else "."),
        codecs=tuple(codecs),
    )


def _dtype(raw: Any, codecs: list[str]) -> np.dtype[Any]:
    """A plain number type, with the codecs checked too: both are what could smuggle in objects."""
    for codec in codecs:
        plain = codec.removeprefix("numcodecs.") if isinstance(codec, str) else ""
        if plain in _OBJECT_CODECS:
            raise _BadMetadata(
                f"codec '{plain}' stores Python objects, which are never read",
                "rewrite the array as plain numbers, or drop it with `robopolicy data repair`",
            )
        if plain not in _PLAIN and not plain.startswith(_IMAGE_PREFIX):
            raise _BadMetadata(f"codec {codec!r} is unknown", "rewrite the array with Blosc, zstd or gzip compression")
    mend = "rewrite the array as plain numbers (float32, uint8, ...), or drop it with `robopolicy data repair`"
    if raw in ("|O", "O", "object"):
        raise _BadMetadata("object dtype, whose reading could run code and is refused", mend)
    try:
        dtype = np.dtype(raw) if isinstance(raw, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise _BadMetadata(f"dtype {raw!r} is no plain number type", mend)
    return dtype


def _checked(info: ArrayInfo) -> ArrayInfo:
    for what, value, least in (("shape", info.shape, 0), ("chunks", info.chunks, 1)):
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in value):
            raise _BadMetadata(f"{what} {list(value)} is not a list of integers of at least {least}", RESTORE)
    if len(info.shape) != len(info.chunks):
        raise _BadMetadata(f"{len(info.chunks)} chunk lengths for {len(info.shape)} axes", RESTORE)
    if not info.shape:
        raise _BadMetadata(
            "a scalar; arrays need time on axis 0", "move it to the attributes, or drop it with `robopolicy data repair`"
        )
    if 0 in info.shape[1:]:
        raise _BadMetadata(f"shape {info.shape} has an empty axis", "drop the array with `robopolicy data repair`")
    if math.prod(info.shape) * info.dtype.itemsize > _MAX_BYTES or math.prod(info.chunks) * info.dtype.itemsize > 2**33:
        raise _BadMetadata(f"shape {info.shape} in chunks of {info.chunks} is beyond any real recording", RESTORE)
    if info.separator not in (".", "/"):
        raise _BadMetadata(f"chunk separator {info.separator!r}; expected '.' or '/'", RESTORE)
    return info


def _ends(files: Files, layout: Layout) -> ArrayInfo | None:
    if "episode_ends" not in files.children("meta"):
        layout.error(ENDS, "absent, so nothing says where episodes end", f"{REPAIR} to take all steps as one episode")
        return None
    info = _array(files, ENDS, layout)
    if info is None:
        return None
    if len(info.shape) != 1:
        layout.error(ENDS, f"shape {info.shape}; expected one axis, (episodes,)", REPAIR)
        return None
    if info.dtype.kind not in "iu":
        layout.error(ENDS, f"dtype {info.dtype}; expected int64", REPAIR)
        return None
    if info.dtype != np.int64:
        layout.warning(ENDS, f"dtype {info.dtype}; the layout says int64", "harmless here; `robopolicy data repair` rewrites it")
    return info


def _declared(layout: Layout) -> None:
    """Compare the features declared in the attributes with the arrays."""
    ours = layout.attributes.get(ROOT_KEY)
    if ours is None:
        return
    where = f"attribute '{ROOT_KEY}'"
    ours = _mapping(ours, where, layout)
    if ours.get("schema") != SCHEMA:
        layout.error(
            where,
            f"schema version {ours.get('schema')!r}; this version reads {SCHEMA}",
            "update robopolicy, or restore the attributes",
        )
        return
    layout.provenance = _mapping(ours.get("provenance", {}), f"{where} provenance", layout)
    layout.features = {}
    for name, value in _mapping(ours.get("features", {}), f"{where} features", layout).items():
        try:
            feature = Feature.from_json(name, _mapping(value, f"feature '{name}'", layout))
        except DataError as error:
            layout.error(f"{where} features", str(error), "correct the declaration in the root attributes")
            continue
        layout.features[name] = feature
        info = layout.arrays.get(name)
        if info is None:
            if not any(p.where == f"data/{name}" for p in layout.errors):
                layout.error(
                    f"data/{name}",
                    "declared as a feature but absent",
                    "restore the array, or `robopolicy data repair` to drop the feature",
                )
        elif info.shape[1:] != feature.shape:
            layout.error(
                info.path,
                f"shape per step {info.shape[1:]}, declared {feature.shape}",
                "correct the declaration, or `robopolicy data repair` to re-declare",
            )
        elif info.dtype != np.dtype(feature.dtype):
            layout.error(
                info.path,
                f"dtype {info.dtype}, declared {feature.dtype}",
                "correct the declaration, or `robopolicy data repair` to re-declare",
            )
    if not layout.features and not layout.errors:
        layout.error(f"{where} features", "declares no features", "declare each array of data/ with its shape, dtype and unit")
    for name in sorted(set(layout.arrays) - set(layout.features)):
        layout.warning(
            f"data/{name}", "not declared as a feature, so it is left out", "declare it in the root attributes or delete it"
        )
