"""What a run logs: ``metrics.jsonl`` and TensorBoard events, and the curves that reports draw from them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from robopolicy.data.store import write_file


class Metrics:
    """``metrics.jsonl`` (read by the report) and TensorBoard events; rows after a resumed step are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = self.path.open("a", buffering=1)  # a line at a time, so that others can follow
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log ``values``. A full disk costs the row and a warning, not the run: training goes on, and space may come back."""
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            tqdm.write(f"warning: metrics of step {step} could not be written ({error})", file=sys.stderr)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``; a last line that a killed process left half-written is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def learning_curve(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run for its report: metric name -> (step, value)."""
    names = {
        "train/loss": "training loss",
        "val/loss": "validation loss",
        "eval/success": "success",
        "eval/max_reward": "max reward",
    }
    rows = read_metrics(out / "metrics.jsonl")
    curves = {title: [(row["step"], row[key]) for row in rows if key in row] for key, title in names.items()}
    return {title: points for title, points in curves.items() if points}
