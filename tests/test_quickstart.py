"""The quickstart, short: every stage runs and leaves what the README promises. Whether it learns is measured in benchmarks/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robopolicy import cli

SHORT = [
    "--demonstrations",
    "4",
    "--episodes",
    "3",
    "--workers",
    "1",
    "train.steps=20",
    "train.warmup_steps=2",
    "policy.net.width=32",
]


def test_quickstart_leaves_a_report_a_result_and_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quickstart"
    for _ in range(2):  # a second one replaces the first
        assert cli.main(["quickstart", "--out", str(out), *SHORT]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.html") in printed
    assert "try next" in printed
    report = (out / "report.html").read_text()
    assert "data:video/mp4;base64," in report
    assert "width: 32" in report  # the config
    result = json.loads((out / "result.json").read_text())
    assert len(result["episodes"]) == 3
    assert min(episode["seed"] for episode in result["episodes"]) >= 200_000
    assert {"success", "mean_max_reward"} <= set(result["summary"])
    assert (out / "checkpoints" / "last" / "policy.safetensors").exists()
    assert "validation loss" in report


def test_without_a_renderer_it_says_what_to_install_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "robopolicy.cli", "quickstart", "--out", str(tmp_path / "q"), *SHORT]
    environment = {**os.environ, "MUJOCO_GL": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on without films" in done.stderr
    assert "libegl1" in done.stderr
    assert "data:video" not in (tmp_path / "q" / "report.html").read_text()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert cli.main(["quickstart", "--out", str(tmp_path), *SHORT]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_run_of_train_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: took_a_day")
    (tmp_path / "checkpoints").mkdir()
    assert cli.main(["quickstart", "--out", str(tmp_path), *SHORT]) == 2
    assert "no quickstart's" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").exists()
