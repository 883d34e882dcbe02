"""``Policy``: observations in, a chunk of actions out; and how it is saved and loaded.

A policy is an encoder, a denoising network on a Gaussian path, a sampler, and the normalisers and action representation that
tie them to the units of the robot. It is saved as safetensors and JSON, without code: what a
component of your own does is found in your packages, by the name that the config gave it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from robopolicy.config import Config, component, full, parse
from robopolicy.data.actions import ActionConfig, ActionTransform
from robopolicy.data.normalize import Mode, Normalizer
from robopolicy.errors import CheckpointError, ConfigError, DataError, nearest
from robopolicy.features import Feature, bad_actions, check_batch
from robopolicy.generative.fields import Field, Leaf, Switched
from robopolicy.generative.losses import LossConfig, denoising_loss
from robopolicy.generative.path import PATHS, Kind, Pred
from robopolicy.generative.path import Path as GaussianPath
from robopolicy.generative.sampler import SAMPLERS, Generators, Sampler, SampleResult, randn
from robopolicy.nets.embedding import TimeEmbedding
from robopolicy.nets.registry import ENCODERS, NETS
from robopolicy.train.checkpoint import find_policy, read_tensors, write_tensors

FORMAT = 1
# Kinds of policy and the class that builds one from its document, by `build(document, where)`; None: Policy itself.
KINDS: dict[str, str | None] = {"policy": None, "composed": "robopolicy.compose.policy:Composed"}
_GAP_DIM = 32  # width of the embedding of how far to go

Observations = Mapping[str, np.ndarray | Tensor]


class PolicyConfig(Config):
    """Everything that shapes a policy. ``path``, ``sampler``, ``net`` and ``encoder`` are components chosen by ``type``."""

    n_obs_steps: int = pydantic.Field(default=2, ge=1)
    horizon: int = pydantic.Field(default=16, ge=1)
    n_action_steps: int = pydantic.Field(default=8, ge=1)
    path: dict[str, Any] = {"type": "flow"}
    prediction: Kind = "flow"
    sampler: dict[str, Any] = {"type": "euler"}
    net: dict[str, Any] = {"type": "mlp"}
    encoder: dict[str, Any] = {"type": "multimodal"}
    loss: LossConfig = LossConfig()
    action: ActionConfig = ActionConfig()
    normalize: dict[str, Mode] = {}  # per feature; those not named use `default_normalize`
    default_normalize: Mode = "minmax"
    normalize_per_step: bool = False  # a scale for each row of the chunk: relative actions spread with the horizon
    obs_noise: float = pydantic.Field(default=0.0, ge=0.0)  # std of noise on normalised state features in training
    initial_noise: float = pydantic.Field(default=1.0, ge=0.0)  # scale of the noise from which sampling starts; 0: none
    frozen_above: float | None = pydantic.Field(default=None, gt=0, le=1)  # above this time another, frozen network denoises
    target_time: bool = False  # the network also hears how far it shall go: a flow map, right for the sampler 'jump'

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.n_obs_steps - 1 + self.n_action_steps > self.horizon:
            needed = self.n_obs_steps - 1 + self.n_action_steps
            raise ValueError(
                f"n_obs_steps - 1 + n_action_steps = {needed} exceeds horizon {self.horizon}; raise it or execute fewer actions"
            )
        if self.target_time and (self.path["type"] != "flow" or self.prediction != "flow" or self.frozen_above is not None):
            raise ValueError(
                "target_time needs path: {type: flow}, prediction: flow and no frozen_above (to fine-tune such a policy by dppo, "
                "set method.tuned_steps=null)"
            )
        clip, mode = self.sampler.get("clip"), self.normalize.get("action", self.default_normalize)
        least = {"meanstd": 3.0, "quantile": 1.5}.get(mode, 0.0)
        if clip is not None and clip < least:
            # Without a bound, the x0 that follows from eps in nothing but noise is an error divided by almost 0.
            mend = f"{least:g} or more (eps needs a bound)" if self.prediction == "eps" else "null"
            raise ValueError(f"sampler.clip {clip} cuts off actions normalised by {mode}, which go beyond; set clip: {mend}")
        return self

    @pydantic.field_validator("path", "sampler", "net", "encoder", mode="after")
    @classmethod
    def _write_defaults(cls, value: dict[str, Any], info: pydantic.ValidationInfo) -> dict[str, Any]:
        kind = str(info.field_name)
        try:
            _, config = component(kind, value, REGISTRIES[kind])
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return full(value, config)


REGISTRIES: dict[str, Mapping[str, str]] = {"path": PATHS, "sampler": SAMPLERS, "net": NETS, "encoder": ENCODERS}


def _build(kind: str, value: Mapping[str, Any], **arguments: Any) -> Any:
    cls, config = component(kind, value, REGISTRIES[kind])
    return cls(config, **arguments)


class Policy(nn.Module):
    """A visuomotor policy.

    Args:
        config: Shape of the policy.
        observation_features: What it observes, at one time step.
        action_feature: What it commands, at one time step; a vector.
        normalizers: Fitted normalisers for every non-image observation and, under ``"action"``, for the transformed action.

    Raises:
        DataError: A normaliser is missing or of the wrong size, or the action is not a vector.
    """

    KIND: ClassVar[str] = "policy"

    def __init__(
        self,
        config: PolicyConfig,
        observation_features: Mapping[str, Feature],
        action_feature: Feature,
        normalizers: Mapping[str, Normalizer],
    ) -> None:
        super().__init__()
        if len(action_feature.shape) != 1:
            raise DataError(f"action '{action_feature.name}' has shape {action_feature.shape}; a policy commands a vector")
        self.config = config
        self.observation_features = dict(observation_features)
        self.action_feature = action_feature
        self.path: GaussianPath = _build("path", config.path)
        self.sampler: Sampler = _build("sampler", config.sampler)
        self.action_transform = ActionTransform(config.action, action_feature, self.observation_features)
        for name in self.observation_features:
            if "." in name or hasattr(nn.ModuleDict, name):  # names of modules, too
                raise DataError(
                    f"observation '{name}': a policy cannot use a name with a dot or of a method; rename it in data.features, "
                    f"for example state: {{key: {name}}}"
                )
        vectors = [name for name, feature in self.observation_features.items() if not feature.is_image]
        if missing := {*vectors, "action"} - set(normalizers):
            raise DataError(f"no normaliser for {', '.join(sorted(missing))}; fit one for every vector feature and for 'action'")
        self.normalizers = nn.ModuleDict({name: normalizers[name] for name in [*vectors, "action"]})
        self.encoder = _build("encoder", config.encoder, features=self.observation_features, n_obs_steps=config.n_obs_steps)
        self.ctx_dim: int = self.encoder.ctx_dim
        self.gap = TimeEmbedding(_GAP_DIM, "silu") if config.target_time else None
        self.net = _build(
            "net",
            config.net,
            action_dim=self.action_transform.dim,
            horizon=config.horizon,
            ctx_dim=self.ctx_dim + (_GAP_DIM if self.gap is not None else 0),
        )
        self.leaf: Field = Leaf(self.denoise, self.path, config.prediction)
        if config.frozen_above is not None:
            self.frozen_net = copy.deepcopy(self.net).requires_grad_(False)
            self.leaf = Switched(self.leaf, Leaf(self.frozen_net, self.path, config.prediction), config.frozen_above)

    n_obs_steps = property(lambda self: self.config.n_obs_steps)
    horizon = property(lambda self: self.config.horizon)
    n_action_steps = property(lambda self: self.config.n_action_steps)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def networks(self) -> int:
        """Networks that one evaluation of its field asks: more than one for a composed policy."""
        return 1

    @property
    def nfe(self) -> int:
        """Network calls for a chunk."""
        return self.networks * self.sampler.nfe(self.path)

    def normalizer(self, name: str) -> Normalizer:
        """The normaliser of a vector observation, or of the transformed ``"action"``."""
        module = self.normalizers[name]
        assert isinstance(module, Normalizer)
        return module

    def encode(self, obs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Context ``[B, C]`` of observations ``name -> [B, n_obs_steps, *shape]`` in the units of their features.

        ``generator`` draws augmentations, in training mode only.
        """
        inputs: dict[str, Tensor] = {}
        for name, feature in self.observation_features.items():
            value = obs[name]
            if not feature.is_image:
                value = self.normalizer(name).normalize(value.float())
                if self.training and self.config.obs_noise > 0:
                    value = value + self.config.obs_noise * randn(value.shape, generator, device=value.device)
            inputs[name] = value
        ctx: Tensor = self.encoder(inputs, generator)
        return ctx

    def denoise(self, x: Tensor, t: Tensor, ctx: Tensor, gap: Tensor | None = None) -> Tensor:
        """The network's output ``[B, H, A]`` for inputs as :meth:`robopolicy.generative.path.Path.net_input` makes them.

        ``gap [B]`` is how far ahead the jump goes, in the unit of ``t`` (0..100); None is 0: the direction at ``t`` itself.
        Networks without ``target_time`` do not hear it.
        """
        if self.gap is not None:
            gap = torch.zeros(len(x), dtype=x.dtype, device=x.device) if gap is None else gap
            ctx = torch.cat([ctx, self.gap(gap)], dim=1)
        out: Tensor = self.net(x, t, ctx)
        return out

    def field(self, x: Tensor, t: Tensor, ctx: Tensor, to: Tensor | None = None) -> Pred:
        """Clean chunk and noise that the network sees in ``x [B, H, A]`` at times ``t`` (``[B]`` or ``[B, H]``).

        Given ``to`` (as ``t``), a policy with ``target_time`` answers with the pair whose straight line through ``x`` ends where
        the flow does at ``to`` (rows with times of their own: their mean decides). Other policies ignore it.
        """
        if to is None or self.gap is None:
            return self.leaf(x, t, ctx)
        x_in, t_in = self.path.net_input(x, t)
        gap = t_in - self.path.net_time(to).to(t_in.dtype)
        y = self.denoise(x_in, t_in, ctx, gap if gap.ndim == 1 else gap.mean(1))
        return self.path.predict(x, t, y.to(x.dtype), self.config.prediction)

    def sample(self, ctx: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
        """A normalised chunk ``[B, H, A]`` for each context; ``generator`` may be one per row."""
        shape = (ctx.shape[0], self.config.horizon, self.action_transform.dim)
        return self.walk(self.start(randn(shape, generator, device=ctx.device)), ctx, generator).x0

    def start(self, noise: Tensor) -> Tensor:
        """The states ``[B, H, A]`` at time 1 from which unit ``noise`` is walked to chunks."""
        return self.path.prior(self.config.initial_noise * noise)

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
        """Walk from states ``x [B, H, A]`` to clean chunks: all that samples from this policy goes through here.

        Args:
            x: States at time 1, of :meth:`start`; or at ``times[0]``.
            ctx: Contexts ``[B, C]``.
            generator: Of the noise that stochastic samplers draw on the way.
            field: Another one on this policy's path, made of its own; None: its own.
            sampler: Another sampler.
            times: Other times, as :meth:`robopolicy.generative.sampler.Sampler.sample` has them.
        """
        own: Field = self.field if field is None else field
        return (sampler or self.sampler).sample(own, ctx, x, path=self.path, generator=generator, times=times)

    def loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Mean denoising loss of a batch as :meth:`robopolicy.data.windows.Windows.batch` makes it, on the policy's device."""
        obs: Mapping[str, Tensor] = batch["obs"]
        x0 = self.encode_actions(batch["action"], obs)
        ctx, is_pad, now = self.encode(obs, generator), batch["action_is_pad"], self.config.n_obs_steps - 1
        path, kind = self.path, self.config.prediction
        return denoising_loss(self.denoise, path, kind, x0, ctx, is_pad, generator, self.config.loss, now=now)

    @torch.no_grad()
    def act(self, obs: Observations, generator: torch.Generator | Sequence[torch.Generator]) -> np.ndarray:
        """The actions to execute next.

        Args:
            obs: Every observation feature as ``[B, n_obs_steps, *shape]``, oldest first, in its feature's units.
            generator: Source of the noise; one per row makes a row independent of the batch around it.

        Returns:
            ``[B, n_action_steps, A]`` float32 in the action feature's units.

        Raises:
            DataError: A feature is missing, has the wrong shape, or is not finite; or the actions are not.
        """
        tensors = self.observe(obs)
        actions = self.decode(self.sample(self.encode(tensors), generator), tensors)
        if not np.isfinite(actions).all():
            raise bad_actions(actions, {name: float(value.float().abs().max()) for name, value in tensors.items()})
        return actions

    def observe(self, obs: Observations) -> dict[str, Tensor]:
        """The observations that the policy needs, checked, on its device. Raises as :meth:`act`."""
        tensors = {name: self._observed(obs, name) for name in self.observation_features}
        check_batch({name: len(value) for name, value in tensors.items()})
        return tensors

    @property
    def executed(self) -> slice:
        """The rows of a chunk that are carried out."""
        first = self.config.n_obs_steps - 1
        return slice(first, first + self.config.n_action_steps)

    def decode(self, chunk: Tensor, obs: Mapping[str, Tensor], rows: slice | None = None) -> np.ndarray:
        """The actions ``[B, n_action_steps, A]`` float32 in the feature's units that a normalised ``chunk [B, H, A]`` stands for.

        ``obs`` is what :meth:`observe` returned: relative actions are relative to it. ``rows`` are those :attr:`executed` unless
        others are asked for; row ``n_obs_steps - 1`` is the action at the time of the newest observation.
        """
        return self.actions(chunk, obs)[:, self.executed if rows is None else rows].cpu().numpy().astype(np.float32)

    def actions(self, chunk: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """All rows ``[B, H, A]`` in the feature's units that a normalised ``chunk [B, H, A]`` stands for; as :meth:`decode`."""
        return self.action_transform.decode(self.normalizer("action").unnormalize(chunk.float()), self._reference(obs))

    def encode_actions(self, actions: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """The normalised chunk ``[B, H, A]`` of actions ``[B, H, A]`` in the feature's units: the inverse of :meth:`decode`."""
        with torch.autocast(self.device.type, enabled=False):  # it would round the products of rigid transforms to bfloat16
            return self.normalizer("action").normalize(self.action_transform.encode(actions.float(), self._reference(obs)))

    def varied(self, **changes: Any) -> Policy:
        """A copy with the same weights and other settings, for example another ``sampler``.

        Raises ConfigError when a setting does not fit, or would change the shape of the weights.
        """
        config = parse(PolicyConfig, {**self.config.model_dump(mode="json"), **changes}, where="policy")
        normalizers = {name: copy.deepcopy(self.normalizer(name)) for name in self.normalizers}
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and thrown away
            policy = Policy(config, self.observation_features, self.action_feature, normalizers)
        weights = self.state_dict()
        if hasattr(policy, "frozen_net") and not hasattr(self, "frozen_net"):
            weights |= {f"frozen_net.{name}": value for name, value in self.net.state_dict().items()}
        elif hasattr(self, "frozen_net") and not hasattr(policy, "frozen_net"):
            raise ConfigError("policy.frozen_above: this policy has a frozen network for early times; it cannot do without")
        policy.load_state_dict(weights)
        return policy.to(self.device).train(self.training)

    def _reference(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The newest observation of each vector feature ``[B, *shape]``: what relative actions are relative to."""
        return {n: obs[n][:, -1].float() for n, f in self.observation_features.items() if not f.is_image}

    def _observed(self, obs: Observations, name: str) -> Tensor:
        if name not in obs:
            raise DataError(f"observation '{name}' is missing; the policy needs {', '.join(self.observation_features)}")
        value = torch.as_tensor(obs[name])
        expected = (self.config.n_obs_steps, *self.observation_features[name].shape)
        if tuple(value.shape[1:]) != expected:
            raise DataError(
                f"observation '{name}' has shape {tuple(value.shape)}; expected (batch, {', '.join(map(str, expected))})"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"observation '{name}' holds NaN or infinity; a policy must not act on it: check that sensor")
        return value.to(self.device)

    def document(self) -> dict[str, Any]:
        """What ``policy.json`` holds besides provenance: enough to rebuild the policy without its weights."""
        return {
            "format": FORMAT,
            "kind": self.KIND,
            "config": self.config.model_dump(mode="json"),
            "observations": {name: feature.to_json() for name, feature in self.observation_features.items()},
            "action": {"name": self.action_feature.name, **self.action_feature.to_json()},
        }

    def save(self, folder: str | Path, provenance: Mapping[str, Any] | None = None) -> Path:
        """Write ``policy.safetensors`` and ``policy.json`` into ``folder``; training writes whole checkpoints atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "policy", self.state_dict(), {**self.document(), "provenance": dict(provenance or {})})
        return folder


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> Policy:
    """Load a policy from a run folder (its last checkpoint), a checkpoint folder or a folder written by :meth:`Policy.save`.

    Raises:
        CheckpointError: Files are absent, damaged, of a newer format, or do not fit together.
    """
    folder = find_policy(path)
    tensors, document = read_tensors(folder / "policy")
    policy = build_policy(document, where=str(folder))
    try:
        policy.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint '{folder}': the weights do not fit policy.json ({reason[:300]})") from error
    return policy.to(device).eval()


def build_policy(document: Mapping[str, Any], where: str) -> Policy:
    """A policy with untrained weights from the contents of ``policy.json``. Raises CheckpointError."""
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint '{where}' has format {document.get('format')!r}; this version reads {FORMAT}. Update robopolicy"
        )
    kind = document.get("kind", "policy")
    if kind not in KINDS:
        raise CheckpointError(
            f"checkpoint '{where}' is of kind {kind!r}; this version knows {', '.join(KINDS)}. Update robopolicy"
        )
    if (place := KINDS[kind]) is not None:
        module, _, name = place.partition(":")
        built: Policy = getattr(importlib.import_module(module), name).build(document, where)
        return built
    try:
        config = parse(PolicyConfig, document["config"], where=f"checkpoint '{where}'")
        observations = {name: Feature.from_json(name, value) for name, value in document["observations"].items()}
        action = {key: value for key, value in document["action"].items() if key != "name"}
        action_feature = Feature.from_json(document["action"]["name"], action)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint '{where}': policy.json lacks or garbles {error}; use another checkpoint") from error
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"checkpoint '{where}': {error}") from error
    transform = ActionTransform(config.action, action_feature, observations)
    modes = normalizer_modes(config, observations)
    normalizers = {name: Normalizer(feature.size, modes[name]) for name, feature in observations.items() if not feature.is_image}
    normalizers["action"] = Normalizer(action_statistics_size(config, transform), modes["action"])
    return Policy(config, observations, action_feature, normalizers)


def normalizer_modes(config: PolicyConfig, observations: Mapping[str, Feature]) -> dict[str, Mode]:
    """How each vector observation, and ``"action"``, is normalised.

    Rotations are left alone unless the config names them: their entries lie in [-1, 1] by nature, and those that hardly change in
    the demonstrations (a tilt of a milliradian) would be blown up to the whole range. Raises ConfigError for an unknown name.
    """
    vectors = {name: feature for name, feature in observations.items() if not feature.is_image}
    if unknown := set(config.normalize) - {*vectors, "action"}:
        raise ConfigError(
            f"policy.normalize: no vector observation '{min(unknown)}'; {nearest(min(unknown), [*vectors, 'action'])}"
        )
    natural = {name: "identity" if f.unit in ("rot6d", "quat_xyzw") else config.default_normalize for name, f in vectors.items()}
    return {**natural, "action": config.default_normalize, **config.normalize}


def action_statistics_size(config: PolicyConfig, transform: ActionTransform) -> int:
    """Entries of the action normaliser: one per action dimension, or one per row and dimension of the chunk."""
    return transform.dim * (config.horizon if config.normalize_per_step else 1)


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Where a policy comes from: task, data, step, versions; empty for one saved without."""
    from robopolicy.train.checkpoint import read_document

    provenance = read_document(find_policy(path) / "policy").get("provenance", {})
    return provenance if isinstance(provenance, dict) else {}
