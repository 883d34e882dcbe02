"""``Feature``: the declaration of one thing that a robot sees or does, with its shape, unit and rate.

Datasets store features in their attributes, tasks and robots declare them, checkpoints carry them. Comparing two declarations
is how the project notices degrees where radians were meant, before an arm does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from robopolicy.errors import DataError

if TYPE_CHECKING:
    import numpy as np

DTYPES = ("float32", "float64", "uint8", "uint16", "int8", "int16", "int32", "int64", "bool")


@dataclass(frozen=True)
class Feature:
    """One observation or action, as it is at ONE time step.

    Attributes:
        name: Key in observation dictionaries and under ``data/`` in a store, for example ``agent_pos``.
        shape: Shape at one time step, without batch or time. Images are ``(H, W, 3)``.
        dtype: One of :data:`DTYPES`; images are ``uint8``.
        unit: SI unit (``m``, ``rad``, ``m/s``, ``N``), ``px``, ``rot6d``, ``quat_xyzw``, or ``1`` for none. Empty: unknown.
            Mixed units are listed per entry, separated by commas: ``m,m,m,rad``.
        names: Optional names of the entries along the last axis, for example joint names.
        rate: Nominal rate in Hz; None when unknown.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    unit: str = ""
    names: tuple[str, ...] = ()
    rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "names", tuple(self.names))
        if any(n < 1 for n in self.shape):
            raise DataError(f"feature '{self.name}': shape {self.shape} has an empty axis; every axis must be at least 1")
        if self.dtype not in DTYPES:
            raise DataError(f"feature '{self.name}': dtype '{self.dtype}' is not supported; use one of {', '.join(DTYPES)}")
        if self.names and (not self.shape or len(self.names) != self.shape[-1]):
            raise DataError(
                f"feature '{self.name}': {len(self.names)} names for shape {self.shape}; give one per entry of the last axis"
            )
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise DataError(f"feature '{self.name}': rate {self.rate} is not a positive number of Hz")

    def __str__(self) -> str:
        """For messages: ``float32 [3] in m``."""
        return f"{self.dtype} {list(self.shape)}" + (f" in {self.unit}" if self.unit else "")

    @property
    def is_image(self) -> bool:
        """True for ``uint8`` arrays of shape ``(H, W, 1 or 3)``."""
        return self.dtype == "uint8" and len(self.shape) == 3 and self.shape[-1] in (1, 3)

    @property
    def size(self) -> int:
        """Number of entries at one time step."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "unit": self.unit, "names": list(self.names), "rate": self.rate}

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Feature:
        """Read what :meth:`to_json` wrote. Raises DataError when a key is missing, unknown or of the wrong type."""
        unknown = set(value) - {"shape", "dtype", "unit", "names", "rate"}
        if unknown or "shape" not in value:
            raise DataError(f"feature '{name}': declaration has keys {sorted(value)}; expected shape, dtype, unit, names, rate")
        try:
            return cls(
                name=name,
                shape=tuple(value["shape"]),
                dtype=str(value.get("dtype", "float32")),
                unit=str(value.get("unit", "")),
                names=tuple(str(n) for n in value.get("names", ())),
                rate=None if value.get("rate") is None else float(value["rate"]),
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"feature '{name}': declaration {dict(value)} does not parse ({error})") from error


def check_batch(rows: Mapping[str, int]) -> None:
    """Raise DataError unless all observations of a batch, by name, have as many rows as the first."""
    first = next(iter(rows), "")
    for name, count in rows.items():
        if count != rows[first]:
            raise DataError(
                f"observation '{name}' is of a batch of {count}, '{first}' of {rows[first]}; give one row for each robot"
            )


class ActionsError(DataError):
    """A policy answers with NaN or infinity, in any row of a batch; ``actions`` are all that it answered."""

    actions: np.ndarray


def bad_actions(actions: np.ndarray, largest: Mapping[str, float]) -> ActionsError:
    """What is wrong where a policy answers with NaN or infinity; ``largest``: of each observation, the largest entry."""
    row = next(i for i, chunk in enumerate(actions) if not (abs(chunk) < math.inf).all())
    name = max(largest, key=lambda name: largest[name])
    error = ActionsError(
        f"the policy answers row {row} of the batch with NaN or infinity: its training diverged (take an earlier checkpoint), or "
        f"it sees what is far from all that it was trained on (the largest: {largest[name]:.3g} in '{name}'; check that sensor)"
    )
    error.actions = actions
    return error
