"""Films of episodes, made after the fact: the actions of an evaluated episode are replayed with rendering.

An episode is a function of its seed and its actions, so the film shows exactly the episode that was counted; the replay is
checked to give the same outcome. Evaluation itself never pays for rendering.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from robopolicy.errors import TaskError
from robopolicy.evaluate.record import Film, Rollout
from robopolicy.task import Task, TaskSpec

MAX_FRAMES = 240  # of a film, which keeps its pace: drawn by software, a thousand steps take minutes


def film_rollouts(spec: TaskSpec, rollouts: Sequence[Rollout], successes: int, failures: int) -> list[Film]:
    """Film the first ``successes`` successful and ``failures`` failed episodes in the order of seeds, or as many as there are.

    Without a renderer, the task's message on stderr says what to install and the list is empty. Raises TaskError when a
    replay does not reproduce its episode.
    """
    ordered = sorted(rollouts, key=lambda r: r.episode.seed)
    chosen = [r for r in ordered if r.episode.success][:successes] + [r for r in ordered if not r.episode.success][:failures]
    if not chosen:
        return []
    task = spec.make()
    try:
        task.reset(seed=chosen[0].episode.seed)
        try:
            _frame(task)
        except (TaskError, NotImplementedError) as error:  # the second: a task that never renders
            print(f"going on without films: {str(error) or f'{spec.name} does not render'}", file=sys.stderr)
            return []
        films = []
        for done in tqdm(chosen, desc="film", unit="episode", disable=None):
            stride = math.ceil(done.episode.length / MAX_FRAMES)
            films.append(Film(done.episode, encode_mp4(replay(task, done, stride), task.rate / stride)))
        return films
    finally:
        task.close()


def replay(task: Task, rollout: Rollout, stride: int = 1) -> list[np.ndarray]:
    """Frames ``[uint8 HWC]`` of the episode, the first before any action and then one for every ``stride`` steps.

    Raises TaskError when the outcome is another one.
    """
    expected = rollout.episode
    task.reset(seed=expected.seed)
    frames = [_frame(task)]
    rewards: list[float] = []
    success = False
    for step, action in enumerate(rollout.actions, 1):
        _, reward, _, _, info = task.step(np.asarray(action, task.action_feature.dtype))
        rewards.append(float(reward))
        success |= bool(info["is_success"])
        if step % stride == 0 or step == len(rollout.actions):
            frames.append(_frame(task))
    if success != expected.success or abs(max(rewards) - expected.max_reward) > 1e-6:
        raise TaskError(
            f"replaying seed {expected.seed} gave success={success}, max reward {max(rewards):.4f} instead of "
            f"success={expected.success}, {expected.max_reward:.4f}: the task is not a function of its seed and actions"
        )
    return frames


def _frame(task: Task) -> np.ndarray:
    return np.array(task.render(), dtype=np.uint8)


def encode_mp4(frames: Sequence[np.ndarray], rate: float) -> bytes:
    """H.264 in MP4 that browsers play, from ``uint8 [H, W, 3]`` frames at ``rate`` Hz. Odd sizes are padded by an edge pixel."""
    import av

    height, width = frames[0].shape[:2]
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        stream.options = {"crf": "23", "preset": "veryfast"}
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.pad(frame, pad, mode="edge")), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_animation(
    path: Path, frames: Iterable[np.ndarray], rate: float, kind: Literal["webp", "gif"] = "webp", width: int = 320
) -> None:
    """An endless animation for a README, scaled to ``width`` pixels; WebP is several times smaller than GIF."""
    from PIL import Image

    pictures = [Image.fromarray(f) for f in frames]
    size = (width, round(width * pictures[0].height / pictures[0].width))
    first, *rest = [p.resize(size, Image.Resampling.LANCZOS) for p in pictures]
    options = {"quality": 75, "method": 4} if kind == "webp" else {"optimize": True}
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, format=kind.upper(), save_all=True, append_images=rest, duration=round(1000 / rate), loop=0, **options)
