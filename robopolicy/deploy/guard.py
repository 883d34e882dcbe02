"""``StartGuard``: does the first observation look like those that the policy was trained on? If not, it may not begin.

What the policy knows of its training data is in its normalisers: the range of each entry of each observation. An arm in a pose
that no demonstration was near, metres for millimetres, joints in another order, an object that is not there: all show as an entry
that is out of its range. Images are not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from robopolicy.deploy.safety import Reason
from robopolicy.features import Feature

if TYPE_CHECKING:  # a guard is made of numbers
    from robopolicy.deploy.exported import ExportedPolicy
    from robopolicy.policy import Policy

# What a normaliser of each mode maps the ends of the range to; ``identity`` knows no range.
_ENDS = {"minmax": 1.0, "quantile": 1.0, "meanstd": 3.0}


class Range(NamedTuple):
    """Of an observation in the training data: ``lower`` and ``upper``, one value per entry.

    An entry that never changed is given one unit to either side: normalisers do not keep how constant it was.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]


def trained_ranges(policy: Policy) -> dict[str, Range]:
    """By observation, of those with a range."""
    found = {}
    for name, feature in policy.observation_features.items():
        if feature.is_image or (end := _ENDS.get(policy.normalizer(name).mode)) is None:
            continue
        normalizer = policy.normalizer(name)
        scale, offset = normalizer.scale.double().cpu().numpy(), normalizer.offset.double().cpu().numpy()
        found[name] = Range(tuple(((-end - offset) / scale).tolist()), tuple(((end - offset) / scale).tolist()))
    return found


class StartGuard:
    """Called with an observation, says why the policy may not begin from it: which entries are out of range. () when it may.

    Args:
        ranges: Of the training data, by observation.
        features: Of the observations, for the names of their entries.
        margin: Allowed beyond either end, as a share of the half range.
    """

    def __init__(self, ranges: Mapping[str, Range], features: Mapping[str, Feature], margin: float = 0.5) -> None:
        self.features = dict(features)
        self._bounds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, (low, high) in ranges.items():
            lower, upper = np.array(low), np.array(high)
            room = margin * (upper - lower) / 2
            self._bounds[name] = lower - room, upper + room

    @classmethod
    def of(cls, policy: Policy | ExportedPolicy, margin: float = 0.5) -> Self:
        """The guard of a policy, or of an export of one."""
        manifest = getattr(policy, "manifest", None)
        ranges = trained_ranges(policy) if manifest is None else manifest.trained  # type: ignore[arg-type]
        return cls(ranges, policy.observation_features, margin)

    @property
    def judges(self) -> tuple[str, ...]:
        """The observations that have a range."""
        return tuple(self._bounds)

    def __call__(self, values: Mapping[str, np.ndarray]) -> tuple[Reason, ...]:
        reasons = []
        for name, (lower, upper) in self._bounds.items():
            if name not in values:
                reasons.append(Reason("observation_missing", name))
                continue
            value = np.asarray(values[name], np.float64).reshape(-1)
            if value.shape != lower.shape:
                reasons.append(Reason("observation_shape", f"{name} has {value.size} entries, not {lower.size}"))
                continue
            bound = np.where(value < lower, lower, upper)
            reasons += [
                Reason("start_unfamiliar", self._entry(name, i), float(value[i]), float(bound[i]))
                for i in np.flatnonzero(~((lower <= value) & (value <= upper)))  # NaN is out of range, too
            ]
        return tuple(reasons)

    def _entry(self, name: str, i: int) -> str:
        """``joint_pos joint4``, or ``pose[3]`` where entries have no names."""
        names = self.features[name].names
        if self.features[name].shape == (len(names),):
            return f"{name} {names[i]}"
        return f"{name}[{i}]"
