"""The code and the commands in docs/extend.md run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extend.md"


def test_the_extend_page_runs_from_top_to_bottom(tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w+)(?: file=(\S+))?\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert sum(kind == "console" for kind, *_ in blocks) == 3
    scripts = Path(sys.executable).parent  # where the installed `robopolicy` is
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for kind, file, text in blocks:
        if kind != "console":
            (tmp_path / file).write_text(text)
            continue
        for line in text.strip().splitlines():
            done = subprocess.run(line.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    result = json.loads(next((tmp_path / "outputs" / "dot").rglob("eval.json")).read_text())
    successes = sum(bool(episode["success"]) for episode in result["episodes"])
    assert successes >= 40, f"{successes} of 50"
