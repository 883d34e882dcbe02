"""Behaviour cloning: the training loop, resumable to the bit.

Nothing in the loop has a hidden random state: the batch of step k, its noise and its dropout are functions of (seed, k). A
resumed run therefore needs only weights, their average, the optimiser's moments, the step and the table of best checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from robopolicy.data.store import WriteLock, write_file
from robopolicy.data.windows import Windows
from robopolicy.errors import CheckpointError, ConfigError, RobopolicyError
from robopolicy.evaluate.run import SEEDS, evaluate
from robopolicy.policy import Policy
from robopolicy.provenance import provenance
from robopolicy.train.checkpoint import CheckpointFolder, read_tensors
from robopolicy.train.ema import averaged
from robopolicy.train.experiment import Experiment, TrainConfig, build_untrained, open_data
from robopolicy.train.metrics import Metrics
from robopolicy.train.run import changed_keys, pick_device, recipe, signals, step_seed

TRAIN_FORMAT = 1

# What may be changed in config.yaml before a resume. Anything else would make another run of it.
MAY_CHANGE = (
    "name",
    "task",
    "eval",
    "data.path",
    "data.cache_dir",
    "train.steps",
    "train.device",
    "train.threads",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_best",
)


class _Stopped(Exception):
    """A signal arrived during an evaluation, which is not worth waiting for."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a half cosine to zero at ``config.steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def batch_indices(step: int, num_windows: int, batch_size: int, seed: int, cache: dict[int, np.ndarray]) -> np.ndarray:
    """Window indices of the batch at ``step``: epochs are seeded permutations, a last partial batch is dropped."""
    per_epoch = max(1, num_windows // batch_size)
    epoch, position = divmod(step, per_epoch)
    if epoch not in cache:
        cache.clear()
        cache[epoch] = np.random.default_rng([seed, epoch]).permutation(num_windows)
    return cache[epoch][position * batch_size : (position + 1) * batch_size]


def use_bf16(precision: str, device: torch.device, parameters: int) -> bool:
    """``auto``: bf16 autocast on GPUs that have it, and on CPUs with AMX tiles for policies of a million ``parameters`` or more.

    On such a CPU larger networks train 1.3 to 2.3 times faster for it; the smallest spend more on conversions than they gain
    (``benchmarks/train_step.py --precision-rule``).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and parameters >= 1_000_000 and torch.cpu._is_amx_tile_supported()


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to a joint norm of ``max_norm`` if it is larger; returns the norm before.

    On a CPU, gradients that are small enough are left alone: multiplying them by one is a pass over all of them in memory. On a
    GPU, looking whether they are would wait for it.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if norm.device.type != "cpu" or norm > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def to_tensors(value: Any, device: torch.device) -> Any:
    """Nested dictionaries of numpy arrays to tensors on ``device``."""
    if isinstance(value, Mapping):
        return {name: to_tensors(item, device) for name, item in value.items()}
    return torch.from_numpy(value).to(device, non_blocking=True)


class Trainer:
    """One training run in one folder. Distillation is the same loop with other samples and another loss: the methods under "what
    is learnt" are what it overrides.

    Args:
        experiment: The full configuration.
        out: Run folder; gets ``config.yaml``, ``checkpoints/``, ``metrics.jsonl`` and TensorBoard events.
        resume: Continue from the last checkpoint in ``out``; otherwise ``out`` must not hold one.
    """

    COMMAND: ClassVar[str] = "robopolicy train CONFIG"  # what starts such a run
    MAY_CHANGE: ClassVar[Sequence[str]] = MAY_CHANGE

    def __init__(self, experiment: Experiment, out: Path, resume: bool = False) -> None:
        self.experiment, self.config, self.out = experiment, experiment.train, out
        self.checkpoints = CheckpointFolder(out / "checkpoints")
        done = self.checkpoints.steps()
        if done and not resume:
            raise ConfigError(
                f"'{out}' already holds a run (step {done[-1]}); continue with --resume {out} or choose another --out"
            )
        if (out / "policy.json").exists():  # every verb would take it for what the run makes
            raise ConfigError(f"'{out}' holds a policy that is not of this run; choose another --out")
        if resume and not done:
            raise CheckpointError(f"'{out}' holds no checkpoint to resume from; start it with {self.COMMAND} --out {out}")
        self.device = pick_device(self.config.device, "train.device")
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.threads)
        self.data = open_data(experiment)
        if len(self.data.train) < 1:
            raise ConfigError(f"data: '{experiment.data.path}' gives no training windows; lower data.val_fraction")
        self.policy = self.build().to(self.device)
        self.ema = averaged(self.policy, self.config.ema)
        self.parameters = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.loss: Callable[..., Tensor] = torch.compile(self.batch_loss) if self.config.compile else self.batch_loss
        self.bf16 = use_bf16(self.config.precision, self.device, sum(p.numel() for p in self.parameters.values()))
        self.generator = torch.Generator(device=self.device)
        self.step = 0
        self.best: list[tuple[float, float, int]] = []  # (success, mean max reward, step), best first
        self.evaluating = False
        self.permutations: dict[int, np.ndarray] = {}
        self.stop_signal: int | None = None
        if resume:
            self._restore(self.checkpoints.path(done[-1]))

    @property
    def averaged_policy(self) -> Policy:
        """The policy with averaged weights, in evaluation mode: what is evaluated and saved."""
        policy = self.ema.module
        assert isinstance(policy, Policy)
        return policy.eval()

    # -- what is learnt ------------------------------------------------------------------------------------------------------

    def build(self) -> Policy:
        """The policy before training."""
        return build_untrained(self.experiment, self.data)

    @property
    def num_samples(self) -> int:
        return len(self.data.train)

    def samples(self, indices: np.ndarray) -> Mapping[str, Any]:
        """The samples ``indices [B]`` as nested dictionaries of arrays."""
        return self.data.train.batch(indices)

    def batch_loss(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """The loss of such samples, on the device."""
        return self.policy.loss(batch, generator)

    def validate(self) -> dict[str, float]:
        """What is measured whenever a checkpoint is written."""
        return {} if self.data.val is None else {"val/loss": self.validation_loss(self.data.val)}

    def origin(self) -> dict[str, Any]:
        """What the provenance of a checkpoint says besides versions and step."""
        task = None if self.experiment.task is None else self.experiment.task.model_dump(mode="json")
        return {
            "task": task,
            "experiment": self.experiment.name,
            "seed": self.experiment.seed,
            "data": {"path": self.experiment.data.path, **self._data_identity()},
        }

    @property
    def batch_size(self) -> int:
        return min(self.config.batch_size, self.num_samples)

    # -- one step ------------------------------------------------------------------------------------------------------------

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step; returns the loss and the gradient norm before clipping."""
        indices = batch_indices(self.step, self.num_samples, self.batch_size, self.experiment.seed, self.permutations)
        batch = to_tensors(self.samples(indices), self.device)
        self._seed(step_seed(self.experiment.seed, self.step))
        self.policy.train()
        with self._autocast():
            loss = self.loss(batch, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients(list(self.parameters.values()), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.step()
        self.ema.update_parameters(self.policy)
        self.step += 1
        return loss.detach(), norm.detach()

    def _seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        torch.default_generator.manual_seed(seed)  # dropout takes no generator
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    # -- the run -------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to ``config.steps``. Returns the exit code: 0, or 128 + signal after a signal (everything saved)."""
        self.out.mkdir(parents=True, exist_ok=True)
        lock = WriteLock(self.out)  # two runs in one folder would overwrite and delete each other's files
        config = self.experiment.model_dump(mode="json")
        write_file(self.out / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
        with (
            contextlib.ExitStack() as stack,
            Metrics(self.out, self.step) as metrics,
            signals(self._on_signal),
            self._progress() as bar,
        ):
            stack.callback(lock.release)
            logged, started = self.step, time.perf_counter()
            while self.step < self.config.steps and self.stop_signal is None:
                loss, norm = self.train_step()
                bar.update()
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    value, seconds = self._finite(loss, norm), time.perf_counter() - started
                    metrics.write(
                        self.step,
                        {
                            "train/loss": value,
                            "train/grad_norm": float(norm),
                            "train/lr": learning_rate(self.step - 1, self.config),
                            "train/steps_per_s": (self.step - logged) / seconds,
                        },
                    )
                    bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
                    logged, started = self.step, time.perf_counter()
                paused = time.perf_counter()
                evaluated = self.experiment.eval.episodes > 0 and self._due(self.experiment.eval.every)
                if evaluated:
                    with contextlib.suppress(_Stopped):
                        metrics.write(self.step, self._evaluate())
                if evaluated or self._due(self.config.checkpoint_every):  # the table of the best names checkpoints that exist
                    if measured := self.validate():
                        metrics.write(self.step, measured)
                    self._save_or_warn()
                started += time.perf_counter() - paused  # the logged rate is that of training alone
            self.save()  # a full disk is an error here: there is no later chance
        return 0 if self.stop_signal is None else 128 + self.stop_signal

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _finite(self, loss: Tensor, norm: Tensor) -> float:
        if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):
            raise self._diverged(f"loss {float(loss)}, gradient norm {float(norm)}")
        return float(loss)

    def _diverged(self, found: str) -> RobopolicyError:
        return RobopolicyError(
            f"training diverged at step {self.step}: {found}; lower train.lr or raise train.warmup_steps; look at "
            f"`robopolicy data check {self.experiment.data.path}`. Checkpoints are intact"
        )

    def validation_loss(self, windows: Windows, max_windows: int = 1024) -> float:
        """Loss of the averaged weights on held-out episodes, in evaluation mode, always with the same noise."""
        indices = np.linspace(0, len(windows) - 1, min(max_windows, len(windows))).astype(np.int64)
        generator = torch.Generator(device=self.device).manual_seed(step_seed(self.experiment.seed, -1 & 0xFFFFFFFF))
        total = 0.0
        with torch.no_grad(), self._autocast():
            for part in np.array_split(indices, max(1, len(indices) // self.batch_size)):
                total += float(self.averaged_policy.loss(to_tensors(windows.batch(part), self.device), generator)) * len(part)
        return total / len(indices)

    def _evaluate(self) -> dict[str, float]:
        assert self.experiment.task is not None
        config = self.experiment.eval
        seeds = range(SEEDS["validation"], SEEDS["validation"] + config.episodes)
        self.evaluating = True
        try:
            result = evaluate(
                self.averaged_policy,
                self.experiment.task.spec,
                seeds,
                num_envs=config.num_envs,
                num_workers=config.num_workers,
                progress=False,
            )
        finally:
            self.evaluating = False
        success, score = result.success.mean, result.max_reward.mean
        self.best = sorted([*self.best, (success, score, self.step)], reverse=True)[: self.config.keep_best]
        return {"eval/success": success, "eval/max_reward": score}

    def _progress(self) -> tqdm[Any]:
        interval = 0.2 if sys.stderr.isatty() else 15.0  # logs keep every refresh as a line
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.experiment.name,
            unit="step",
            file=sys.stderr,
            smoothing=0.02,
            mininterval=interval,
        )

    def _on_signal(self, number: int) -> None:
        if self.stop_signal is not None:
            raise KeyboardInterrupt  # the second one does not wait for the step to end
        tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint at step {self.step} and stopping", file=sys.stderr)
        self.stop_signal = number
        if self.evaluating:
            raise _Stopped

    # -- checkpoints ---------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write the checkpoint of the present step and drop those that are neither recent nor among the best.

        Raises:
            CheckpointError: The disk is full.
            RobopolicyError: The weights are not finite; they must not replace a checkpoint that is good.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise self._diverged("the weights are not finite")
        policy = self.averaged_policy
        source = {**provenance(), **self.origin(), "step": self.step}
        state = {
            "format": TRAIN_FORMAT,
            "step": self.step,
            "best": self.best,
            "bf16": self.bf16,
            "data": self._data_identity(),
            "recipe": self._recipe(),
        }
        path = self.checkpoints.write(
            self.step,
            {
                "train": (self.training_tensors(), state),
                "policy": (policy.state_dict(), {**policy.document(), "provenance": source}),
            },
        )
        self.checkpoints.prune({step for *_, step in self.best})
        return path

    def training_tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by name."""
        tensors = {f"model.{name}": value for name, value in self.policy.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def _restore(self, folder: Path) -> None:
        tensors, state = read_tensors(folder / "train")
        read_tensors(folder / "policy")  # what the run would leave behind if it has nothing left to do
        if state.get("format") != TRAIN_FORMAT:
            raise CheckpointError(
                f"checkpoint '{folder}' has training format {state.get('format')!r}; this version resumes {TRAIN_FORMAT}"
            )
        if state.get("data") != self._data_identity():
            raise CheckpointError(
                f"checkpoint '{folder}' was trained on other data ({state.get('data')}, now {self._data_identity()}); "
                "restore the dataset, or start a new run with another --out"
            )
        if changed := changed_keys(state.get("recipe", {}), self.experiment, self.MAY_CHANGE):
            raise CheckpointError(
                f"config.yaml of '{self.out}' changed since the checkpoint: {changed}; restore it, or start a new run elsewhere"
            )
        try:
            self.policy.load_state_dict(_under(tensors, "model."))
            self.ema.load_state_dict(_under(tensors, "ema."))
            for name, parameter in self.parameters.items():
                keys = {key.split(".")[1] for key in tensors if key.startswith("optimizer.")}
                self.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"].to(self.device) for key in keys}
            self.step = int(state["step"])
            self.bf16 = bool(state["bf16"])  # what "auto" chose then: it may choose otherwise on another machine or version
            self.best = [(float(success), float(score), int(step)) for success, score, step in state["best"]]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"checkpoint '{folder}' does not fit config.yaml of its run ({reason}); do not edit it between"
            ) from error

    def _recipe(self) -> dict[str, Any]:
        return recipe(self.experiment, self.MAY_CHANGE)

    def _data_identity(self) -> dict[str, Any]:
        episodes = self.data.episodes
        ends = hashlib.sha256(np.ascontiguousarray(episodes.ends, np.int64).tobytes()).hexdigest()[:16]
        return {"episodes": len(episodes), "steps": int(episodes.num_steps), "ends": ends, "windows": len(self.data.train)}

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except CheckpointError as error:
            if self.step >= self.config.steps:
                raise
            tqdm.write(f"warning: {error}; training goes on and tries again at the next checkpoint", file=sys.stderr)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
