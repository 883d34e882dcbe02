"""Real kill -9 during recording; benchmarks/crash_recording.py does the same for longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("zarr_format", ["2", "3"])
def test_kill_9_while_recording_loses_nothing_acknowledged_and_damages_nothing(zarr_format: str) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "crash_recording.py"
    command = [sys.executable, str(script), "--kills", "3", "--zarr-format", zarr_format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 3
    assert result["episodes_lost"] == result["damaged_stores"] == result["bad_concurrent_reads"] == 0
    assert result["concurrent_reads"] > 0
