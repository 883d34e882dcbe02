"""Fine-tuning from pixels, and of every network: one iteration, in which the ratio is checked to be 1 before the first update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Dot

from robopolicy.config import parse
from robopolicy.data.normalize import Normalizer
from robopolicy.policy import Policy, PolicyConfig, load_policy
from robopolicy.rl.config import FinetuneConfig
from robopolicy.rl.finetune import Finetuner

PIXELS = {"type": "multimodal", "rgb": {"widths": [8, 8], "group_width": 8, "crop": 0.75, "keypoints": 4, "dim": 8}}
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "width": 16, "depth": 1, "dropout": 0.1},
    "unet1d": {"type": "unet1d", "down_dims": [8, 16], "groups": 4, "time_dim": 8},
    "dit": {"type": "dit", "width": 16, "depth": 1, "heads": 2, "dropout": 0.1},
}
DIFFUSION = {"path": {"type": "vp_cosine"}, "prediction": "eps", "sampler": {"type": "ddim", "num_steps": 4}}
METHODS: dict[str, dict[str, Any]] = {
    "dppo": {"type": "dppo", "num_steps": 4, "tuned_steps": 2},
    "fpo": {"type": "fpo", "num_samples": 2, "num_steps": 2},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("net", "observes", "changes"),
    [
        ("mlp", ("x", "image"), {}),
        ("unet1d", ("image",), {}),
        ("unet1d", ("x",), DIFFUSION),
        ("dit", ("x",), {}),
        ("dit", ("x", "image"), DIFFUSION),
    ],
)
def test_one_iteration(tmp_path: Path, method: str, net: str, observes: tuple[str, ...], changes: dict[str, Any]) -> None:
    features = {name: Dot.observation_features[name] for name in observes}
    config = {
        "horizon": 8,
        "n_action_steps": 3,
        "net": NETS[net],
        "encoder": PIXELS if "image" in observes else {"type": "state"},
        "default_normalize": "identity",
        "sampler": {"type": "euler", "num_steps": 4},
        **changes,
    }
    normalizers = {name: Normalizer(2, "identity") for name in (*observes, "action") if name != "image"}
    torch.manual_seed(0)
    policy = Policy(parse(PolicyConfig, config), features, Dot.action_feature, normalizers)
    for parameter in policy.net.parameters():  # networks begin at zero, where nothing depends on the context
        torch.nn.init.normal_(parameter, std=0.1)
    policy.save(tmp_path / "base")
    settings = {
        "name": "pixels",
        "base": str(tmp_path / "base"),
        "task": {"name": "toys:Dot"},
        "method": METHODS[method],
        "iterations": 1,
        "env": {"num_envs": 4, "num_chunks": 4},
        "value": {"width": 16, "depth": 1},
        "ppo": {"epochs": 2, "minibatch_size": 8, "value_only_iterations": 0},
        "eval": {"episodes": 0},
    }
    assert Finetuner(parse(FinetuneConfig, settings), tmp_path / "run").run() == 0
    tuned = load_policy(tmp_path / "run")
    before, after = policy.state_dict(), tuned.state_dict()
    changed = {name.split(".")[0] for name in before if not after[name].equal(before[name])}
    assert changed == {"net"}
    if method == "dppo":
        frozen = {f"frozen_net.{name}": value for name, value in policy.net.state_dict().items()}
        assert all(after[name].equal(value) for name, value in frozen.items())
