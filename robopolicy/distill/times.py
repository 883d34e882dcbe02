"""Which steps a distilled policy knows. Some methods train the network at the few times where its own sampler stops, and at
``t = 1`` at the noise that it starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from robopolicy.config import component
from robopolicy.distill.methods.base import Method
from robopolicy.distill.methods.registry import METHODS
from robopolicy.errors import ConfigError
from robopolicy.policy import Policy
from robopolicy.train.checkpoint import find_policy, read_document


def trained_times(provenance: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The only times at which a network was trained, by the provenance of its checkpoint; None: everywhere, or not known."""
    if "teacher" not in provenance:
        return None
    with contextlib.suppress(ConfigError):  # a method of somebody's own, which is not installed here
        cls, config = component("method", provenance["method"], METHODS)
        method: Method = cls(config)
        return method.times
    return None


def check_walk(policy: Policy, checkpoint: str) -> None:
    """Raise ConfigError when ``policy``, made of ``checkpoint``, is walked through times at which its network was never trained,
    or from more noise. Of a composition: one of its parents' networks.

    That would run, and give any chunk at all.
    """
    document = read_document(find_policy(checkpoint) / "policy")
    for name, config, provenance in lineage(f"'{checkpoint}'", document, document.get("provenance", {})):
        _check(policy, name, config, provenance)


def lineage(
    name: str, document: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Name, config and provenance of a policy and of its parents, and theirs, as far as it says where they come from."""
    yield name, document["config"], provenance
    for part, origin in zip(document.get("parents", ()), provenance.get("parents", ()), strict=False):
        yield from lineage(f"{name}, of which '{origin['checkpoint']}'", part, origin["provenance"])


def _check(policy: Policy, name: str, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    trained = trained_times(provenance)
    if trained is None:
        return
    known = trained if policy.config.path["type"] == "flow" else trained[:1]  # t = 1 is noise on every path
    strange = [t for t in policy.sampler.times(policy.path)[:-1] if all(abs(t - own) > 1e-6 for own in known)]
    if strange:
        raise ConfigError(
            f"{name} was distilled by {provenance['method']['type']}: its network knows t = "
            f"{', '.join(f'{t:g}' for t in trained)}, and this sampler asks it at {strange[0]:.3g} too; keep its {len(trained)} "
            "step(s), or distil by reflow or ctm, which know every time"
        )
    own = float(config.get("initial_noise", 1.0))
    if policy.config.initial_noise > own:
        raise ConfigError(
            f"{name} was distilled by {provenance['method']['type']} from noise of scale {own:g}: its network knows no "
            f"more, and here it would start from {policy.config.initial_noise:g}; take {own:g} or less"
        )
