"""Checkpoints: complete or absent, verified on reading, no pickles."""

import errno
import json
from pathlib import Path

import pytest
import torch

from robopolicy.errors import CheckpointError
from robopolicy.train import checkpoint as module
from robopolicy.train.checkpoint import CheckpointFolder, find_policy, read_tensors, write_tensors


def write(folder: CheckpointFolder, step: int) -> Path:
    return folder.write(step, {"policy": ({"w": torch.full((4,), float(step))}, {"step": step})})


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), "b": torch.arange(4), "c": torch.tensor(2.0)}
    write_tensors(tmp_path / "x", tensors, {"k": [1, "two"]})
    read, document = read_tensors(tmp_path / "x")
    assert document["k"] == [1, "two"]
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3, 4):
        write(folder, step)
    folder.prune(keep={2})
    assert folder.steps() == [2, 4]
    assert find_policy(tmp_path) == folder.path(4) == (tmp_path / "checkpoints" / "last").resolve()


@pytest.mark.parametrize("stage", ["save_file", "sync_path"])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 1)

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, stage, full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        write(folder, 2)
    monkeypatch.undo()
    assert folder.steps() == [1]
    assert [p.name for p in folder.folder.iterdir() if p.name.startswith(".")] == []
    assert read_tensors(find_policy(tmp_path) / "policy")[0]["w"][0] == 1


def test_a_partial_folder_of_a_killed_process_is_ignored_and_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    write(folder, 1)
    (folder.folder / ".partial_00000002").mkdir()
    assert folder.steps() == [1]
    write(folder, 3)
    assert not (folder.folder / ".partial_00000002").exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated weights": lambda p: _truncate(p / "policy.safetensors"),
    "empty weights": lambda p: (p / "policy.safetensors").write_bytes(b""),
    "flipped bit": lambda p: _flip(p / "policy.safetensors"),
    "pickle instead of safetensors": lambda p: (p / "policy.safetensors").write_bytes(b"\x80\x04\x95" + b"evil" * 30),
    "huge header": lambda p: (p / "policy.safetensors").write_bytes(b"\xff" * 64),
    "absent weights": lambda p: (p / "policy.safetensors").unlink(),
    "absent document": lambda p: (p / "policy.json").unlink(),
    "truncated document": lambda p: _truncate(p / "policy.json"),
    "document is a list": lambda p: (p / "policy.json").write_text(json.dumps([1])),
    "document is binary": lambda p: (p / "policy.json").write_bytes(b"\xff\xfe\x00"),
    "no digest": lambda p: (p / "policy.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damage_is_a_one_line_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = write(CheckpointFolder(tmp_path), 1)
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path / "policy")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_policy(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_policy(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an export"):
        find_policy(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["zarr.json"], "it is a dataset: train on it"),
        ([".zgroup"], "it is a dataset: train on it"),
        (["eval.json", "report.html"], r"it is an evaluation: .*thing/eval\.json"),
        (["decode.onnx"], "without their manifest.json: copy the whole folder"),
        (["a/policy.json", "b/checkpoints/step_4/policy.json", "c/notes.txt"], r"it holds runs; name one: .*thing/a, .*thing/b$"),
        (["notes.txt"], "has the run saved one yet"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(files: list[str], expected: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / "thing" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "thing" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=expected):
        find_policy(tmp_path / "thing")
    with pytest.raises(CheckpointError, match="has the run saved one yet"):
        find_policy(tmp_path / "thing" / files[0])
