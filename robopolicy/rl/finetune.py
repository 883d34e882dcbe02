"""``Finetuner``: one run of on-policy fine-tuning in one folder, resumable to the bit.

An iteration is a roll-out and the updates on it. All its randomness is a function of (seed, iteration), and environments are
saved as the seeds and actions of the episodes they are in, so a checkpoint at the end of an iteration is the whole state of the
run. A signal during a roll-out gives it up; during updates it waits for them.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from robopolicy.config import component
from robopolicy.data.store import WriteLock, write_file
from robopolicy.errors import CheckpointError, ConfigError, RobopolicyError
from robopolicy.evaluate.record import Evaluation
from robopolicy.evaluate.run import SEEDS, evaluate
from robopolicy.nets.values import ValueNet
from robopolicy.policy import Policy
from robopolicy.provenance import provenance
from robopolicy.rl.base import Base, demonstrations, load_base
from robopolicy.rl.config import FinetuneConfig
from robopolicy.rl.diagnose import Diagnosis
from robopolicy.rl.envs import ChunkEnv, Ended
from robopolicy.rl.gae import RewardScale
from robopolicy.rl.guard import Collapse, Guard
from robopolicy.rl.heads.base import Head
from robopolicy.rl.heads.registry import HEADS
from robopolicy.rl.metrics import RunMetrics
from robopolicy.rl.ppo import PPO, Demonstrated
from robopolicy.rl.rollout import collect
from robopolicy.train.checkpoint import CheckpointFolder, read_tensors
from robopolicy.train.metrics import Metrics, read_metrics
from robopolicy.train.run import changed_keys, pick_device, recipe, signals, step_seed

FORMAT = 1
COLLAPSED = 3  # exit code of a run that its guard stopped

# What may be changed in config.yaml before a resume.
MAY_CHANGE = ("name", "iterations", "eval", "env.num_workers", "device", "threads", "checkpoint_every", "guard")


class _Stopped(Exception):
    """A signal arrived during an evaluation, which is not worth waiting for."""


class _Boundary(NamedTuple):
    """What a roll-out changes, as it was at the end of the last iteration."""

    env: dict[str, np.ndarray]
    scale: dict[str, np.ndarray]


class Finetuner:
    """One fine-tuning run in one folder.

    Args:
        config: The full configuration.
        out: Run folder; gets ``config.yaml``, ``checkpoints/``, ``metrics.jsonl`` and TensorBoard events.
        resume: Continue from the last checkpoint in ``out``; otherwise ``out`` must not hold one.
    """

    def __init__(self, config: FinetuneConfig, out: Path, resume: bool = False) -> None:
        self.config, self.out = config, out
        self.checkpoints = CheckpointFolder(out / "checkpoints")
        done = self.checkpoints.steps()
        if done and not resume:
            raise ConfigError(
                f"'{out}' already holds a run (iteration {done[-1]}); continue with --resume {out} or choose another --out"
            )
        if resume and not done:
            raise CheckpointError(f"'{out}' holds no checkpoint to resume from; start the run again with --out {out}")
        torch.set_num_threads(config.threads)
        self.device = pick_device(config.device, "device")
        if self.device.type == "cuda":
            # Its rounding depends on the size of the batch, and at 1e-3 would reach the ratio through convolutions.
            torch.backends.cudnn.allow_tf32 = False
        self.base: Base = load_base(config, self.device)
        cls, settings = component("method", config.method, HEADS)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # torch's initialisers take no generator
            self.head: Head = cls(settings, self.base.policy).to(self.device)
            self.value = ValueNet(config.value, self.head.policy.ctx_dim).to(self.device)
        self.ppo = PPO(config.ppo, self.head, self.value, self._demonstrations())
        self.scale = RewardScale(config.env.num_envs)
        self.guard = Guard(config.guard)
        self.diagnosis = Diagnosis(config)
        self.iteration = 0
        self.env_steps = 0
        self.seconds = 0.0
        self.best_window: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None  # in memory, for a collapse
        self.stop_signal: int | None = None
        self.evaluating = False
        self._restored: dict[str, np.ndarray] | None = None
        if resume:
            self._restore(self.checkpoints.path(done[-1]))

    @property
    def policy(self) -> Policy:
        """The policy as it would be deployed now."""
        return self.head.policy

    def _demonstrations(self) -> Callable[[int, torch.Generator], Demonstrated] | None:
        bc = self.config.ppo.bc
        if not bc.weight or bc.source == "base":
            return None
        return demonstrations(self.config, self.head.policy)

    # -- the run -------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to ``config.iterations``.

        Returns:
            The exit code: 0, :data:`COLLAPSED`, or 128 + signal after a signal (everything saved).
        """
        config = self.config
        self.out.mkdir(parents=True, exist_ok=True)
        lock = WriteLock(self.out)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        try:
            with (
                ChunkEnv(
                    config.task.spec,
                    self.policy,
                    num_envs=config.env.num_envs,
                    num_workers=config.env.num_workers,
                    seed=config.seed,
                    reward=config.env.reward,
                ) as env,
                RunMetrics(self.out, self.iteration, self.env_steps) as metrics,
                signals(self._on_signal),
                tqdm(
                    total=config.iterations,
                    initial=self.iteration,
                    desc=config.name,
                    unit="iteration",
                    file=sys.stderr,
                    mininterval=0.2 if sys.stderr.isatty() else 15.0,
                ) as bar,
            ):
                write_file(self.out / "config.yaml", text.encode())  # not before the task turned out to fit
                return self._loop(env, metrics, bar)
        finally:
            lock.release()

    def _loop(self, env: ChunkEnv, metrics: Metrics, bar: tqdm[Any]) -> int:
        config = self.config
        for row in read_metrics(metrics.path):  # of the run before it was resumed
            self.diagnosis(row)
        obs = env.restore(self._restored) if self._restored is not None else env.reset()
        if self.iteration == 0:
            with contextlib.suppress(_Stopped):
                self._log(metrics, self._evaluate())
        boundary = _Boundary(env.state(), self.scale.state())
        while self.iteration < config.iterations and self.stop_signal is None:
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(step_seed(config.seed, self.iteration))
            self.head.anneal(self.iteration / config.iterations)
            collected = collect(
                env,
                obs,
                self.head,
                self.value,
                num_chunks=config.env.num_chunks,
                gae_lambda=config.ppo.gae_lambda,
                scale=self.scale if config.env.scale_reward else None,
                base=self.head.base if config.ppo.bc.weight and config.ppo.bc.source == "base" else None,
                generator=generator,
                stop=lambda: self.stop_signal is not None,
            )
            if collected is None:
                break
            rollout, obs = collected
            collecting = time.perf_counter() - started
            diagnostics = self.ppo.update(rollout.batch, self.iteration, generator)
            self.iteration += 1
            self.env_steps += rollout.env_steps
            seconds = time.perf_counter() - started
            self.seconds += seconds
            boundary = _Boundary(env.state(), self.scale.state())
            summary = episode_summary(rollout.ended)
            with torch.no_grad():
                few = {name: values[:512] for name, values in rollout.batch.record.items()}
                summary["ratio/divergence_from_base"] = float(self.head.divergence(rollout.batch.ctx[:512], few))
            self._log(
                metrics,
                {
                    **diagnostics,
                    **summary,
                    "time/collect": collecting,
                    "time/update": seconds - collecting,
                    "time/env_steps_per_s": rollout.env_steps / seconds,
                },
            )
            bar.update()
            bar.set_postfix_str(progress_line(summary, self.env_steps, config.env.reward.source), refresh=False)
            collapse = self.guard(self.iteration, scores(rollout.ended, config.env.reward.source))
            if collapse is not None:
                tqdm.write(self._say(collapse), file=sys.stderr)
                if config.guard.stop:
                    self._return_to_best()
                    return COLLAPSED
            elif self.guard.best is not None and self.guard.best[2] == self.iteration:
                self.best_window = (self.iteration, *self._snapshot(boundary))
            if config.eval.episodes and (self.iteration % config.eval.every == 0 or self.iteration == config.iterations):
                with contextlib.suppress(_Stopped):
                    self._log(metrics, self._evaluate())
            if self.iteration % config.checkpoint_every == 0 and self.iteration < config.iterations:
                self._save_or_warn(boundary)
        if self.iteration:
            self.save(boundary)  # a full disk is an error here: there is no later chance
        return 0 if self.stop_signal is None else 128 + self.stop_signal

    def _log(self, metrics: Metrics, values: dict[str, float]) -> None:
        """Write a row of metrics, and say what is newly wrong with the run."""
        row = {**values, "train/env_steps": float(self.env_steps)}
        metrics.write(self.iteration, row)
        for finding in self.diagnosis({"step": self.iteration, **row}):
            tqdm.write(f"warning: iteration {self.iteration}: {finding}", file=sys.stderr)

    def _evaluate(self) -> dict[str, float]:
        config = self.config.eval
        if not config.episodes:
            return {}
        result = self.evaluation(self.policy, SEEDS["validation"], config.episodes)
        return {
            "eval/success": result.success.mean,
            "eval/success_low": result.success.low,
            "eval/success_high": result.success.high,
            "eval/max_reward": result.max_reward.mean,
            "eval/total_reward": float(np.mean([episode.total_reward for episode in result.episodes])),
        }

    def evaluation(self, policy: Policy, first_seed: int, episodes: int, name: str = "policy") -> Evaluation:
        """Evaluate a policy on the run's task; a signal cuts it short."""
        self.evaluating = True
        try:
            return evaluate(
                policy,
                self.config.task.spec,
                range(first_seed, first_seed + episodes),
                num_envs=self.config.eval.num_envs,
                num_workers=self.config.eval.num_workers,
                progress=False,
                name=name,
            )
        finally:
            self.evaluating = False

    def _on_signal(self, number: int) -> None:
        if self.stop_signal is not None:
            raise KeyboardInterrupt  # the second one does not wait
        tqdm.write("stopping: updates in progress are finished, then everything is saved", file=sys.stderr)
        self.stop_signal = number
        if self.evaluating:
            raise _Stopped

    def _say(self, collapse: Collapse) -> str:
        kept = self.best_window[0] if self.best_window is not None else 0
        fate = f"; the run stops, and its last checkpoint is that of iteration {kept}" if self.config.guard.stop else ""
        return (
            f"collapse: training episodes scored {collapse.best:.3f} up to iteration {collapse.iteration} and {collapse.now:.3f} "
            f"now{fate}. Lower ppo.lr or the method's clip, or anchor it with ppo.bc.weight"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------------

    def save(self, boundary: _Boundary) -> Path:
        """Write the checkpoint of the present iteration. Raises CheckpointError when the disk is full."""
        return self._write(self.iteration, *self._snapshot(boundary))

    def _save_or_warn(self, boundary: _Boundary) -> None:
        try:
            self.save(boundary)
        except CheckpointError as error:
            tqdm.write(f"warning: {error}; training goes on and tries again at the next checkpoint", file=sys.stderr)

    def _snapshot(self, boundary: _Boundary) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of everything that changes, as tensors and as a document."""
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        tensors |= {f"value.{name}": value for name, value in self.value.state_dict().items()}
        for owner, optimizer, parameters in self._optimizers():
            for name, parameter in parameters.items():
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer.{owner}.{key}.{name}"] = value
        arrays = {f"env.{k}": v for k, v in boundary.env.items()} | {f"scale.{k}": v for k, v in boundary.scale.items()}
        tensors |= {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        state = {
            "format": FORMAT,
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "seconds": self.seconds,
            "lr": self.ppo.lr,
            "guard": {"history": list(self.guard.history), "best": self.guard.best},
            "base": self.base.digest,
            "recipe": recipe(self.config, MAY_CHANGE),
        }
        return {name: value.detach().clone() for name, value in tensors.items()}, state

    def _write(self, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        weights = under(tensors, "head.policy.")
        if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
            raise RobopolicyError(
                f"fine-tuning diverged: the weights of iteration {iteration} are not finite; lower ppo.lr. Checkpoints are intact"
            )
        source = {
            **provenance(),
            "task": self.config.task.model_dump(mode="json"),
            "experiment": self.config.name,
            "seed": self.config.seed,
            "step": iteration,
            "env_steps": state["env_steps"],
            "method": self.config.method,
            "base": {"path": self.config.base, "digest": self.base.digest, "provenance": self.base.provenance},
        }
        parts = {"finetune": (tensors, state), "policy": (weights, {**self.policy.document(), "provenance": source})}
        if self.best_window is not None and self.best_window[0] < iteration:  # where a collapse will return to
            parts["best"] = self.best_window[1:]
        path = self.checkpoints.write(iteration, parts)
        for later in (step for step in self.checkpoints.steps() if step > iteration):  # after a collapse
            shutil.rmtree(self.checkpoints.path(later))
        self.checkpoints.prune(set())
        return path

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer, dict[str, torch.nn.Parameter]]]:
        return [
            ("policy", self.ppo.optimizer, self.ppo.parameters),
            ("value", self.ppo.value_optimizer, dict(self.value.named_parameters())),
        ]

    def _return_to_best(self) -> None:
        """Make the best window's checkpoint the last one: what came later is a policy on its way down."""
        assert self.best_window is not None
        iteration, tensors, state = self.best_window
        self._write(iteration, tensors, state)
        self.head.load_state_dict(under(tensors, "head."))

    def _restore(self, folder: Path) -> None:
        tensors, state = read_tensors(folder / "finetune")
        read_tensors(folder / "policy")
        if state.get("format") != FORMAT:
            raise CheckpointError(f"checkpoint '{folder}' has format {state.get('format')!r}; this version resumes {FORMAT}")
        if state.get("base") != self.base.digest:
            raise CheckpointError(f"'{self.config.base}' is not the base that this run started from; put that one back")
        if changed := changed_keys(state.get("recipe", {}), self.config, MAY_CHANGE):
            raise CheckpointError(
                f"config.yaml of '{self.out}' changed since the checkpoint: {changed}; restore it, or start a new run"
            )
        try:
            self.head.load_state_dict(under(tensors, "head."))
            self.value.load_state_dict(under(tensors, "value."))
            for owner, optimizer, parameters in self._optimizers():
                moments = under(tensors, f"optimizer.{owner}.")
                for name, parameter in parameters.items():
                    state_of = {
                        key.split(".", 1)[0]: value.to(parameter.device)
                        for key, value in moments.items()
                        if key.split(".", 1)[1] == name
                    }
                    if state_of:  # none before the first update of the policy
                        optimizer.state[parameter] = state_of
            self.scale.restore({name: value.numpy() for name, value in under(tensors, "scale.").items()})
            self._restored = {name: value.numpy() for name, value in under(tensors, "env.").items()}
            self.iteration, self.env_steps = int(state["iteration"]), int(state["env_steps"])
            self.seconds, self.ppo.lr = float(state["seconds"]), float(state["lr"])
            self.guard.history = [tuple(row) for row in state["guard"]["history"]]
            self.guard.best = None if state["guard"]["best"] is None else tuple(state["guard"]["best"])
            if (folder / "best.json").exists():
                tensors, state = read_tensors(folder / "best")
            self.best_window = (int(state["iteration"]), tensors, state)
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"checkpoint '{folder}' does not fit config.yaml of its run ({reason})") from error


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def scores(ended: list[Ended], source: str) -> list[float]:
    """What the guard watches: what the source of the reward makes of an episode."""
    if source == "success":
        return [float(episode.success) for episode in ended]
    return [episode.total_reward if source == "task" else episode.max_reward for episode in ended]


def episode_summary(ended: list[Ended]) -> dict[str, float]:
    """Means over the exploring episodes that ended in an iteration; nothing when none did."""
    if not ended:
        return {}
    return {
        "train/success": float(np.mean([e.success for e in ended])),
        "train/max_reward": float(np.mean([e.max_reward for e in ended])),
        "train/total_reward": float(np.mean([e.total_reward for e in ended])),
        "train/episode_length": float(np.mean([e.length for e in ended])),
        "train/episodes": float(len(ended)),
    }


def progress_line(summary: dict[str, float], env_steps: int, source: str) -> str:
    """What the progress bar says of an iteration: of its episodes what the reward asks for."""
    name = {"success": "success", "best": "max_reward", "task": "total_reward"}[source]
    value = summary.get(f"train/{name}")  # none when no episode ended
    done = "" if value is None else f"exploring {name.replace('_', ' ')} {value:.2f}, "
    return f"{done}{env_steps / 1e6:.2f} M steps"
