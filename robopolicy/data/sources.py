"""``FeatureSource``: how a declared feature is read from an array that was not written for us."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
import yaml

from robopolicy.config import Config
from robopolicy.data.layout import ArrayInfo
from robopolicy.errors import DataError, nearest
from robopolicy.features import DTYPES, Feature

# Number types without a declared counterpart are read as the smallest one that holds them.
_WIDER = {"float16": "float32", "uint32": "int64", "uint64": "int64"}


class FeatureSource(Config):
    """Where a feature comes from, for ``data.features`` in a config.

    Attributes:
        key: Array under ``data/``; default: the feature's own name.
        columns: ``[start, stop]`` of the last axis, when only a part of the array is meant.
        shape: Shape at one time step to reshape to, for example ``[18]`` for key points stored as ``(9, 2)``.
        dtype: Type to convert to. Converting floats to an integer type checks that every value is an integer in range.
        unit, names, rate: As in :class:`robopolicy.features.Feature`.
    """

    key: str | None = None
    columns: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    unit: str = ""
    names: tuple[str, ...] = ()
    rate: float | None = None

    @pydantic.model_validator(mode="after")
    def _valid(self) -> FeatureSource:
        if self.columns is not None and not 0 <= self.columns[0] < self.columns[1]:
            raise ValueError(f"columns {list(self.columns)} is no range; give [start, stop] with 0 <= start < stop")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype '{self.dtype}' is not supported: {nearest(self.dtype, DTYPES)}")
        return self

    def yaml(self) -> dict[str, object]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self if v not in (None, "", ())}


@dataclass(frozen=True)
class Mapped:
    """A feature together with the array and the conversion behind it."""

    feature: Feature
    key: str
    columns: tuple[int, int] | None = None

    def convert(self, raw: np.ndarray) -> np.ndarray:
        """Rows ``[T, *shape]`` of the feature from rows of the array. Raises DataError when a value does not fit the type."""
        if self.columns is not None:
            raw = raw[..., self.columns[0] : self.columns[1]]
        values = raw.reshape(len(raw), *self.feature.shape)
        dtype = np.dtype(self.feature.dtype)
        if values.dtype == dtype:
            return values
        if dtype.kind in "iu":
            self._check_integers(values, np.iinfo(dtype))
        elif dtype.kind == "b":
            self._check_integers(values, np.iinfo("uint8"), most=1)
        return values.astype(dtype)

    def _check_integers(self, values: np.ndarray, info: np.iinfo[Any], most: int | None = None) -> None:
        top = info.max if most is None else most
        if not len(values):
            return
        low, high = values.min(), values.max()  # NaN propagates and fails both comparisons
        whole = values.dtype.kind in "iub" or bool((values == np.rint(values)).all())
        if not (whole and low >= info.min and high <= top):
            scaled = low >= 0 and high <= 1
            mend = "0..1 looks like a scaled image, multiply by 255 first" if scaled else "set another dtype in data.features"
            raise DataError(
                f"feature '{self.feature.name}' (data/{self.key}): values {low}..{high} are not all integers "
                f"in {info.min}..{top}, so {values.dtype} does not convert to {self.feature.dtype}; {mend}"
            )


def map_feature(name: str, source: FeatureSource, arrays: Mapping[str, ArrayInfo], declared: Mapping[str, Feature]) -> Mapped:
    """Resolve one entry of ``data.features``. Raises DataError when the array is absent or the shapes do not fit."""
    key = source.key or name
    info = arrays.get(key)
    if info is None:
        raise DataError(f"data.features.{name}: the store has no array data/{key}; {nearest(key, arrays)}")
    shape = info.shape[1:]
    if source.columns is not None:
        if not shape or source.columns[1] > shape[-1]:
            raise DataError(
                f"data.features.{name}: columns {list(source.columns)} of data/{key}, which has "
                f"{shape[-1] if shape else 'no'} columns; correct the range"
            )
        shape = (*shape[:-1], source.columns[1] - source.columns[0])
    if source.shape is not None:
        if math.prod(source.shape) != math.prod(shape):
            raise DataError(
                f"data.features.{name}: data/{key} has shape {shape} per step, which does not reshape to {source.shape}; "
                "correct the shape"
            )
        shape = source.shape
    same = declared.get(key) if source.columns is None and source.shape is None else None
    feature = Feature(
        name,
        shape,
        source.dtype or _WIDER.get(info.dtype.name, info.dtype.name),
        source.unit or (same.unit if same else ""),
        source.names or (same.names if same else ()),
        source.rate or (declared[key].rate if key in declared else None),
    )
    return Mapped(feature, key, source.columns)


def infer_source(info: ArrayInfo, sample: np.ndarray) -> FeatureSource:
    """A guess for an array without a declaration, from a few of its rows: images stored as floats 0..255 become ``uint8``."""
    image_like = info.dtype.kind == "f" and len(info.shape) == 4 and info.shape[-1] in (1, 3) and min(info.shape[1:3]) >= 8
    if image_like and sample.size and sample.min() >= 0 and 1 < sample.max() <= 255 and bool((sample == np.rint(sample)).all()):
        return FeatureSource(dtype="uint8")
    return FeatureSource()


def features_yaml(mapped: Mapping[str, Mapped]) -> str:
    """A draft of ``data.features`` for a foreign store, to be completed by hand with units, names and the rate."""
    draft: dict[str, object] = {}
    for name, entry in mapped.items():
        source = FeatureSource(key=entry.key, dtype=entry.feature.dtype, rate=entry.feature.rate)
        draft[name] = {**source.yaml(), "unit": entry.feature.unit}
    return yaml.safe_dump({"data": {"features": draft}}, sort_keys=False, default_flow_style=None, width=130)
