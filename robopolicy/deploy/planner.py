"""Planners: from an observation, and from what is being carried out, to the next chunk. The torch side of real-time execution.

===============  ====================================================================================================
``plain``        A sample like any other; does not know of the old chunk.
``rtc``          The sample is drawn towards the old chunk by guidance (:class:`robopolicy.generative.prefix.Inpainted`).
``rtc_trained``  The settled rows are given to the network, clean; it was trained so (``policy.loss.prefix``).
``rti``          The old chunk, shifted, is the first guess; a few steps at little noise mend it.
``streaming``    The old chunk never gets clean ahead: rows are noisier the later they are due (``policy.loss.staircase``).
``bid``          The most coherent of many samples.
===============  ====================================================================================================

What is being carried out stays in the units of the robot and is encoded against the new observation: actions that are relative
to the observation get a new reference with every plan.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pydantic
import torch
from torch import Tensor

from robopolicy.config import Config, component
from robopolicy.deploy.chunk import Previous
from robopolicy.errors import ConfigError
from robopolicy.generative.fields import Field
from robopolicy.generative.losses import staircase
from robopolicy.generative.path import Pred, broadcast_time
from robopolicy.generative.prefix import Inpainted, Pinned, Schedule, identity_pull, residual_gradient, soft_mask
from robopolicy.generative.sampler import Generators, clip_pred, randn
from robopolicy.policy import Observations, Policy

_PULL = 1.5  # of the way to the old chunk, at most, in the last call: at 2 a row ends on the other side, as far as it was


class Planner(ABC):
    """Plans for ``B`` robots at once.

    Attributes:
        calls: Evaluations of networks, of all parents of a composition, backward passes among them, that the last plan took for
            one robot.
    """

    needs_previous: ClassVar[bool] = True
    asks_field: ClassVar[bool] = False  # puts a field of its own around the policy's, or walks it by itself

    def __init__(self, policy: Policy) -> None:
        if self.asks_field and getattr(policy.sampler, "superposes", False):
            raise ConfigError(
                f"planner '{_name(type(self))}' guides what the policy sees, and a composition by rule and/or is not seen but "
                "sampled; use planner plain, rti or bid, compose with rule convex or product, or take a student of it "
                "(robopolicy distill --method reflow)"
            )
        self.policy = policy
        self.now: int = policy.n_obs_steps - 1
        self.rows: int = policy.horizon - self.now  # F
        self.calls = 0
        if self.needs_previous and policy.config.action.type == "delta" and self.now:
            raise ConfigError(
                f"planner '{_name(type(self))}': with actions of type delta and n_obs_steps {policy.n_obs_steps} the first row "
                "follows one that was executed before; train with type relative, or n_obs_steps 1"
            )

    def reset(self, rows: Sequence[int] | None = None) -> None:  # noqa: B027 only planners with a memory have something to forget
        """Forget what was planned for these rows of the batch (None: all): their episodes begin."""

    @torch.no_grad()
    def plan(self, obs: Observations, previous: Previous | None, delay: int | np.ndarray, generator: Generators) -> np.ndarray:
        """The next chunks.

        Args:
            obs: Every observation feature as ``[B, n_obs_steps, *shape]``, in its feature's units.
            previous: What is being carried out; None at the start of all episodes, ``known`` 0 at the start of one.
            delay: Rows that will have been executed when the new chunks arrive, or one number for each robot.
            generator: Source of the noise, one or one for each robot.

        Returns:
            ``[B, F, A]`` float32 in the action feature's units, the row of "now" first; ``F = horizon - n_obs_steps + 1``.
        """
        tensors = self.policy.observe(obs)
        ctx = self.policy.encode(tensors)
        self.calls = 0
        chunk = self._plan(ctx, tensors, self._old(previous, tensors, delay), generator)
        return self.policy.decode(chunk, tensors, slice(self.now, None))

    @abstractmethod
    def _plan(self, ctx: Tensor, obs: Mapping[str, Tensor], old: Old, generator: Generators) -> Tensor:
        """Normalised chunks ``[B, H, A]``."""

    def _old(self, previous: Previous | None, obs: Mapping[str, Tensor], delay: int | np.ndarray) -> Old:
        batch, device = len(next(iter(obs.values()))), self.policy.device
        if previous is None or not self.needs_previous:
            chunk = torch.zeros(batch, self.policy.horizon, self.policy.action_transform.dim, device=device)
            return Old(chunk, torch.zeros(batch, dtype=torch.long, device=device), torch.zeros_like(chunk[:, 0, 0]).long())
        known = torch.as_tensor(previous.known, device=device).long()
        actions = torch.as_tensor(previous.actions, device=device)
        # Rows that are not known repeat the last that is: as a guess it is as good as any, and nothing is drawn towards it.
        index = torch.arange(-self.now, self.rows, device=device).clamp_min(0)
        index = torch.minimum(index, (known - 1).clamp_min(0)[:, None])
        chunk = self.policy.encode_actions(actions.gather(1, index[:, :, None].expand(-1, -1, actions.shape[2])), obs)
        return Old(chunk, known, torch.as_tensor(delay, device=device).long().expand(batch))

    def _sample(
        self, ctx: Tensor, x: Tensor, generator: Generators, field: Field | None = None, times: Tensor | None = None
    ) -> Tensor:
        """:meth:`robopolicy.policy.Policy.walk`, and count the calls."""
        result = self.policy.walk(x, ctx, generator, field=field, times=times)
        self.calls += self.policy.networks * result.nfe
        return result.x0

    def _noise(self, batch: int, generator: Generators) -> Tensor:
        """States at time 1 ``[B, H, A]``."""
        shape = (batch, self.policy.horizon, self.policy.action_transform.dim)
        return self.policy.start(randn(shape, generator, device=self.policy.device))


class Old(NamedTuple):
    """The chunk being carried out, as the network sees it.

    Attributes:
        chunk: Normalised, ``[B, H, A]``, aligned with the new one; rows that are not known repeat the last known.
        known: Rows of it that are real, from "now" on ``[B]``.
        settled: Of these, how many will have been executed when the new chunk arrives ``[B]``.
    """

    chunk: Tensor
    known: Tensor
    settled: Tensor


class Plain(Planner):
    """A sample of the policy."""

    needs_previous = False

    class Config(Config):
        pass

    def __init__(self, policy: Policy, config: Plain.Config | None = None) -> None:
        super().__init__(policy)

    def _plan(self, ctx: Tensor, obs: Mapping[str, Tensor], old: Old, generator: Generators) -> Tensor:
        return self._sample(ctx, self._noise(len(ctx), generator), generator)


class RTC(Planner):
    """Real-time chunking by guidance (arXiv 2506.07339), for policies as they are.

    A policy of several steps is guided in every step. A policy of ONE step has no later step in which the network could answer
    to the correction, and a corrected output may lie off the data. There the initial noise is chosen instead: the best of
    ``candidates`` draws, then ``iterations`` steps ``z += eta J^T W (chunk - x0(z))`` at constant norm, so that the noise stays
    as likely as it was, ``eta`` by a line search that costs one call. What comes out is something that the policy may do.
    """

    asks_field = True

    class Config(Config):
        jacobian: Literal["true", "identity"] = "true"
        schedule: Schedule = "exponential"
        limit: float = pydantic.Field(default=5.0, gt=0)
        end: int | None = pydantic.Field(default=None, ge=1)  # row from which on nothing is guided; None: where the old one ends
        candidates: int = pydantic.Field(default=8, ge=1)  # of one-step policies
        iterations: int = pydantic.Field(default=0, ge=0)  # of one-step policies: gradient steps on the noise

    def __init__(self, policy: Policy, config: RTC.Config | None = None) -> None:
        super().__init__(policy)
        self.config = config or RTC.Config()
        last = policy.sampler.times(policy.path)[-2]  # what is seen there is the chunk, and nothing corrects it
        if self.config.jacobian == "identity" and (pull := identity_pull(policy.path, last, self.config.limit)) > _PULL:
            raise ConfigError(
                f"planner 'rtc' with jacobian identity: the last call of this sampler ({policy.sampler.nfe(policy.path)} in all) "
                f"would move rows {pull:.3g} times the way to the old chunk, and no later one corrects that; take the true "
                "one, which is rtc's own"
            )
        if policy.sampler.own_walk:
            self._try()

    @torch.no_grad()
    def _try(self) -> None:
        """Plan once, from nothing: a walk of somebody's own may not bear guidance, and says so here, not on the way."""
        device = self.policy.device
        chunk = torch.zeros(1, self.policy.horizon, self.policy.action_transform.dim, device=device)
        known = torch.full((1,), self.rows, device=device)
        self._plan(torch.zeros(1, self.policy.ctx_dim, device=device), {}, Old(chunk, known, known), torch.Generator())
        self.calls = 0

    def _plan(self, ctx: Tensor, obs: Mapping[str, Tensor], old: Old, generator: Generators) -> Tensor:
        weights = self._weights(old)
        if self.policy.sampler.nfe(self.policy.path) == 1 and self.config.jacobian == "true":
            return self._one_step(ctx, old, weights, generator)
        path, config = self.policy.path, self.config
        field = Inpainted(self.policy.field, path, old.chunk, weights, config.limit, config.jacobian)
        chunk = self._sample(ctx, self._noise(len(ctx), generator), generator, field)
        if config.jacobian == "true" and bool(weights.any()):
            self.calls *= 2  # a backward pass behind each
        return chunk

    def _weights(self, old: Old) -> Tensor:
        known = old.known if self.config.end is None else old.known.clamp_max(self.config.end)
        mask = soft_mask(self.rows, old.settled, known, self.config.schedule)
        return torch.cat([mask.new_zeros(len(mask), self.now), mask], dim=1).to(old.chunk.dtype)

    def _one_step(self, ctx: Tensor, old: Old, weights: Tensor, generator: Generators) -> Tensor:
        if not weights.any():
            return self._sample(ctx, self._noise(len(ctx), generator), generator)
        weights = weights[:, :, None]

        def cost(chunk: Tensor) -> Tensor:
            return (weights * (chunk - old.chunk).square()).sum((1, 2))

        z = self._noise(len(ctx), generator)
        chunk = self._sample(ctx, z, generator)  # taken as it is: if it is no number, that is seen
        best = cost(chunk)
        for _ in range(self.config.candidates - 1):
            other = self._noise(len(ctx), generator)
            sample = self._sample(ctx, other, generator)
            better = (cost(sample) < best)[:, None, None]
            z, chunk = torch.where(better, other, z), torch.where(better, sample, chunk)
            best = torch.minimum(best, cost(sample))
        ones = torch.ones(len(ctx), device=z.device, dtype=z.dtype)
        for _ in range(self.config.iterations):
            seen, gradient = residual_gradient(self._onward, z, ones, ctx, old.chunk, weights)
            ahead = self._sample(ctx, z + 0.1 * gradient, generator)
            change = 10 * (ahead - seen.x0)  # J gradient
            curvature = (weights * change.square()).sum((1, 2))
            eta = gradient.square().sum((1, 2)) / curvature.clamp_min(1e-9)
            moved = z + eta.clamp_max(3.0)[:, None, None] * gradient
            moved = moved * (z.square().sum((1, 2)) / moved.square().sum((1, 2))).sqrt()[:, None, None]  # as likely as it was
            sample = self._sample(ctx, moved, generator)
            better = (cost(sample) < best)[:, None, None]
            z, chunk = torch.where(better, moved, z), torch.where(better, sample, chunk)
            best = torch.minimum(best, cost(sample))
            self.calls += 2 * self.policy.networks
        return chunk

    def _onward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Pred:
        return self.policy.field(x, t, ctx, torch.zeros_like(t))


class TrainedRTC(Planner):
    """Training-time real-time chunking (arXiv 2512.05964): the settled rows enter the network clean. No backward pass."""

    asks_field = True

    class Config(Config):
        pass

    def __init__(self, policy: Policy, config: TrainedRTC.Config | None = None) -> None:
        super().__init__(policy)
        if not policy.config.loss.prefix:
            raise ConfigError("planner 'rtc_trained': the policy was not trained for it; set policy.loss.prefix=8, or use 'rtc'")

    def _plan(self, ctx: Tensor, obs: Mapping[str, Tensor], old: Old, generator: Generators) -> Tensor:
        ahead = torch.arange(self.policy.horizon, device=ctx.device) - self.now
        given = torch.minimum(old.settled, old.known).clamp_max(self.policy.config.loss.prefix)[:, None]
        field = Pinned(self.policy.field, self.policy.path, old.chunk, (ahead >= 0) & (ahead < given))
        return self._sample(ctx, self._noise(len(ctx), generator), generator, field)


class RTI(Planner):
    """Real-time iteration (arXiv 2508.05396): the old chunk is the guess, ``steps`` steps from ``t_start`` on mend it.

    It stays in the mode it is in, and follows small changes only. ``t_change`` starts higher where the observation has changed
    more since the last plan than ``quiet`` (RMS over normalised vector features), up to 1, where nothing is left of the guess.
    """

    class Config(Config):
        t_start: float = pydantic.Field(default=0.7, gt=0, le=1)
        steps: int = pydantic.Field(default=3, ge=1)
        noise: float = pydantic.Field(default=0.7, ge=0, le=1)  # added to the guess, as a share of what is usual at t_start
        t_change: float = pydantic.Field(default=0.0, ge=0)  # time per unit of change
        quiet: float = pydantic.Field(default=0.1, ge=0)
        columns: tuple[int, ...] = ()  # of the network's action: those that are discrete, a gripper
        limit: float = pydantic.Field(default=0.1, gt=0)  # of the guess in these columns, so that little noise can flip them

    def __init__(self, policy: Policy, config: RTI.Config | None = None) -> None:
        super().__init__(policy)
        self.config = config or RTI.Config()
        if any(not 0 <= column < policy.action_transform.dim for column in self.config.columns):
            raise ConfigError(f"planner 'rti': columns {self.config.columns} of an action of {policy.action_transform.dim}")
        self._newest: Tensor | None = None

    def reset(self, rows: Sequence[int] | None = None) -> None:
        if rows is None or self._newest is None:
            self._newest = None
        else:
            self._newest[list(rows)] = torch.nan  # no change is seen from what is not known

    def _plan(self, ctx: Tensor, obs: Mapping[str, Tensor], old: Old, generator: Generators) -> Tensor:
        config, path = self.config, self.policy.path
        noise = self._noise(len(ctx), generator)
        t = torch.full((len(ctx),), config.t_start, dtype=torch.float64, device=ctx.device)
        if config.t_change:
            t = (t + config.t_change * (self._change(obs) - config.quiet).clamp_min(0)).clamp_max(1.0)
        t = torch.where(old.known > 0, t, 1.0)
        guess = old.chunk.clone()
        columns = list(config.columns)
        guess[:, :, columns] = guess[:, :, columns].clamp(-config.limit, config.limit)
        first = t == 1.0
        if bool(first.all()):
            return self._sample(ctx, noise, generator)
        share = torch.linspace(1, 0, config.steps + 1, dtype=torch.float64, device=ctx.device)[:, None]
        unit = noise / path.prior(torch.ones((), device=ctx.device))
        start = path.perturb(guess, config.noise * unit, t)
        chunk = self._sample(ctx, start, generator, times=share * t)
        if bool(first.any()):
            calls = self.calls
            full = self._sample(ctx, noise, generator)
            chunk = torch.where(first[:, None, None], full, chunk)
            self.calls = calls  # of a robot that is on its way
        return chunk

    def _change(self, obs: Mapping[str, Tensor]) -> Tensor:
        """RMS of the change of the newest normalised vector observations since the last plan ``[B]``; 0 where there was none."""
        names = [name for name in self.policy.normalizers if name in obs]
        newest = torch.cat([self.policy.normalizer(n).normalize(obs[n].float())[:, -1].flatten(1) for n in names], dim=1).double()
        before, self._newest = self._newest, newest
        if before is None or before.shape != newest.shape:
            return torch.zeros(len(newest), dtype=torch.float64, device=newest.device)
        return (newest - before).square().mean(1).sqrt().nan_to_num(0.0)


class Streaming(Planner):
    """Streaming diffusion (arXiv 2406.04806): a buffer whose rows are noisier the later they are due.

    Every plan takes all rows down one stair: those due next become clean, and each group of ``group`` rows becomes what the one
    before it was. Costs a share of a full sample, and answers late: most of a row's noise was taken away under old observations.
    Rows that were executed since move the buffer on, in time with the stairs when ``group`` rows are executed between plans.
    """

    asks_field = True

    class Config(Config):
        group: int | None = pydantic.Field(default=None, ge=1)  # None: as trained, policy.loss.stairs
        steps: int = pydantic.Field(default=2, ge=1)  # calls for one stair

    def __init__(self, policy: Policy, config: Streaming.Config | None = None) -> None:
        super().__init__(policy)
        self.config = config or Streaming.Config()
        if policy.sampler.own_walk:
            raise ConfigError(
                f"planner 'streaming' walks by itself, without what sampler '{policy.config.sampler['type']}' does on its "
                "own way; use planner plain, rti or bid"
            )
        if not policy.config.loss.staircase:
            raise ConfigError("planner 'streaming': this policy was not trained for it; train with policy.loss.staircase=0.5")
        self.group = self.config.group or policy.config.loss.stairs
        self._eps: Tensor | None = None  # noise in the buffer [B, H, A]; the clean part is what the executor holds

    def reset(self, rows: Sequence[int] | None = None) -> None:
        if rows is None:
            self._eps = None

    def levels(self, share: float) -> Tensor:
        """Times of the rows ``[H]``, float64: ``share`` 1 before a plan, 0 after it; rows before "now" are clean."""
        stairs = staircase(self.rows, self.group, torch.full((1,), share, dtype=torch.float64), self.policy.path)[0]
        return torch.cat([stairs.new_zeros(self.now), stairs]).to(self.policy.device)

    def _plan(self, ctx: Tensor, obs: Mapping[str, Tensor], old: Old, generator: Generators) -> Tensor:
        path, batch = self.policy.path, len(ctx)
        begins = old.known == 0
        chunk = old.chunk
        fresh = self.policy.config.initial_noise * randn(old.chunk.shape, generator, device=ctx.device)
        if bool(begins.any()):
            full = self._sample(ctx, path.prior(fresh), generator)
            chunk = torch.where(begins[:, None, None], full, chunk)
            if bool(begins.all()):
                self._eps = fresh
                return chunk
            self.calls = 0
        # The buffer moved on by the rows that are no longer known ahead; rows that enter are pure noise.
        ahead = torch.arange(self.policy.horizon, device=ctx.device) - self.now
        source = ahead + (self.rows - old.known)[:, None]
        stays = ((source < self.rows) & (ahead >= 0) & ~begins[:, None])[:, :, None]
        index = (source + self.now).clamp(0, self.policy.horizon - 1)[:, :, None].expand_as(fresh)
        eps = torch.where(stays, (fresh if self._eps is None else self._eps).gather(1, index), fresh)
        shares = torch.linspace(1, 0, self.config.steps + 1, dtype=torch.float64).tolist()
        times = torch.stack([self.levels(share).expand(batch, -1) for share in shares])
        x = path.perturb(chunk, eps, times[0])
        seen = Pred(chunk, eps)
        for t, u in itertools.pairwise(times):
            seen = clip_pred(path, self.policy.field(x, t.to(x.dtype), ctx), x, t, self.policy.sampler.clip)
            x = self.policy.sampler.step(path, seen, x, t, u).sample(generator)
            self.calls += self.policy.networks
        alpha, sigma = (broadcast_time(value, x) for value in path.coefficients(times[-1]))
        clean = torch.where(sigma > 0, seen.x0, x)
        eps = torch.where(sigma > 0, (x - alpha * clean) / sigma.clamp_min(1e-9), seen.eps)
        self._eps = torch.where(begins[:, None, None], fresh, eps)
        return torch.where(begins[:, None, None], chunk, clean)


class BID(Planner):
    """Bidirectional decoding (arXiv 2408.17355): the costly reference.

    Of ``samples`` chunks the one is taken that is near the old chunk (backward coherence, rows counting ``decay`` to their index)
    and, in the mean over the ``keep`` most coherent, nearer to strong samples than to weak ones (forward contrast). The weak
    policy is this one at one step, which blurs its modes into their mean.
    """

    class Config(Config):
        samples: int = pydantic.Field(default=16, ge=1)
        keep: int = pydantic.Field(default=3, ge=1)
        decay: float = pydantic.Field(default=0.9, gt=0, le=1)
        contrast: float = pydantic.Field(default=1.0, ge=0)

    def __init__(self, policy: Policy, config: BID.Config | None = None) -> None:
        super().__init__(policy)
        self.config = config or BID.Config()
        if self.config.keep > self.config.samples:
            raise ConfigError(f"planner 'bid': keep {self.config.keep} of {self.config.samples} samples; keep fewer")

    def _plan(self, ctx: Tensor, obs: Mapping[str, Tensor], old: Old, generator: Generators) -> Tensor:
        batch, n = len(ctx), self.config.samples
        shape = (batch, n, self.policy.horizon, self.policy.action_transform.dim)
        start = self.policy.start(randn(shape, generator, device=ctx.device)).flatten(0, 1)
        many = ctx.repeat_interleave(n, 0)
        strong = self._sample(many, start, _each(generator, n)).unflatten(0, (batch, n))
        self.calls *= n
        ahead = torch.arange(self.policy.horizon, device=ctx.device) - self.now
        weight = torch.where((ahead >= 0) & (ahead < old.known[:, None]), self.config.decay ** ahead.clamp_min(0), 0.0)

        def incoherence(chunks: Tensor) -> Tensor:
            return ((chunks - old.chunk[:, None]).square().sum(-1) * weight[:, None]).sum(-1)

        loss = incoherence(strong)
        if self.config.contrast:
            ones = torch.ones(len(many), device=ctx.device, dtype=start.dtype)
            weak = self.policy.field(start, ones, many, torch.zeros_like(ones)).x0.unflatten(0, (batch, n))
            self.calls += n * self.policy.networks
            near, far = (_nearest(chunks, incoherence(chunks), self.config.keep) for chunks in (strong, weak))
            loss = loss + self.config.contrast * (_distance(strong, near) - _distance(strong, far))
        return strong[torch.arange(batch, device=ctx.device), loss.argmin(1)]


def _nearest(chunks: Tensor, loss: Tensor, keep: int) -> Tensor:
    """The ``keep`` chunks of least loss: ``[B, N, H, A]`` to ``[B, keep, H, A]``."""
    index = loss.topk(keep, dim=1, largest=False).indices
    return chunks.gather(1, index[:, :, None, None].expand(-1, -1, *chunks.shape[2:]))


def _distance(chunks: Tensor, others: Tensor) -> Tensor:
    """Mean squared distance of each chunk to the others ``[B, N]``, summed over its entries."""
    return (chunks[:, :, None] - others[:, None]).square().sum((-2, -1)).mean(2)


def _each(generator: Generators, n: int) -> Generators:
    """Generators for ``n`` samples of each robot, one after the other: what a robot draws depends on no other."""
    return generator if isinstance(generator, torch.Generator) else [g for g in generator for _ in range(n)]


PLANNERS: Mapping[str, str] = {
    "plain": "robopolicy.deploy.planner:Plain",
    "rtc": "robopolicy.deploy.planner:RTC",
    "rtc_trained": "robopolicy.deploy.planner:TrainedRTC",
    "rti": "robopolicy.deploy.planner:RTI",
    "streaming": "robopolicy.deploy.planner:Streaming",
    "bid": "robopolicy.deploy.planner:BID",
}


def _name(cls: type[Planner]) -> str:
    """As it is asked for."""
    place = f"{cls.__module__}:{cls.__name__}"
    return next((name for name, known in PLANNERS.items() if known == place), place)


def make_planner(setting: Mapping[str, object] | str, policy: Policy) -> Planner:
    """The planner that ``{type: rtc, limit: 10}``, or a name, asks for. Raises ConfigError."""
    cls, config = component("planner", setting, PLANNERS)
    planner: Planner = cls(policy, config)
    return planner
