"""Fine-tuning on a GPU. Where there is none, torch's device ``meta``, which computes shapes only, still refuses mixed devices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import DPPO, base, config, finetuner

from robopolicy.cli import main
from robopolicy.policy import Policy
from robopolicy.rl.heads.registry import HEADS
from robopolicy.rl.report import final_test

METHODS = [DPPO if name == "dppo" else {"type": name} for name in HEADS]


def settings(tmp_path: Path, method: dict[str, Any], device: str, iterations: int) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "env": {"num_envs": 3, "num_chunks": 2},
        "ppo": {"epochs": 1, "value_only_iterations": 0, "kl_weight": 0.1, "entropy_weight": 0.1, "bc": {"weight": 0.1}},
        "eval": {"test_episodes": 2, "films": 0},
    }
    checkpoint = tmp_path / "base" if (tmp_path / "base").exists() else base(tmp_path / "base")
    return {**config(checkpoint, method=method, iterations=iterations, **changes), "device": device}


@pytest.fixture
def shapes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves the device ``meta`` is zero, or true."""
    leave, number, truth, load = torch.Tensor.cpu, torch.Tensor.__float__, torch.Tensor.__bool__, Policy.load_state_dict
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else leave(x))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda x: 0.0 if x.is_meta else number(x))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: True if x.is_meta else truth(x))
    monkeypatch.setattr(Policy, "load_state_dict", lambda self, x, **k: load(self, {n: v.cpu() for n, v in x.items()}, **k))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["type"])
def test_nothing_is_left_on_another_device(tmp_path: Path, method: dict[str, Any]) -> None:
    run = finetuner(settings(tmp_path, method, "meta", 1), tmp_path / "run")
    assert {p.device.type for m in (run.head, run.head.base, run.value, run.base.policy) for p in m.parameters()} == {"meta"}
    assert run.run() == 0
    again = finetuner(settings(tmp_path, method, "meta", 2), tmp_path / "run", resume=True)
    assert again.run() == 0
    assert final_test(again) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["type"])
def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path, method: dict[str, Any]) -> None:
    """Noise is drawn on the CPU, so only rounding differs; and a run may be resumed elsewhere."""
    runs = {device: finetuner(settings(tmp_path, method, device, 2), tmp_path / device) for device in ("cpu", "cuda")}
    assert [run.run() for run in runs.values()] == [0, 0]
    there = runs["cuda"].policy.state_dict()
    for name, here in runs["cpu"].policy.state_dict().items():
        torch.testing.assert_close(there[name].cpu(), here, atol=1e-3, rtol=1e-2)
    again = finetuner(settings(tmp_path, method, "cpu", 3), tmp_path / "cuda", resume=True)
    assert again.run() == 0
    assert math.isfinite(float(next(again.policy.net.parameters()).sum()))


@pytest.mark.parametrize(
    ("device", "text"), [("gpu", "device 'gpu' is no torch device"), ("cuda:99", "device 'cuda:99': torch sees")]
)
def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str, text: str) -> None:
    checkpoint = base(tmp_path / "base")
    assert main(["finetune", str(checkpoint), f"device={device}", "--out", str(tmp_path / "run")]) == 2
    assert text in capsys.readouterr().err
