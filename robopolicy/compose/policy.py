"""``Composed``: several policies that act as one, each with its own observations, path, prediction, network and horizon.

Each parent reads its own observations and sees the same noisy chunk; what they see is mixed at every step of the sampler. A
composed policy is a :class:`robopolicy.policy.Policy`: saved, loaded, evaluated, fine-tuned, distilled and run as any other.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import pydantic
import torch
from torch import Tensor, nn

from robopolicy.compose.mixture import Map, Mixture, adapted
from robopolicy.compose.superpose import SUPERPOSE, Superpose
from robopolicy.config import component, parse
from robopolicy.data.actions import ActionTransform
from robopolicy.data.normalize import Normalizer
from robopolicy.errors import CheckpointError, ConfigError
from robopolicy.features import Feature
from robopolicy.generative.fields import Field, Switched
from robopolicy.generative.path import PATHS, Path, Pred
from robopolicy.generative.sampler import SAMPLERS, Generators, Sampler, SampleResult
from robopolicy.policy import Policy, PolicyConfig, build_policy

Rule = Literal["convex", "product", "guidance", "and", "or"]

_SPREAD = 1.25  # of the ratios of two normalisers' scales, beyond which one noise level no longer describes the other's states


class ComposedConfig(PolicyConfig):
    """Of a composed policy. ``path``, ``sampler``, ``net`` and the like are the first parent's unless told otherwise; ``net`` and
    ``encoder`` describe no network here: they are what a student of this policy starts from.

    Attributes:
        rule: ``convex`` mean of what the parents see, ``product`` of experts, ``guidance`` of the first away from the second
            (classifier-free, when the second hears less than the first), or superposition: ``and``, ``or``, which are
            stochastic samplers.
        weights: One per parent. Convex: sum 1. Product: exponents. Guidance: scale and ``1 - scale``. ``and`` and ``or`` have
            none: they find their own.
        prior_std: Of the product, see :class:`robopolicy.generative.fields.Product`.
        renormalize: Accept parents whose action normalisers differ a little.
    """

    rule: Rule = "convex"
    weights: tuple[float, ...]
    prior_std: float | None = pydantic.Field(default=1.0, gt=0)
    renormalize: bool = False

    @pydantic.model_validator(mode="after")
    def _samples(self) -> Self:
        superposes = self.sampler["type"] == SUPERPOSE
        if self.rule in ("and", "or") and not (superposes and self.sampler["mode"] == self.rule):
            raise ValueError(
                f"rule '{self.rule}' is a way of sampling: it needs sampler {{type: {SUPERPOSE}, mode: '{self.rule}'}}; "
                "to fine-tune, or for another sampler, compose with rule convex or product"
            )
        if superposes and self.rule not in ("and", "or"):
            raise ValueError(f"sampler superpose in mode '{self.sampler['mode']}' belongs to rule '{self.sampler['mode']}'")
        if self.sampler["type"] == "jump" or self.target_time:
            raise ValueError("parents are mixed on the way from noise to action; sampler 'jump' has no way, use euler or ddim")
        return self


class Composed(Policy):
    """A policy made of parents.

    Chunks are aligned at "now": row ``n_obs_steps - 1`` of each. Rows that only some parents have are left to those.

    Args:
        config: Rule, weights, path and sampler; lengths that cover every parent's.
        parents: Two or more policies that command the same action in the same representation.

    Raises:
        ConfigError: The parents do not fit together, or config and parents do not.
    """

    KIND: ClassVar[str] = "composed"
    config: ComposedConfig

    def __init__(self, config: ComposedConfig, parents: Sequence[Policy]) -> None:
        nn.Module.__init__(self)
        first = parents[0] if parents else None
        if first is None or len(parents) < 2 or len(config.weights) != len(parents):
            raise ConfigError(
                f"{len(config.weights)} weights for {len(parents)} policies; compose two or more, with a weight each"
            )
        self.config = config
        self.action_feature = first.action_feature
        self.observation_features = _observations(parents)
        self.path: Path = _component("path", config.path)
        self.sampler = _component("sampler", config.sampler)
        self.action_transform = ActionTransform(config.action, self.action_feature, self.observation_features)
        self.gap = None
        own: list[Policy] = []
        for parent in parents:  # one given twice becomes two: a checkpoint holds no tensor under two names
            own.append(copy.deepcopy(parent) if any(parent is other for other in own) else parent)
        self.parents = nn.ModuleList(own)
        for index, parent in enumerate(own):
            _check_seen(parent, index)
            _check_same(own[0], parent, index)
        self.rows = [_rows(parent, config) for parent in own]
        self.reference = _reference(own, self.rows, config.horizon)  # the parent whose action normaliser is ours
        self._check_actions()
        self.ctx_dim = sum(parent.ctx_dim for parent in own)
        self._mixture = self._mix(own)
        self.leaf: Field = self._mixture
        if config.frozen_above is not None:
            self.frozen = nn.ModuleList(copy.deepcopy(own)).requires_grad_(False)
            self.leaf = Switched(self.leaf, self._mix(cast("list[Policy]", list(self.frozen))), config.frozen_above)

    @property
    def policies(self) -> list[Policy]:
        """The parents."""
        return cast("list[Policy]", list(self.parents))

    @property
    def net(self) -> nn.ModuleList:
        """The parents' networks: what fine-tuning trains."""
        return nn.ModuleList(parent.net for parent in self.policies)

    @property
    def device(self) -> torch.device:
        return self.policies[0].device

    @property
    def networks(self) -> int:
        return sum(self.policies[index].networks for index in self._mixture.asked)

    @property
    def normalizers(self) -> dict[str, Normalizer]:  # type: ignore[override]
        """Of every vector observation, as the first parent that has it normalises it, and of the action."""
        vectors = (name for name, feature in self.observation_features.items() if not feature.is_image)
        return {name: self.normalizer(name) for name in (*vectors, "action")}

    def normalizer(self, name: str) -> Normalizer:
        if name == "action":
            return self.policies[self.reference].normalizer("action")
        return next(parent for parent in self.policies if name in parent.observation_features).normalizer(name)

    def encode(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The parents' contexts side by side ``[B, C1 + C2 + ...]``, each of its own observations and number of steps."""
        parts = []
        for parent in self.policies:
            own = {name: obs[name][:, -parent.n_obs_steps :] for name in parent.observation_features}
            parts.append(parent.encode(own, generator))
        return torch.cat(parts, dim=1)

    def each(self, x: Tensor, t: Tensor, ctx: Tensor) -> list[Pred]:
        """What every parent sees in ``x [B, H, A]`` at ``t`` on this policy's path."""
        return self._mixture.each(x, t, ctx)

    def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
        """What a network of ``config.prediction`` would say: the mixture, for losses. ``gap`` is not heard."""
        state, time = _state(self.path, x, t)
        pred = self.leaf(state, time, ctx)
        return self.path.target(pred.x0, pred.eps, time, self.config.prediction)

    def walk(
        self,
        x: Tensor,
        ctx: Tensor,
        generator: Generators | None = None,
        *,
        field: Field | None = None,
        sampler: Sampler | None = None,
        times: Tensor | None = None,
    ) -> SampleResult:
        own = self.leaf if field is None else field  # superposition asks it for each parent
        return super().walk(x, ctx, generator, field=own, sampler=sampler, times=times)

    def varied(self, **changes: Any) -> Composed:
        config = parse(ComposedConfig, {**self.config.model_dump(mode="json"), **changes}, where="policy")
        policy = Composed(config, copy.deepcopy(self.policies))
        if hasattr(self, "frozen"):
            if not hasattr(policy, "frozen"):
                raise ConfigError("policy.frozen_above: this policy has frozen networks for early times; it cannot do without")
            policy.frozen.load_state_dict(self.frozen.state_dict())
        return policy.to(self.device).train(self.training)

    def document(self) -> dict[str, Any]:
        return {**super().document(), "parents": [parent.document() for parent in self.policies]}

    @classmethod
    def build(cls, document: Mapping[str, Any], where: str) -> Composed:
        """A composed policy with untrained weights from the contents of ``policy.json``. Raises CheckpointError."""
        try:
            documents = list(document["parents"])
            parents = [build_policy(part, f"{where}, parent {index}") for index, part in enumerate(documents)]
            return cls(parse(ComposedConfig, document["config"], where=f"checkpoint '{where}'"), parents)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint '{where}': policy.json lacks or garbles {error}; use another checkpoint"
            ) from error
        except ConfigError as error:
            raise CheckpointError(f"checkpoint '{where}': {error}") from error

    def _check_actions(self) -> None:
        """Raises ConfigError unless all parents scale actions alike, or differences can be made up for."""
        for index in range(len(self.policies)):
            k, m = self.action_map(index)
            if torch.allclose(k, torch.ones_like(k), rtol=1e-6, atol=0) and torch.allclose(m, torch.zeros_like(m), atol=1e-6):
                continue
            who = f"parents {self.reference} and {index}"
            if not self.config.renormalize:
                raise ConfigError(
                    f"{who} normalise actions differently (by factors up to {float((k - 1).abs().max()):.1%} and offsets up to "
                    f"{float(m.abs().max()):.3g} off); train both on the same demonstrations, or allow it with renormalize=true"
                )
            spread = float(k.max() / k.min())
            if spread > _SPREAD:
                raise ConfigError(
                    f"{who} scale the entries of an action by ratios {spread:.3g} apart: noise that is the same in all entries "
                    f"for one is not for the other (at most {_SPREAD} can be made up for); train both on the same demonstrations"
                )

    def action_map(self, index: int) -> Map:
        """From normalised actions of the composition to those of a parent, for the parent's rows."""
        scales = []
        for policy, start in ((self.policies[self.reference], 0), (self.policies[index], self.rows[index].start)):
            normalizer = policy.normalizer("action")
            pair = [value.reshape(-1, self.action_transform.dim) for value in (normalizer.scale, normalizer.offset)]
            rows = slice(self.rows[index].start - start, self.rows[index].stop - start)
            scales.append([value if len(value) == 1 else value[rows] for value in pair])
        (scale, offset), (own_scale, own_offset) = scales
        k = own_scale / scale
        return Map(k, own_offset - k * offset)

    def _mix(self, parents: Sequence[Policy]) -> Mixture:
        config, at = self.config, 0
        fields = []
        for index, (parent, rows) in enumerate(zip(parents, self.rows, strict=True)):
            fields.append(
                adapted(
                    parent.field,
                    parent.path,
                    self.path,
                    slice(at, at + parent.ctx_dim),
                    rows,
                    same_path=parent.config.path == config.path,
                    action_map=functools.partial(self.action_map, index)
                    if config.renormalize and index != self.reference
                    else None,
                )
            )
            at += parent.ctx_dim
        # A superposition finds its weights while sampling; asked for as a field, it is the mean.
        weights = [1 / len(parents)] * len(parents) if config.rule in ("and", "or") else config.weights
        return Mixture(fields, self.rows, config.horizon, config.rule, weights, self.path, config.prior_std)


def compose(
    parents: Sequence[Policy], *, rule: Rule = "convex", weights: Sequence[float] | None = None, **settings: Any
) -> Composed:
    """Make one policy of several.

    Args:
        parents: Two or more, on one device.
        rule: How what they see is mixed.
        weights: One per parent. Default: equal, with sum 1; for ``product`` 1 each, for ``guidance`` 1.5 and -.5.
        settings: Of :class:`ComposedConfig`, for example ``sampler={"type": "ddim", "num_steps": 20}``,
            ``path={"type": "flow"}``, ``renormalize=True``.

    Raises:
        ConfigError: The parents do not fit together, or a setting does not fit.
    """
    if len(parents) < 2:
        raise ConfigError(f"{len(parents)} policy to compose; give at least two")
    for index, parent in enumerate(parents):  # before its sampler is taken for the composition's
        _check_seen(parent, index)
    first = parents[0].config
    past = max(parent.n_obs_steps for parent in parents)
    if weights is None:
        known = {"product": [1.0] * len(parents), "guidance": [1.5, -0.5]}
        weights = known.get(rule, [1 / len(parents)] * len(parents))
    chosen = first.model_dump(mode="json", include=set(PolicyConfig.model_fields) - {"frozen_above", "target_time"})
    chosen |= {
        "n_obs_steps": past,
        "horizon": max(past - parent.n_obs_steps + parent.horizon for parent in parents),
        "n_action_steps": min(parent.n_action_steps for parent in parents),
        "rule": rule,
        "weights": list(weights),
    }
    if rule in ("and", "or"):
        steps = {key: first.sampler[key] for key in ("clip",) if key in first.sampler}
        chosen["sampler"] = {"type": SUPERPOSE, "mode": rule, **steps}
    if "path" in settings and settings["path"] != first.path and "prediction" not in settings:
        settings["prediction"] = "flow"  # well posed at both ends of every path
    composed = Composed(parse(ComposedConfig, {**chosen, **settings}, where="compose"), parents).eval()
    for index, parent in enumerate(parents):
        if not composed.sampler.keeps(parent.sampler):
            own, new = (policy.config.sampler["type"] for policy in (parent, composed))
            raise ConfigError(
                f"parent {index} is walked by sampler '{own}' in a way of its own, and what that adds is lost where the "
                f"composition is walked by '{new}'; give sampler.type={own}, or compose the parent without it "
                "(policy.varied(sampler=...))"
            )
    return composed


def plain_sampler(policy: Composed) -> dict[str, Any]:
    """The control for ``and`` and ``or``: the same stochastic sampler of a plain field, without superposition."""
    assert isinstance(policy.sampler, Superpose)
    config = policy.sampler.config
    return {"type": "ddim", "num_steps": config.num_steps, "eta": 1.0, "clip": config.clip}


def _component(kind: str, value: Mapping[str, Any]) -> Any:
    cls, config = component(kind, value, {"path": PATHS, "sampler": SAMPLERS}[kind])
    return cls(config)


def _observations(parents: Sequence[Policy]) -> dict[str, Feature]:
    """All observations; the same name must be the same thing. Raises ConfigError."""
    union: dict[str, Feature] = {}
    for index, parent in enumerate(parents):
        for name, feature in parent.observation_features.items():
            known = union.setdefault(name, feature)
            if (known.shape, known.dtype, known.unit) != (feature.shape, feature.dtype, feature.unit):
                raise ConfigError(
                    f"observation '{name}' is {known} to one parent and {feature} to parent {index}; rename one in data.features"
                )
    return union


def _check_seen(parent: Policy, index: int) -> None:
    """Raises ConfigError for a superposition: what it sees is only the mean of its parents, AND and OR are made by its walk."""
    if isinstance(parent, Composed) and parent.config.rule in ("and", "or"):
        raise ConfigError(
            f"parent {index} is a composition by rule '{parent.config.rule}', a way of sampling that is lost when it is composed "
            "again; compose its parents, or a student of it (robopolicy distill --method reflow)"
        )


def _check_same(first: Policy, parent: Policy, index: int) -> None:
    """Raises ConfigError unless both command the same, represented in the same way."""
    for what, ours, theirs in (
        ("action", first.action_feature, parent.action_feature),
        ("action representation (policy.action)", first.config.action, parent.config.action),
    ):
        if ours != theirs:
            raise ConfigError(
                f"parents 0 and {index} differ in their {what}: {ours} and {theirs}; only policies that command the same "
                "can be composed, train one again"
            )


def _rows(parent: Policy, config: PolicyConfig) -> slice:
    """Where a parent's chunk lies in the composed one. Raises ConfigError when it does not."""
    start = config.n_obs_steps - parent.n_obs_steps
    if start < 0 or start + parent.horizon > config.horizon:
        raise ConfigError(
            f"n_obs_steps {config.n_obs_steps} and horizon {config.horizon} are less than a parent's "
            f"{parent.n_obs_steps} and {parent.horizon}; leave them out"
        )
    return slice(start, start + parent.horizon)


def _reference(parents: Sequence[Policy], rows: Sequence[slice], horizon: int) -> int:
    """The first parent whose action normaliser knows every row. Raises ConfigError."""
    for index, (parent, own) in enumerate(zip(parents, rows, strict=True)):
        if not parent.config.normalize_per_step or own == slice(0, horizon):
            return index
    raise ConfigError("no parent has a scale for every row of the chunk (normalize_per_step); train one with a longer horizon")


def _state(path: Path, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :meth:`robopolicy.generative.path.Path.net_input`, by bisection: the network's time rises with ``t``."""
    low, high = torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
    wanted = t.double()
    for _ in range(45):
        middle = (low + high) / 2
        below = path.net_time(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    time = high
    unit, _ = path.net_input(torch.ones_like(x), time)
    return x / unit, time
