"""The fault campaign and the episode benchmark in their quick forms, over real ROS; and that their tables can say no."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ros2_cell, ros2_episodes, ros2_faults
from hardware.ros2.runtime import RosError


def row(fault: str, seed: int, **changes: Any) -> dict[str, Any]:
    worst = {"position": -0.3, "workspace": -0.01, "table": -0.01, "velocity": 0.4, "command_velocity": 0.5}
    found = {
        "stream": "state", "fault": fault, "seed": seed, "load": 1.0, "mode": "stopped", "cause": "stale state: 0.16, limit 0.1",
        "to_hold": 0.2 + 0.1 * seed, "to_still": 0.4, "after": "by itself", "success": True, "reflexes": 0,
        "real_time_factor": 1.0,
    }  # fmt: skip
    return found | changes | {"worst": worst | changes.get("worst", {})}


def test_the_table_tells_holds_times_causes_and_what_was_beyond_limits() -> None:
    rows = [row("drop all", seed) for seed in range(3)]
    rows += [row("drop half", 0, to_hold=None, to_still=None, after="ran on", holds=1, worst={"command_jerk": 0.5, "jerk": 1.2})]
    rows += [row("none", 0, to_hold=None, to_still=None, after="ran on", worst={"velocity": 1.2, "table": 0.01}, reflexes=1)]
    text = ros2_faults.table(rows)
    assert "| state | drop all | 3 | 3 | 0.30 / 0.40 | 0.40 / 0.40 | stale state | by itself 3 | none |" in text
    assert "| state | none | 1 | 0 |  |  |  | ran on 1 | reflex, table, velocity |" in text
    assert "| state | drop half | 1 | 0 |  |  |  | held, ran on 1 | none |" in text
    assert "beyond its bound: 1 of 5" in text
    assert "above the rated ones in 1 cells" in text
    assert "In 4 cells commands never came regularly enough" in text


def test_the_comparison_has_intervals_and_pairs_seeds() -> None:
    record = {"real_time_factor": 1.0, "reflexes": 0, "velocity": {"worst": 0.4, "of": "joint1"}}
    ros = {seed: {"success": seed != 3, "load": 1.0, "stops": [], "record": record} for seed in range(10)}
    plain = {seed: {"success": True} for seed in range(10)}
    text = ros2_episodes.table({"seeds": list(range(10)), "ros": ros, "plain": plain})
    assert "| plain simulation | 10/10 | 1.000 [0.7" in text
    assert "| virtual arm over DDS | 9/10 | 0.900 [0." in text
    assert "-0.100 [-" in text


def test_every_cell_has_a_domain_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two benchmarks at once would share an arm."""
    before, seen = dict(os.environ), []

    def start(*_: Any) -> None:
        seen.append(os.environ["ROS_DOMAIN_ID"])
        if len(seen) < 2:
            with ros2_cell.Cell("second", tmp_path):
                pass
        raise RosError("it has not started")

    monkeypatch.setattr(ros2_cell, "_start", start)
    with pytest.raises(RosError, match="it has not started"), ros2_cell.Cell("first", tmp_path):
        pass
    assert len(set(seen)) == 2
    assert dict(os.environ) == before


def test_the_campaign_holds_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "faults"
    arguments = ["--seeds", "1", "--streams", "state", "--out", str(out)]
    assert ros2_faults.main([*arguments, "--faults", "NaN in all"]) == 0
    rows = json.loads((out / "faults.json").read_text())["rows"]
    assert [(row["fault"], row["seed"]) for row in rows] == [("NaN in all", 100_000)]
    (nan,) = rows
    assert nan["mode"] in ("holding", "stopped")
    assert "stale state" in nan["cause"]
    assert nan["to_hold"] < 1.5, "loosely: the machine may be busy"
    assert nan["after"] in ("by itself", "by start")
    assert nan["put_in"]["nan"] > 10
    assert not {"position", "table", "velocity", "command_velocity"} & set(ros2_faults.violations(nan))
    (out / "faults.md").unlink()
    assert ros2_faults.main([*arguments, "--faults", "NaN in all"]) == 0, "nothing is started again"
    assert "| state | NaN in all | 1 | 1 |" in (out / "faults.md").read_text()
