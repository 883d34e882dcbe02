"""Malformed stores: each is refused in one line that names the culprit, nothing is written, nothing is executed."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from robopolicy.cli import main
from robopolicy.data.combine import pack
from robopolicy.data.episodes import Episodes
from robopolicy.errors import DataError
from robopolicy.features import Feature

FEATURES = {
    "state": Feature("state", (3,), unit="m"),
    "image": Feature("image", (8, 8, 3), "uint8"),
    "action": Feature("action", (2,)),
}
ENDS = "meta/episode_ends"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound stores to spoil: ours in formats 3 and 2, a zip, and a foreign one in format 2 without compression."""
    folder = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    paths: dict[str, Path] = {
        "v3": folder / "v3.zarr",
        "v2": folder / "v2.zarr",
        "zip": folder / "v3.zarr.zip",
        "foreign": folder / "f.zarr",
    }
    for name, zarr_format in (("v3", 3), ("v2", 2)):
        with Episodes.create(paths[name], FEATURES, zarr_format=zarr_format) as episodes:  # type: ignore[arg-type]
            for length in (20, 15, 30):
                values = {n: rng.normal(size=(length, *f.shape)).astype(np.float32) for n, f in FEATURES.items() if n != "image"}
                episodes.append({**values, "image": rng.integers(0, 255, (length, 8, 8, 3), dtype=np.uint8)})
    pack(paths["v3"], paths["zip"])
    root = zarr.open_group(paths["foreign"], mode="w", zarr_format=2)
    for name, width in (("state", 3), ("action", 2)):
        root.create_array(
            f"data/{name}", data=rng.normal(size=(65, width)).astype(np.float32), chunks=(16, width), compressors=None
        )
    root.create_array(ENDS, data=np.array([20, 35, 65]), compressors=None)
    return paths


Spoil = Callable[[Path], None]


def edit(file: str, change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Change a JSON file."""

    def spoil(path: Path) -> None:
        value = json.loads((path / file).read_text())
        change(value)
        (path / file).write_text(json.dumps(value))

    return spoil


def put(file: str, **values: Any) -> Spoil:
    return edit(file, lambda v: v.update(values))


def declare(feature: str, **values: Any) -> Spoil:
    return edit("zarr.json", lambda v: v["attributes"]["robopolicy"]["features"][feature].update(values))


def write(file: str, content: bytes) -> Spoil:
    return lambda path: (path / file).write_bytes(content) and None  # type: ignore[func-returns-value]


def remove(name: str) -> Spoil:
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def cut(file: str, keep: float) -> Spoil:
    def spoil(path: Path) -> None:
        content = (path / file).read_bytes()
        (path / file).write_bytes(content[: int(len(content) * keep)])

    return spoil


def flip(file: str, at: float) -> Spoil:
    def spoil(path: Path) -> None:
        content = bytearray((path / file).read_bytes())
        content[int(len(content) * at)] ^= 0x55
        (path / file).write_bytes(content)

    return spoil


def values(array: str, change: Callable[[Any], None]) -> Spoil:
    def spoil(path: Path) -> None:
        change(zarr.open_array(path, path=array, mode="r+"))

    return spoil


def new_ends(ends: Any, **settings: Any) -> Spoil:
    def spoil(path: Path) -> None:
        shutil.rmtree(path / ENDS)
        zarr.open_group(path, mode="r+").create_array(ENDS, data=np.asarray(ends), **settings)

    return spoil


def grow_codecs(name: str) -> Spoil:
    return edit("data/state/zarr.json", lambda v: v["codecs"].append({"name": name, "configuration": {}}))


def chunk_is_folder(path: Path) -> None:
    (path / "data/state/c.0.0").unlink()
    (path / "data/state/c.0.0").mkdir()


class Bomb:
    """Runs when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def pickled(path: Path) -> None:
    metadata = json.loads((path / "data/state/.zarray").read_text())
    metadata.update(dtype="|O", filters=[{"id": "pickle", "protocol": 5}], compressor=None, fill_value=0)
    (path / "data/state/.zarray").write_text(json.dumps(metadata))
    (path / "data/state/0.0").write_bytes(pickle.dumps(Bomb()))


def pickled_codec_only(path: Path) -> None:
    metadata = json.loads((path / "data/state/.zarray").read_text())
    metadata.update(filters=[{"id": "pickle", "protocol": 5}], compressor=None)
    (path / "data/state/.zarray").write_text(json.dumps(metadata))
    (path / "data/state/0.0").write_bytes(pickle.dumps(Bomb()))


def format_3_inside_2(path: Path) -> None:
    shutil.rmtree(path / "data/state")
    zarr.create_array(path / "data/state", data=np.zeros((65, 3), np.float32), zarr_format=3)


def with_entry(name: str) -> Spoil:
    def spoil(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "x")

    return spoil


def zip_bytes(change: Callable[[bytearray], bytearray]) -> Spoil:
    return lambda path: path.write_bytes(change(bytearray(path.read_bytes()))) and None  # type: ignore[func-returns-value]


def spoil_stored_chunk(content: bytearray) -> bytearray:
    at = content.index(b"data/image/c.0.0.0.0") + 400  # inside the stored chunk, whose checksum the archive keeps
    content[at] ^= 0x55
    return content


STATE, ROOT = "data/state/zarr.json", "zarr.json"
CHUNK = "data/image/c.1.0.0.0"

# what is wrong: (store to spoil, how, what the message must name)
CASES: dict[str, tuple[str, Spoil, str]] = {
    "no root metadata": ("v3", remove(ROOT), "zarr.json: absent from the root"),
    "root metadata cut": ("v3", cut(ROOT, 0.5), "zarr.json: metadata is not valid JSON"),
    "root metadata is a list": ("v3", write(ROOT, b"[]"), "zarr.json: holds a list"),
    "root metadata is not text": ("v3", write(ROOT, b"\xff\xfe\x00"), "zarr.json: metadata is not valid JSON"),
    "root metadata nests without end": ("v3", write(ROOT, b"[" * 100_000), "zarr.json: metadata is not valid JSON"),
    "root is an array": ("v3", put(ROOT, node_type="array"), "not a group"),
    "attributes are a list": ("v3", put(ROOT, attributes=[]), "expected a mapping"),
    "our attribute is a string": ("v3", edit(ROOT, lambda v: v["attributes"].update(robopolicy="x")), "'robopolicy'.*str"),
    "newer schema": ("v3", edit(ROOT, lambda v: v["attributes"]["robopolicy"].update(schema=99)), "schema version 99"),
    "no features declared": (
        "v3",
        edit(ROOT, lambda v: v["attributes"]["robopolicy"].update(features={})),
        "declares no features",
    ),
    "features are a list": (
        "v3",
        edit(ROOT, lambda v: v["attributes"]["robopolicy"].update(features=[])),
        "features: holds a list",
    ),
    "declaration lacks a shape": (
        "v3",
        edit(ROOT, lambda v: v["attributes"]["robopolicy"]["features"]["state"].pop("shape")),
        "'state'",
    ),
    "declaration has an unknown key": ("v3", declare("state", units="m"), "'state': declaration has keys"),
    "declared dtype unknown": ("v3", declare("state", dtype="float31"), "'state': dtype 'float31'"),
    "declared dtype differs": ("v3", declare("state", dtype="float64"), "data/state: dtype float32, declared float64"),
    "declared shape differs": ("v3", declare("state", shape=[4]), r"data/state: shape per step \(3,\), declared \(4,\)"),
    "declared shape is empty": ("v3", declare("state", shape=[0]), "'state': shape"),
    "declared shape is text": ("v3", declare("state", shape="abc"), "'state'"),
    "wrong number of names": ("v3", declare("state", names=["x"]), "'state': 1 names"),
    "negative rate": ("v3", declare("state", rate=-1), "'state': rate"),
    "declared array absent": ("v3", remove("data/state"), "data/state: declared as a feature but absent"),
    "all data absent": ("v3", remove("data"), "data"),
    "no array metadata": ("v3", remove(STATE), "data/state: no array metadata"),
    "array metadata cut": ("v3", cut(STATE, 0.7), "data/state/zarr.json: metadata is not valid JSON"),
    "array metadata lacks codecs": (
        "v3",
        edit(STATE, lambda v: v.pop("codecs")),
        "data/state: metadata lacks or garbles 'codecs'",
    ),
    "negative shape": ("v3", put(STATE, shape=[-65, 3]), "data/state: shape"),
    "shape of text": ("v3", put(STATE, shape="65"), "data/state: shape"),
    "fractional shape": ("v3", put(STATE, shape=[65.5, 3]), "data/state: shape"),
    "boundless shape": ("v3", put(STATE, shape=[10**18, 3]), "data/state: shape.*beyond any real recording"),
    "empty axis": ("v3", put(STATE, shape=[65, 0]), "data/state: shape"),
    "scalar array": (
        "v3",
        put(STATE, shape=[], chunk_grid={"name": "regular", "configuration": {"chunk_shape": []}}),
        "data/state: a scalar",
    ),
    "chunks of zero": (
        "v3",
        put(STATE, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 3]}}),
        "data/state: chunks",
    ),
    "chunks of another rank": (
        "v3",
        put(STATE, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [16]}}),
        "data/state: 1 chunk",
    ),
    "string dtype": ("v3", put(STATE, data_type="string"), "data/state: dtype 'string'"),
    "dtype is an object": ("v3", put(STATE, data_type={"name": "x"}), "data/state: dtype"),
    "unknown codec": ("v3", grow_codecs("evil"), "data/state: codec 'evil'"),
    "object codec": ("v3", grow_codecs("vlen-utf8"), "data/state: codec 'vlen-utf8' stores Python objects"),
    "unknown chunk keys": ("v3", put(STATE, chunk_key_encoding={"name": "hash"}), "data/state: chunk key encoding"),
    "array shorter than the ends": (
        "v3",
        values("data/state", lambda a: a.resize((40, 3))),
        "data/state: 40 steps, but episodes end at 65",
    ),
    "chunk cut": ("v3", cut(CHUNK, 0.5), "data/image.*cannot be decoded"),
    "chunk empty": ("v3", write(CHUNK, b""), "data/image.*cannot be decoded"),
    "chunk of garbage": ("v3", write(CHUNK, b"\x00" * 300), "data/image.*cannot be decoded"),
    "one bit flipped": ("v3", flip(CHUNK, 0.6), "data/image.*cannot be decoded"),
    "chunk missing": ("v3", remove(CHUNK), "data/image: .*missing"),
    "chunk is a folder": ("v3", chunk_is_folder, "data/state: .*missing"),
    "NaN": ("v3", values("data/action", lambda a: a.__setitem__((22, 1), np.nan)), "'action'.*NaN"),
    "infinity": ("v3", values("data/action", lambda a: a.__setitem__((22, 1), -np.inf)), "'action'.*NaN or infinity"),
    "no ends": ("v3", remove(ENDS), "episode_ends: absent"),
    "ends metadata cut": ("v3", cut(f"{ENDS}/zarr.json", 0.2), "episode_ends/zarr.json: metadata is not valid JSON"),
    "ends of two axes": ("v3", new_ends([[20, 35, 65]]), "episode_ends: shape"),
    "ends of floats": ("v3", new_ends([20.0, 35.0, 65.0]), "episode_ends: dtype float64"),
    "negative end": ("v3", values(ENDS, lambda a: a.__setitem__(0, -20)), "episode_ends: entry 0 is negative"),
    "ends not increasing": ("v3", values(ENDS, lambda a: a.__setitem__(1, 19)), r"episode_ends: entry 1 \(19\) is before"),
    "episode without steps": ("v3", values(ENDS, lambda a: a.__setitem__(1, 20)), "episode_ends: episode 1 has no steps"),
    "end beyond the data": ("v3", values(ENDS, lambda a: a.__setitem__(2, 66)), "65 steps, but episodes end at 66"),
    "ends chunk cut": ("v3", cut(f"{ENDS}/c.0", 0.5), "episode_ends: .*cannot be decoded"),
    "ends chunk missing": ("v3", remove(f"{ENDS}/c.0"), "episode_ends"),
    "objects by pickle": ("v2", pickled, "data/state: .*pickle"),
    "pickle codec on numbers": ("v2", pickled_codec_only, "data/state: codec 'pickle' stores Python objects"),
    "object dtype": ("v2", put("data/state/.zarray", dtype="|O"), "data/state: object dtype"),
    "structured dtype": ("v2", put("data/state/.zarray", dtype=[["x", "<f4"]]), "data/state: dtype"),
    "text dtype": ("v2", put("data/state/.zarray", dtype="<U10"), "data/state: dtype"),
    "complex dtype": ("v2", put("data/state/.zarray", dtype="<c16"), "data/state: dtype"),
    "unknown compressor": ("v2", put("data/state/.zarray", compressor={"id": "evil"}), "data/state: codec 'evil'"),
    "fill value of text": ("v2", put("data/state/.zarray", fill_value="abc"), "data/state: metadata that zarr cannot use"),
    "odd order": ("v2", put("data/state/.zarray", order="X"), "data/state: metadata that zarr cannot use"),
    "fill value of text, format 3": ("v3", put(STATE, fill_value="abc"), "data/state: metadata that zarr cannot use"),
    "no bytes codec": (
        "v3",
        edit(STATE, lambda v: v.update(codecs=v["codecs"][1:])),
        "data/state: metadata that zarr cannot use",
    ),
    "odd chunk separator": ("v2", put("data/state/.zarray", dimension_separator="x"), "data/state: chunk separator"),
    "root group garbled": ("v2", write(".zgroup", b"{"), ".zgroup: metadata is not valid JSON"),
    "attributes garbled": ("v2", write(".zattrs", b"{]"), ".zattrs: metadata is not valid JSON"),
    "format 3 inside format 2": ("v2", format_3_inside_2, "data/state: zarr format 3 inside"),
    "format 2 chunk cut": ("v2", cut("data/image/1.0.0.0", 0.5), "data/image.*cannot be decoded"),
    "raw chunk of the wrong size": ("foreign", cut("data/state/1.0", 0.5), "data/state.*cannot be decoded"),
    "zip entry leads up": ("zip", with_entry("../evil"), r"'\.\./evil' leads outside"),
    "zip entry is absolute": ("zip", with_entry("/etc/evil"), "'/etc/evil' leads outside"),
    "zip entry on a drive": ("zip", with_entry("C:/evil"), "leads outside"),
    "zip cut": ("zip", zip_bytes(lambda c: c[: len(c) // 2]), "not a readable zip"),
    "zip without content": ("zip", zip_bytes(lambda c: bytearray()), "not a readable zip"),
    "zip of text": ("zip", zip_bytes(lambda c: bytearray(b"hello")), "not a readable zip"),
    "zip with a spoiled chunk": ("zip", zip_bytes(spoil_stored_chunk), "data/image.*cannot be decoded"),
}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_store_is_refused_in_one_line(
    case: str, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, spoil, expected = CASES[case]
    path = tmp_path / stores[base].name
    shutil.copytree(stores[base], path) if stores[base].is_dir() else shutil.copy(stores[base], path)
    spoil(path)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    # `merge` opens a store and reads every value of it, as training does.
    assert main(["data", "merge", str(path), "--out", str(tmp_path / "out.zarr")]) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1, message
    with pytest.raises(DataError, match=expected):
        raise DataError(message[0])
    assert snapshot(tmp_path) == before, "something was written"
    assert main(["data", "check", str(path)]) in (1, 2)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert snapshot(tmp_path) == before, "something was written"


def test_there_are_enough_cases_and_the_sound_stores_pass(stores: dict[str, Path], tmp_path: Path) -> None:
    assert len(CASES) >= 60
    for name, path in stores.items():
        assert main(["data", "merge", str(path), "--out", str(tmp_path / f"{name}.zarr")]) == 0
        assert main(["data", "check", str(path)]) == 0


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("hello")])
def test_paths_without_a_store_are_named(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nothing"
    make(path)
    for action in ("info", "check"):
        assert main(["data", action, str(path)]) == 2
        assert str(path) in capsys.readouterr().err
