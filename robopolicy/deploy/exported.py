"""``ExportedPolicy``: an export as a policy. Arrays in, arrays out; torch only for TorchScript, and for torch's noise.

It acts exactly as the checkpoint that it was made from: the same noise from the same generators, the same steps, the same units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robopolicy.deploy.manifest import Manifest, Step, load_manifest, observed
from robopolicy.deploy.runtime import Run, open_graph
from robopolicy.errors import DataError
from robopolicy.features import Feature, bad_actions, check_batch

if TYPE_CHECKING:
    import torch

Arrays = Mapping[str, np.ndarray]


class _Pred(NamedTuple):
    x0: np.ndarray
    eps: np.ndarray


class ExportedPolicy:
    """An exported policy.

    Args:
        folder: What `robopolicy export` wrote. Every file is checked against its digest.
        threads: Of the runtime, for one graph.

    Raises:
        CheckpointError: The export is damaged, of a newer format, or its runtime is not installed.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = load_manifest(folder)
        self.threads = threads
        self.observation_features: Mapping[str, Feature] = self.manifest.observation_features
        self.action_feature: Feature = self.manifest.action_feature
        self._graphs: dict[str, Run] = {}
        for name in ("chunk",) if self.manifest.fused else self.manifest.graphs:
            self._graph(name)  # now, not in the first control tick

    n_obs_steps = property(lambda self: self.manifest.n_obs_steps)
    n_action_steps = property(lambda self: self.manifest.n_action_steps)
    horizon = property(lambda self: self.manifest.horizon)

    def act(self, obs: Arrays, generator: torch.Generator | Sequence[torch.Generator] | np.random.Generator) -> np.ndarray:
        """The actions to execute next, ``[B, n_action_steps, A]`` float32, as :meth:`robopolicy.policy.Policy.act`.

        ``generator``: torch's, one or one per row, draws the noise that the checkpoint would draw; numpy's needs no torch.
        """
        inputs = self.observe(obs)
        chunk = self.chunk(inputs, self.noise(len(next(iter(inputs.values()))), generator))
        actions = chunk[:, : self.n_action_steps]
        if not np.isfinite(actions).all():
            raise bad_actions(actions, {name: float(np.abs(inputs[observed(name)]).max()) for name in self.observation_features})
        return actions

    def observe(self, obs: Arrays) -> dict[str, np.ndarray]:
        """The observations as the graphs read them, checked: ``obs.NAME -> [B, n_obs_steps, *shape]``, float32 or uint8 (images).

        Raises:
            DataError: A feature is missing, has the wrong shape, or is not finite.
        """
        inputs = {}
        for name, feature in self.observation_features.items():
            if name not in obs:
                raise DataError(f"observation '{name}' is missing; the policy needs {', '.join(self.observation_features)}")
            value = np.asarray(obs[name])
            expected = (self.n_obs_steps, *feature.shape)
            if value.shape[1:] != expected:
                raise DataError(
                    f"observation '{name}' has shape {value.shape}; expected (batch, {', '.join(map(str, expected))})"
                )
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise DataError(f"observation '{name}' holds NaN or infinity; a policy must not act on it: check that sensor")
            inputs[observed(name)] = np.ascontiguousarray(value, dtype=np.uint8 if feature.is_image else np.float32)
        check_batch({name: len(inputs[observed(name)]) for name in self.observation_features})
        return inputs

    def noise(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | np.random.Generator) -> np.ndarray:
        """Standard normal ``[draws, batch, horizon, chunk_dim]`` float32: the start, then one for each step that adds noise."""
        shape = (batch, self.manifest.horizon, self.manifest.chunk_dim)
        draws = range(self.manifest.noise_draws)
        if isinstance(generator, np.random.Generator):
            return generator.standard_normal((len(draws), *shape), dtype=np.float32)
        from robopolicy.generative.sampler import randn

        return np.stack([randn(shape, generator).numpy() for _ in draws])

    def chunk(self, inputs: Arrays, noise: np.ndarray) -> np.ndarray:
        """All actions from now on, ``[B, rows, A]`` float32 in their units: row 0 is due when the newest observation was made.

        Args:
            inputs: What :meth:`observe` returned.
            noise: ``[draws, B, horizon, chunk_dim]``, as of :meth:`noise`.
        """
        size, block = noise.shape[1], self.manifest.batch
        if size == block:
            return self._block(inputs, noise)
        parts = []
        for start in range(0, size, block):
            rows = np.minimum(np.arange(start, start + block), size - 1)  # the last block is filled up with the last row
            parts.append(self._block({name: value[rows] for name, value in inputs.items()}, noise[:, rows]))
        return np.concatenate(parts)[:size]

    def _block(self, inputs: Arrays, noise: np.ndarray) -> np.ndarray:
        if self.manifest.fused:
            return self._graph("chunk")({"noise": noise[0], **inputs})[0]
        return self.decode(self.sample(self.encode(inputs), noise), inputs)

    def encode(self, inputs: Arrays) -> np.ndarray:
        """Context ``[batch, C]`` of one block of observations."""
        return self._graph("encode")(inputs)[0]

    def decode(self, chunk: np.ndarray, inputs: Arrays) -> np.ndarray:
        """Actions ``[batch, rows, A]`` in their units that a normalised ``chunk [batch, horizon, chunk_dim]`` stands for."""
        needed = [name for name in self.manifest.graphs["decode"].inputs if name != "chunk"]
        return self._graph("decode")({"chunk": chunk, **{name: inputs[name] for name in needed}})[0]

    def sample(self, ctx: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """A normalised chunk ``[batch, horizon, chunk_dim]``: the sampler's walk, step by step as the manifest has it."""
        x = noise[0] * np.float32(self.manifest.noise_scale)
        steps, drawn, before = self.manifest.steps, 1, None
        for index, step in enumerate(steps):
            seen = self._see(x, step, ctx, step.to)
            pred = seen
            if step.extrapolate and before is not None:
                x0 = seen.x0 + np.float32(step.extrapolate) * (seen.x0 - before.x0)
                pred = _with_x0(x0, x, step)
            elif step.heun:
                ahead = self._see(_to(seen, step), steps[index + 1], ctx, step.to)
                pred = _along(0.5 * ((seen.eps - seen.x0) + (ahead.eps - ahead.x0)), x, step)
            before, x = seen, _to(pred, step)
            if step.std:
                x = x + np.float32(step.std) * noise[drawn]
                drawn += 1
        return x

    def field(self, x: np.ndarray, t: float, ctx: np.ndarray, to: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Clean chunk and noise that the network sees in ``x`` at ``t``; ``to`` as in :meth:`robopolicy.policy.Policy.field`."""
        boundary = self.manifest.frozen_above
        name = "field_early" if boundary is not None and t > boundary + 1e-6 else "field"
        inputs = {"x": x, "t": np.full(len(x), t, np.float32), "ctx": ctx}
        if self.manifest.jumps:
            inputs["to"] = np.full(len(x), t if to is None else to, np.float32)
        x0, eps = self._graph(name)(inputs)
        return x0, eps

    def _see(self, x: np.ndarray, at: Step, ctx: np.ndarray, to: float) -> _Pred:
        """What the field sees at the start of the step ``at``, clipped as the sampler clips."""
        pred = _Pred(*self.field(x, at.t, ctx, to))
        clip = self.manifest.clip
        return pred if clip is None else _with_x0(np.clip(pred.x0, -clip, clip), x, at)

    def _graph(self, name: str) -> Run:
        if name not in self._graphs:
            file = self.folder / self.manifest.graphs[name].file
            self._graphs[name] = open_graph(file, self.manifest.backend, self.threads)
        return self._graphs[name]


def _to(pred: _Pred, step: Step) -> np.ndarray:
    moved: np.ndarray = np.float32(step.to_x0) * pred.x0 + np.float32(step.to_eps) * pred.eps
    return moved


def _with_x0(x0: np.ndarray, x: np.ndarray, step: Step) -> _Pred:
    """The pair with this ``x0`` that explains ``x``."""
    return _Pred(x0, (x - np.float32(step.alpha) * x0) / np.float32(max(step.sigma, 1e-12)))


def _along(velocity: np.ndarray, x: np.ndarray, step: Step) -> _Pred:
    """The pair with ``eps - x0 = velocity`` that explains ``x``."""
    alpha, sigma = np.float32(step.alpha), np.float32(step.sigma)
    scale = np.float32(1) / (alpha + sigma)
    return _Pred((x - sigma * velocity) * scale, (x + alpha * velocity) * scale)


class ExportedPlanner:
    """Plans of an export, for the engine: each a sample of the policy that does not know of the plan before.

    Attributes:
        rows: Rows of its chunks.
        calls: Network calls for each of them.
    """

    def __init__(self, policy: ExportedPolicy) -> None:
        self.policy = policy
        self.rows: int = policy.manifest.rows
        self.calls: int = policy.manifest.nfe

    def plan(
        self,
        obs: Arrays,
        previous: object,
        delay: int,
        generator: torch.Generator | Sequence[torch.Generator] | np.random.Generator,
    ) -> np.ndarray:
        """The next chunks ``[B, rows, A]`` float32 in the action's units; ``previous`` and ``delay`` make no difference."""
        inputs = self.policy.observe(obs)
        return self.policy.chunk(inputs, self.policy.noise(len(next(iter(inputs.values()))), generator))

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Nothing to forget."""
