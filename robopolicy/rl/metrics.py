"""``RunMetrics``: what a fine-tuning run logs, against iterations and, as results are compared, against environment steps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from robopolicy.train.metrics import Metrics

SUCCESS = ["eval/success", "eval/success_low", "eval/success_high"]
BY_ENV_STEPS = (*SUCCESS, "eval/max_reward", "eval/total_reward", "train/success", "train/max_reward", "train/total_reward")


class RunMetrics(Metrics):
    """As :class:`Metrics`; besides, TensorBoard gets success and rewards against environment steps, as a run named ``env_steps``,
    with success and its interval in one chart on the tab of custom scalars."""

    def __init__(self, out: Path, iteration: int, env_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(out, iteration)
        self.by_env_steps = SummaryWriter(str(out / "tensorboard" / "env_steps"), purge_step=env_steps + 1)
        self.by_env_steps.add_custom_scalars({"against environment steps": {"success": ["Margin", SUCCESS]}})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log ``values``, which hold ``train/env_steps``; a full disk costs the row and a warning."""
        super().write(step, values)
        try:
            for name in BY_ENV_STEPS:
                if name in values:
                    self.by_env_steps.add_scalar(name, values[name], int(values["train/env_steps"]))
        except OSError as error:
            tqdm.write(f"warning: metrics of iteration {step} could not be written ({error})", file=sys.stderr)

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self.by_env_steps.close()
