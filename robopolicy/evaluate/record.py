"""What an evaluation leaves behind: one row per episode, how it was made, and the summary that follows from the rows.

``eval.json`` is written and read here. The rows are the truth; the summary in the file is for people and other tools, and is
computed again on reading.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic

from robopolicy.config import Config, parse
from robopolicy.errors import ConfigError, EvaluationError
from robopolicy.evaluate.stats import Interval, mean_interval, success_interval
from robopolicy.task import TaskSpec

SCHEMA = 1
BOOTSTRAP_SEED = 0  # of the intervals, so that the same rows give the same figures


class Episode(Config):
    """One episode. ``success`` is "at any step"; rewards are the task's, per control step."""

    seed: int = pydantic.Field(ge=0)
    success: pydantic.StrictBool
    max_reward: pydantic.FiniteFloat
    total_reward: pydantic.FiniteFloat
    length: int = pydantic.Field(ge=1)


class Rollout(NamedTuple):
    """One finished episode and the actions ``[length, A]`` that made it; replaying them reproduces it."""

    episode: Episode
    actions: np.ndarray


class TaskRecord(Config):
    """The task by name and constructor arguments."""

    name: str
    args: dict[str, Any] = pydantic.Field(default_factory=dict)

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(self.name, self.args)


class Film(NamedTuple):
    """A filmed episode: its row, and the video as MP4."""

    episode: Episode
    mp4: bytes


class Settings(Config):
    """How the episodes were run. Those above the line change the outcomes, those below do not (beyond rounding)."""

    noise_seed: int
    n_obs_steps: int
    n_action_steps: int
    sampler: dict[str, Any] | None = None
    initial_noise: float | None = None  # scale of the noise that sampling started from
    nfe: int | None = None  # evaluations of networks for one chunk, of all parents of a composition
    # ---
    num_envs: int
    num_workers: int
    threads: int
    device: str = "cpu"


class Summary(NamedTuple):
    """Success and score are separate figures: a policy can nearly solve every episode and succeed in none."""

    episodes: int
    successes: int
    success: Interval
    success_exact: Interval
    mean_max_reward: Interval
    mean_length: float

    def to_json(self) -> dict[str, Any]:
        return {key: value._asdict() if isinstance(value, Interval) else value for key, value in self._asdict().items()}


class Evaluation(Config):
    """The outcome of :func:`robopolicy.evaluate.run.evaluate`."""

    schema_version: int = SCHEMA
    policy: str
    task: TaskRecord
    settings: Settings
    provenance: dict[str, Any] = pydantic.Field(default_factory=dict)
    seconds: pydantic.FiniteFloat = 0.0
    episodes: tuple[Episode, ...] = pydantic.Field(min_length=1)
    films: tuple[Film, ...] = pydantic.Field(default=(), exclude=True)  # written to files of their own, not into the JSON

    @pydantic.field_validator("episodes", mode="after")
    @classmethod
    def _seeds_differ(cls, value: tuple[Episode, ...]) -> tuple[Episode, ...]:
        check_seeds([episode.seed for episode in value])
        return value

    @property
    def seeds(self) -> np.ndarray:
        """Environment seeds ``int64 [n]``, ascending, as all the following."""
        return np.array([e.seed for e in self.episodes], dtype=np.int64)

    @property
    def successes(self) -> np.ndarray:
        return np.array([e.success for e in self.episodes], dtype=bool)

    @property
    def max_rewards(self) -> np.ndarray:
        return np.array([e.max_reward for e in self.episodes], dtype=np.float64)

    @cached_property
    def summary(self) -> Summary:
        k, n = int(self.successes.sum()), len(self.episodes)
        return Summary(
            episodes=n,
            successes=k,
            success=success_interval(k, n),
            success_exact=success_interval(k, n, method="exact"),
            mean_max_reward=mean_interval(self.max_rewards, np.random.default_rng(BOOTSTRAP_SEED)),
            mean_length=float(np.mean([e.length for e in self.episodes])),
        )

    @property
    def success(self) -> Interval:
        """Probability of success at any step, Wilson interval."""
        return self.summary.success

    @property
    def max_reward(self) -> Interval:
        """Mean over episodes of the largest reward, BCa bootstrap interval."""
        return self.summary.mean_max_reward

    def restricted(self, seeds: Collection[int]) -> Evaluation:
        """The same with the episodes of ``seeds`` only."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}  # model_copy would copy the cached summary too
        return Evaluation(**{**fields, "episodes": tuple(e for e in self.episodes if e.seed in seeds)})

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        s = self.summary
        return [
            f"success          {s.successes}/{s.episodes} = {s.success}",
            f"mean max reward  {s.mean_max_reward}",
        ]

    def to_json(self) -> dict[str, Any]:
        value = self.model_dump(mode="json")
        rows = value.pop("episodes")
        return {**value, "summary": self.summary.to_json(), "episodes": rows}

    def save(self, path: Path) -> None:
        """Write ``eval.json``: the summary before the rows, one row per line."""
        write_json(path, self.to_json())


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises EvaluationError when there are none, one is repeated or negative."""
    if len(seeds) == 0:
        raise EvaluationError("no seeds to evaluate on; ask for at least 1 episode")
    if len(set(seeds)) != len(seeds):
        raise EvaluationError("a seed occurs twice; repeated episodes are not independent, use each seed once")
    if min(seeds) < 0:
        raise EvaluationError(f"seed {min(seeds)} is negative; seeds start at 0")


def load_evaluation(path: str | Path) -> Evaluation:
    """Read an ``eval.json``. Raises EvaluationError: one line that names the file, the key, and what is wrong with it."""
    path = Path(path)
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise EvaluationError(f"'{path}' does not exist; `robopolicy eval` writes eval.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"'{path}' is no readable JSON ({error}); evaluate again") from error
    if not isinstance(value, dict) or "schema_version" not in value or "episodes" not in value:
        raise EvaluationError(
            f"'{path}' is no evaluation: expected a mapping with schema_version and episodes; `robopolicy eval` writes one"
        )
    if value["schema_version"] != SCHEMA:
        raise EvaluationError(f"'{path}' has schema {value['schema_version']!r}; this version reads {SCHEMA}: evaluate again")
    value.pop("summary", None)
    value.pop("films", None)
    try:
        return parse(Evaluation, value, where=f"'{path}'")
    except (ConfigError, EvaluationError) as error:
        raise EvaluationError(str(error) if str(path) in str(error) else f"'{path}': {error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON, but each entry of a top-level list ``episodes`` on one line, so that files stay readable and small."""
    rows = value.get("episodes")
    text = json.dumps({**value, "episodes": "@rows"} if rows else value, indent=1, allow_nan=False)
    if rows:
        text = text.replace('"@rows"', "[\n  " + ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows) + "\n ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
