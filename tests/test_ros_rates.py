"""The benchmarks of rates and of killed processes in a short form, over real ROS: loose bounds, for CI machines are busy."""

import json
from pathlib import Path

import pytest

from benchmarks import ros2_kill, ros2_rates
from benchmarks.ros2_watch import ranks


def test_control_keeps_its_rate_with_cameras_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rates.json"
    arguments = ["--rates", "100", "--cameras", "on", "--seconds", "3", "--json", str(out)]
    assert ros2_rates.main(arguments) == 0
    (run,) = json.loads(out.read_text())["runs"]
    assert 5 < run["period_ms"]["p50"] < 20
    assert 100 < run["periods"] < 400
    assert run["missed"] < run["periods"] / 2
    assert run["pictures_per_second"] > 1
    assert set(run["cpu"]) == {"virtual_arm", "robopolicy_policy", "inference"}
    assert run["state_age_ms"]["p50"] < 150  # else the arm would have been held
    assert "| 100 | on | 3 |" in capfd.readouterr().out


def test_killed_processes_leave_an_arm_that_stands(tmp_path: Path) -> None:
    out = tmp_path / "kill.json"
    assert ros2_kill.main(["--seeds", "1", "--watch", "2", "--json", str(out)]) == 0
    trials = {trial["victim"]: trial for trial in json.loads(out.read_text())["trials"]}
    assert all(trial["moving"] for trial in trials.values())
    node, inference, arm = trials["node"], trials["inference"], trials["arm"]
    assert node["last_command_s"] < 0.5  # nobody commands any more
    assert not node["inference_alive"]  # it goes with the node
    assert any(said.startswith("stopped: inference") for said in inference["said"])
    assert arm["said"][0].startswith("holding: stale state")
    assert arm["targets_moved_s"] < 1.5
    for trial in (node, inference):
        assert trial["reflexes"] == 0
        assert trial["still_s"] < 1.5
        assert trial["travel_rad"] < 0.2  # and no farther than where it was told to stop
        assert max(trial["velocity"], trial["acceleration"]) <= 1.0


def test_growth_is_a_slope_without_the_beginning() -> None:
    memory = [(60.0 * minute, {"arm": 500.0 if minute == 0 else 100.0 + 2.0 * minute}) for minute in range(10)]
    assert ros2_rates.growth(memory, "arm") == pytest.approx(2.0)


def test_percentiles_of_nothing_are_nothing() -> None:
    import numpy as np

    assert ranks(np.array([])) == {}
    assert ranks(np.array([1.0, 3.0]))["max"] == 3.0
