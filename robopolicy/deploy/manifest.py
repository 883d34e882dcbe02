"""``manifest.json`` of an export: everything that the graphs beside it do not hold, and the digest of every file.

Normalisers and action transform are inside the graphs and nowhere else. What is left for the host is the sampler's walk, as
numbers (:class:`Step`), and what the robot must know: features with shapes, units and rates. Read without torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from robopolicy.config import Config, parse
from robopolicy.errors import CheckpointError, ConfigError
from robopolicy.features import Feature

FORMAT = 2  # 2: with the poses in the action, and the ranges of observations
FILE = "manifest.json"

Backend = Literal["onnx", "openvino", "torchscript"]


class Step(Config):
    """One step of the sampler's walk, from ``t`` down to ``to``.

    With the field's ``(x0, eps)``, sharpened as ``extrapolate`` and ``heun`` say, the next state is
    ``to_x0 x0 + to_eps eps + std z``. ``alpha`` and ``sigma`` are the path's scales at ``t``: ``x = alpha x0 + sigma eps``.
    """

    t: float
    to: float
    alpha: float
    sigma: float
    to_x0: float
    to_eps: float
    std: float
    extrapolate: float = 0.0  # x0 += extrapolate (x0 - x0 of the step before): DPM-Solver++(2M)
    heun: bool = False  # the field is asked at `to` as well, and the mean of both directions is taken


class Pose(Config):
    """A pose in the action: three entries of position from ``start`` on, and a rotation behind them."""

    start: int = pydantic.Field(ge=0)
    rotation: Literal["rot6d", "quat_xyzw", "rotvec"]


class Graph(Config):
    """One network graph: its file, and the fixed shapes ``[batch, ...]`` of inputs and outputs, in order."""

    file: str
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]


class Manifest(Config):
    """An exported policy.

    ``graphs``: ``encode`` (observations in their units to context), ``field`` (``x, t, context`` to ``x0, eps``; above the time
    ``frozen_above`` it is ``field_early``), ``decode`` (chunk to actions in their units, from the present row on) and, for few
    steps without fresh noise, ``chunk``: noise and observations to actions at once.
    """

    format: int
    backend: Backend
    batch: int = pydantic.Field(ge=1)  # rows of every graph; more are run block by block
    observations: dict[str, dict[str, Any]]
    action: dict[str, Any]
    poses: tuple[Pose, ...]  # in the action: what must not be interpolated entry by entry
    n_obs_steps: int = pydantic.Field(ge=1)
    horizon: int = pydantic.Field(ge=1)
    n_action_steps: int = pydantic.Field(ge=1)
    rows: int = pydantic.Field(ge=1)  # of a chunk of actions: row 0 is due at the time of the newest observation
    dt: float | None  # seconds between rows; None where the action's rate is unknown
    chunk_dim: int = pydantic.Field(ge=1)  # width of the normalised chunk [batch, horizon, chunk_dim]
    noise_convention: str
    noise_draws: int = pydantic.Field(ge=1)  # noise is [draws, batch, horizon, chunk_dim], the first for the start
    noise_scale: float = pydantic.Field(ge=0)  # of the first draw, before it enters `field`; inside `chunk`
    path: dict[str, Any]
    prediction: str
    sampler: dict[str, Any]
    initial_noise: float
    jumps: bool  # `field` takes a fourth input: the time to go to
    frozen_above: float | None
    clip: float | None
    nfe: int  # network calls for a chunk, of all parents of a composition
    steps: tuple[Step, ...] = pydantic.Field(min_length=1)
    graphs: dict[str, Graph]
    opset: int | None
    trained: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]  # lower and upper ends of observations, for StartGuard
    parity: dict[str, float]  # largest deviations from torch, seen when it was made
    checkpoint: dict[str, Any]  # path, digest and provenance of what was exported
    provenance: dict[str, Any]
    files: dict[str, str]  # sha256 of every file

    @property
    def observation_features(self) -> dict[str, Feature]:
        return {name: Feature.from_json(name, value) for name, value in self.observations.items()}

    @property
    def action_feature(self) -> Feature:
        return Feature.from_json(self.action["name"], {k: v for k, v in self.action.items() if k != "name"})

    @property
    def fused(self) -> bool:
        return "chunk" in self.graphs

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` with a digest of its own."""
        document = self.model_dump(mode="json")
        text = json.dumps({**document, "sha256": _own_digest(document)}, indent=1, allow_nan=False)
        (folder / FILE).write_text(text + "\n")


def observed(name: str) -> str:
    """What graphs call their input of this observation; no name of an observation has a dot."""
    return f"obs.{name}"


def is_export(path: str | Path) -> bool:
    """Whether ``path`` is a folder with an exported policy."""
    return (Path(path) / FILE).exists()


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest and check every file against it.

    Raises:
        CheckpointError: It is absent, damaged, of another format, or a file is absent or differs from its digest.
    """
    folder = Path(folder)
    mend = "export the checkpoint again with `robopolicy export`"
    try:
        document = json.loads((folder / FILE).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"'{folder}' is no export: it has no {FILE}; name a folder that `robopolicy export` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"export '{folder}': {FILE} is damaged ({error}); {mend}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(
            f"export '{folder}' has format {found!r}; this version reads {FORMAT}. Update robopolicy, or {mend}"
        )
    if document.pop("sha256", None) != _own_digest(document):
        raise CheckpointError(f"export '{folder}': {FILE} differs from its own digest, it was altered; {mend}")
    try:
        manifest = parse(Manifest, document, where=f"export '{folder}': {FILE}")
    except ConfigError as error:
        raise CheckpointError(f"{error}; {mend}") from error
    for name, digest in manifest.files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"export '{folder}' has no {name}; copy the whole folder, or {mend}")
        if file_digest(folder / name) != digest:
            raise CheckpointError(f"export '{folder}': {name} differs from its digest in {FILE} (cut off or altered); {mend}")
    return manifest


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()
