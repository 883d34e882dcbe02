"""Checkpoints on disk: folders of safetensors and JSON, no pickles, each complete or absent.

    RUN/checkpoints/step_00012000/  policy.json policy.safetensors   the averaged weights: what every other verb loads
                                    train.json  train.safetensors    what resuming needs besides
    RUN/checkpoints/last -> step_00012000

A checkpoint is written to a hidden folder, flushed to the disk and renamed. A process killed at any instant, or a disk that
fills up, leaves the earlier checkpoints untouched.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from robopolicy.data.store import sync_path
from robopolicy.errors import CheckpointError

STEP_PREFIX = "step_"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write ``path.safetensors`` and beside it ``path.json``, which records the digest of the tensors."""
    weights = path.with_suffix(".safetensors")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, weights)
    text = json.dumps({**document, "sha256": _digest(weights)}, indent=1, allow_nan=False)
    path.with_suffix(".json").write_text(text + "\n")
    for name in (weights, path.with_suffix(".json")):
        sync_path(name)


def read_document(path: Path) -> dict[str, Any]:
    """Read ``path.json``. Raises CheckpointError when it is absent or no JSON mapping."""
    file = path.with_suffix(".json")
    try:
        document = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint '{path.parent}' has no {file.name}; name a folder that `robopolicy train` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint file '{file}' is damaged ({error}); use an earlier checkpoint of the run") from error
    if not isinstance(document, dict):
        raise CheckpointError(
            f"checkpoint file '{file}' holds a {type(document).__name__}, not a mapping; use another checkpoint"
        )
    return document


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote. Raises CheckpointError when a file is absent, truncated or altered."""
    document = read_document(path)
    weights = path.with_suffix(".safetensors")
    try:
        tensors = load_file(weights)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint '{path.parent}' has no {weights.name}; copy it beside {path.name}.json") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint file '{weights}' is no complete safetensors file ({error}); use an earlier checkpoint of the run"
        ) from error
    if document.get("sha256") != _digest(weights):
        raise CheckpointError(
            f"checkpoint file '{weights}' differs from the digest in {path.name}.json; use an earlier checkpoint"
        )
    return tensors, document


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = (p.name.removeprefix(STEP_PREFIX) for p in self.folder.glob(f"{STEP_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"{STEP_PREFIX}{step:08d}"

    def write(self, step: int, parts: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Path:
        """Write the checkpoint of ``step``: each part is ``name -> (tensors, document)``.

        Raises:
            CheckpointError: The disk is full or not writable; earlier checkpoints are untouched.
        """
        final, partial = self.path(step), self.folder / f".partial_{step:08d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(".partial_*"):  # a killed process left it
                shutil.rmtree(stale)
            if not final.exists():  # training is deterministic: what is there is what would be written
                partial.mkdir()
                for name, (tensors, document) in parts.items():
                    write_tensors(partial / name, tensors, document)
                sync_path(partial)
                partial.rename(final)
                sync_path(self.folder)
            link = self.folder / ".last"
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            link.replace(self.folder / "last")
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to '{self.folder}' ({error}); free some space. Earlier ones stay"
            ) from error
        return final

    def prune(self, keep: set[int]) -> None:
        """Delete the checkpoints whose step is not in ``keep``; the newest always stays."""
        for step in self.steps()[:-1]:
            if step not in keep:
                doomed = self.folder / f".partial_{step:08d}"  # killed half-way, it must not pass for a checkpoint
                self.path(step).rename(doomed)
                shutil.rmtree(doomed)


def find_policy(path: str | Path) -> Path:
    """The folder that holds ``policy.json``: ``path`` itself, or the last checkpoint of the run folder ``path``.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"checkpoint '{path}' does not exist; give a run of `robopolicy train` or `quickstart`, or one of its checkpoints"
        )
    if (path / "policy.json").exists():
        return path
    if (path / "manifest.json").exists():
        raise CheckpointError(
            f"'{path}' is an export, graphs that only act; name the checkpoint it was made from (in its manifest.json)"
        )
    for folder in (CheckpointFolder(path / "checkpoints"), CheckpointFolder(path)):
        if steps := folder.steps():
            return folder.path(steps[-1])
    raise CheckpointError(f"'{path}' holds no checkpoint (no policy.json, no checkpoints/step_*); {_instead(path)}")


def _instead(path: Path) -> str:
    """What a folder without a checkpoint is, as far as can be seen."""
    if any((path / name).exists() for name in ("zarr.json", ".zgroup")):
        return "it is a dataset: train on it with `robopolicy train CONFIG data.path=...`"
    if (path / "eval.json").exists():
        return f"it is an evaluation: `robopolicy compare` takes two files like '{path / 'eval.json'}'"
    if any(path.glob("*.onnx")) or any(path.glob("*.xml")) or any(path.glob("*.pt")):
        return "it holds graphs of an export without their manifest.json: copy the whole folder"
    runs = sorted(str(run) for run in path.iterdir() if run.is_dir() and _is_run(run)) if path.is_dir() else []
    if runs:
        return f"it holds runs; name one: {', '.join(runs[:5])}{', ...' if len(runs) > 5 else ''}"
    return "has the run saved one yet?"


def _is_run(path: Path) -> bool:
    return (path / "policy.json").exists() or bool(CheckpointFolder(path / "checkpoints").steps())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
