"""The fault campaign and the episode benchmark in their quick forms, over real ROS; and that their tables can say no."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ros2_cell, ros2_episodes, ros2_faults
from hardware.ros2.runtime import RosError


def row(fault: str, seed: int, **changes: Any) -> dict[str, Any]:
    worst = {"position": -0.3, "workspace": -0.01, "free_workspace": -0.01, "command_workspace": -0.01, "table": -0.01}
    worst |= {"velocity": 0.4, "command_velocity": 0.5}
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
    rows += [row("frozen", 0, worst={"acceleration": 3.0, "free_acceleration": 0.9})]  # by what it pushes
    rows += [row("delay all", 0, worst={"workspace": 0.03, "jerk": 1.3, "free_jerk": 1.3})]
    rows += [row("NaN in all", 0, worst={"command_workspace": 0.002, "command_table": 0.002})]
    text = ros2_faults.table(rows)
    assert "| state | drop all | 3 | 3 | 0.30 / 0.40 | 0.40 / 0.40 | stale state | by itself 3 | none |" in text
    assert "| state | none | 1 | 0 |  |  |  | ran on 1 | reflex, table, velocity |" in text
    assert "| state | drop half | 1 | 0 |  |  |  | held, ran on 1 | none |" in text
    assert "| state | frozen | 1 | 1 | 0.20 / 0.20 | 0.40 / 0.40 | stale state | by itself 1 | none |" in text
    assert "| state | delay all | 1 | 1 | 0.20 / 0.20 | 0.40 / 0.40 | stale state | by itself 1 | workspace |" in text
    assert "by itself 1 | command_table, command_workspace |" in text
    assert "beyond its bound: 3 of 8" in text
    assert "above the rated ones in 3 cells, in 1 of them freely" in text
    assert "In 7 cells commands never came regularly enough" in text


def test_the_comparison_has_intervals_and_pairs_seeds() -> None:
    record = {"real_time_factor": 1.0, "reflexes": 0, "velocity": {"worst": 0.4, "of": "joint1"}}
    ros = {seed: {"success": seed != 3, "load": 1.0, "stops": [], "record": record} for seed in range(10)}
    plain = {seed: {"success": True} for seed in range(10)}
    text = ros2_episodes.table({"seconds": 8.0, "seeds": list(range(10)), "ros": ros, "plain": plain})
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


# Of each kind: what the arm says was put in, and whether it must hold the arm; what is doubled or overtaken is to be borne.
KINDS = {
    "drop all": ("drop", True),
    "delay 0.5 s": ("delay", True),
    "duplicate all": ("duplicate", False),
    "reorder half": ("reorder", False),
    "NaN in all": ("nan", True),
    "frozen": ("freeze", True),
    "wrong names": ("wrong_names", True),
    "wrong length": ("wrong_length", True),
    "clock -0.5 s": ("clock_jump", True),
}


def test_the_campaign_holds_at_every_kind_of_fault_and_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "quick"
    assert ros2_faults.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = {row["fault"]: row for row in json.loads((out / "faults.json").read_text())["rows"]}
    assert {row["seed"] for row in rows.values()} == {100_000}
    assert set(rows) == set(KINDS)
    for fault, (counter, holds) in KINDS.items():
        row = rows[fault]
        assert row["put_in"][counter] > 10, row
        broken = {"position", "workspace", "command_workspace", "command_table", "table", "velocity", "command_velocity"}
        assert not broken & set(ros2_faults.violations(row)), row
        assert row["after"] in ("by itself", "by start", "ran on"), row
        if holds:
            assert row["mode"] in ("holding", "stopped"), row
            assert row["cause"], row
            assert row["to_hold"] < 0.9, f"loosely, the machine may be busy: {row}"
    (out / "faults.md").unlink()
    assert ros2_faults.main(["--quick", "--out", str(tmp_path)]) == 0, "nothing is started again"
    assert "| state | NaN in all | 1 | 1 |" in (out / "faults.md").read_text()


def test_episodes_run_on_both_sides_and_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "quick"
    assert ros2_episodes.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((out / "episodes.json").read_text())
    seeds = {"200000", "200001"}
    assert set(found["plain"]) == set(found["ros"]) == seeds
    for row in found["ros"].values():
        assert "refused" not in row, row
        assert row["success"] or row["stops"] or row["seconds"] > 2.0, row
        assert 0.01 < row["record"]["velocity"]["worst"] <= 1.0, row
    monkeypatch.setattr(ros2_episodes, "Cell", lambda *_: pytest.fail("it is started again"))
    (out / "episodes.md").unlink()
    assert ros2_episodes.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "n = 2 episodes, seeds 200000 to 200001, at most 2 s each" in (out / "episodes.md").read_text()
