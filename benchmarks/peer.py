"""lerobot's side of a comparison: a program for an interpreter that has lerobot 0.4.4, answering one JSON request per line.

Started by :class:`benchmarks.timing.Peer`; imports nothing of robopolicy, as robopolicy imports nothing of lerobot.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch import Tensor

# torchvision for CUDA beside torch for the CPU lacks two operators that lerobot imports and never calls.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # a torchvision that matches has them
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class TrainStep:
    """DiffusionPolicy as it is trained by `lerobot-train`: forward, backward, clip at 10, its own Adam; no average of weights."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

        state, environment = batch["observation.state"].shape[-1], batch["observation.environment_state"].shape[-1]
        config = DiffusionConfig(
            input_features={
                "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
                "observation.environment_state": PolicyFeature(FeatureType.ENV, (environment,)),
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (batch["action"].shape[-1],))},
            n_obs_steps=2,
            horizon=batch["action"].shape[1],
            n_action_steps=8,
            crop_shape=None,
            down_dims=(256, 512, 1024),
            diffusion_step_embed_dim=256,
            device="cpu",
            push_to_hub=False,
        )
        self.policy = DiffusionPolicy(config)
        self.batch = batch
        self.optimizer = config.get_optimizer_preset().build(self.policy.get_optim_params())
        self.clip = config.get_optimizer_preset().grad_clip_norm
        self.parameters = sum(p.numel() for p in self.policy.parameters())

    def step(self, bf16: bool) -> None:
        self.policy.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = self.policy.forward(self.batch)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Act:
    """DiffusionPolicy from observations to a chunk, without its queues and normalisers: the least that it does.

    Args:
        request: ``state`` and ``environment``: entries of the observations; ``action``; ``down_dims``, ``time_dim``;
            ``scheduler`` (``DDPM`` or ``DDIM``) and ``steps``.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

        state, environment = request["state"], request["environment"]
        config = DiffusionConfig(
            input_features={
                "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
                "observation.environment_state": PolicyFeature(FeatureType.ENV, (environment,)),
            },
            output_features={"action": PolicyFeature(FeatureType.ACTION, (request["action"],))},
            n_obs_steps=2,
            horizon=16,
            n_action_steps=8,
            crop_shape=None,
            down_dims=tuple(request["down_dims"]),
            diffusion_step_embed_dim=request["time_dim"],
            noise_scheduler_type=request["scheduler"],
            num_inference_steps=request["steps"],
            device="cpu",
            push_to_hub=False,
        )
        self.policy = DiffusionPolicy(config).eval()
        self.parameters = sum(p.numel() for p in self.policy.parameters())
        self.batch = {
            "observation.state": torch.randn(1, 2, state),
            "observation.environment_state": torch.randn(1, 2, environment),
        }

    @torch.no_grad()
    def call(self) -> None:
        self.policy.diffusion.generate_actions(self.batch)


def write_dataset(frames: dict[str, np.ndarray], root: str, fps: int) -> None:
    """The frames as a LeRobotDataset v3; images, if there are any, as PNG (lossless, as in our store)."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": frames["state"].shape[1:], "names": None},
        "action": {"dtype": "float32", "shape": frames["action"].shape[1:], "names": None},
    }
    if "image" in frames:
        names = ["height", "width", "channels"]
        features["observation.image"] = {"dtype": "image", "shape": frames["image"].shape[1:], "names": names}
    dataset = LeRobotDataset.create("local/benchmark", fps, features, root=root, use_videos=False)
    start = 0
    for end in frames["ends"].tolist():
        for i in range(start, end):
            frame = {"observation.state": frames["state"][i], "action": frames["action"][i], "task": "push"}
            if "image" in frames:
                frame["observation.image"] = frames["image"][i]
            dataset.add_frame(frame)
        dataset.save_episode()
        start = end
    dataset.finalize()


def open_dataset(root: str, fps: int, horizon: int) -> Any:
    """Two observations and ``horizon`` actions per item, the first action belonging to the older observation."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    two, rows = [-1 / fps, 0.0], [(i - 1) / fps for i in range(horizon)]
    deltas = {"observation.state": two, "action": rows}
    if (Path(root) / "meta/info.json").read_text().find("observation.image") >= 0:
        deltas["observation.image"] = two
    return LeRobotDataset("local/benchmark", root=root, delta_timestamps=deltas)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    trainer: TrainStep | None = None
    actors: dict[str, Act] = {}
    datasets: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request.get("threads", 1))
        times: list[tuple[float, float]] = []
        answer: dict[str, Any] = {"times": times}
        if request["verb"] == "versions":
            from importlib.metadata import version

            answer = {name: version(name) for name in ("lerobot", "torch", "diffusers", "datasets", "numpy")}
        elif request["verb"] == "train":
            if trainer is None:
                trainer = TrainStep({k: torch.from_numpy(v) for k, v in np.load(request["batch"]).items()})
            answer["parameters"] = trainer.parameters
            for _ in range(request["steps"]):
                start = time.perf_counter(), time.process_time()
                trainer.step(request["bf16"])
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        elif request["verb"] == "act":
            key = json.dumps({k: v for k, v in request.items() if k != "calls"}, sort_keys=True)
            if key not in actors:
                actors[key] = Act(request)
            answer["parameters"] = actors[key].parameters
            for _ in range(request["calls"]):
                start = time.perf_counter(), time.process_time()
                actors[key].call()
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        elif request["verb"] == "write":
            write_dataset(dict(np.load(request["frames"])), request["root"], request["fps"])
        elif request["verb"] == "load":
            root = request["root"]
            if root not in datasets:
                datasets[root] = open_dataset(root, request["fps"], request["horizon"])
            for indices in request["batches"]:
                start = time.perf_counter(), time.process_time()
                batch = torch.utils.data.default_collate([datasets[root][i] for i in indices])
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
                answer["shapes"] = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
