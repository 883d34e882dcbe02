"""The end of a run of distillation: calls, spread, and teacher against student on the same test seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from robopolicy.distill.config import DistillConfig
from robopolicy.distill.diagnose import Spread, spread
from robopolicy.distill.teacher import Teacher
from robopolicy.distill.trainer import Distiller, from_noise
from robopolicy.evaluate.paired import Comparison, compare, write_comparison
from robopolicy.evaluate.record import write_json
from robopolicy.evaluate.run import SEEDS, evaluate
from robopolicy.evaluate.stats import paired_score
from robopolicy.policy import Policy
from robopolicy.train.bc import to_tensors

MARGIN = 0.02  # of success: a student that is worse by less counts as good as its teacher


def measure_spread(distiller: Distiller, observations: int = 64, noises: int = 64) -> Spread:
    """The spread of the student at held-out observations, against the teacher's."""
    held_out, data = distiller.held_out, distiller.data
    rows = np.arange(min(observations, len(held_out)))
    batch = held_out.batch(rows, data.train if data.val is None else data.val, images=distiller.images)
    obs = to_tensors(batch["obs"], distiller.device)
    return compare_spread(distiller.teacher, distiller.averaged_policy, obs, noises)


@torch.no_grad()
def compare_spread(teacher: Teacher, student: Policy, obs: dict[str, torch.Tensor], noises: int = 64) -> Spread:
    """Student against teacher at observations ``name -> [N, n_obs_steps, *shape]``, from the same noises."""
    generator = torch.Generator().manual_seed(0)
    shape = (student.config.horizon, student.action_transform.dim)
    theirs, ours = [], []
    contexts = teacher.encode(obs), student.encode(obs)
    for number in range(len(contexts[0])):
        noise = torch.randn(noises, *shape, generator=generator).to(student.device)
        theirs.append(teacher.sample(contexts[0][number].expand(noises, -1), noise, generator))
        ours.append(from_noise(student, contexts[1][number].expand(noises, -1), noise, generator))
    found = spread(torch.stack(theirs), torch.stack(ours))
    return found._replace(same_noise=None) if teacher.draws else found


def final_test(distiller: Distiller, episodes: int) -> Comparison:
    """Teacher and student on the same test seeds; written to ``test/`` in the run folder."""
    task = distiller.experiment.task
    assert task is not None
    seeds = range(SEEDS["test"], SEEDS["test"] + episodes)
    config, evaluations = distiller.experiment.eval, []
    sampled = distiller.teacher.policy
    sampled.sampler = distiller.teacher.sampler  # as it was copied
    for name, policy in ((distiller.experiment.teacher, sampled), (str(distiller.out), distiller.averaged_policy)):
        done = evaluate(policy, task.spec, seeds, num_envs=config.num_envs, num_workers=config.num_workers, name=name)
        evaluations.append(done)
    comparison = compare(evaluations)
    for name, evaluation in zip(("teacher", "student"), evaluations, strict=True):
        evaluation.save(distiller.out / "test" / name / "eval.json")
    write_comparison(comparison, distiller.out / "test")
    return comparison


def non_inferiority(comparison: Comparison, margin: float = MARGIN) -> str:
    """Whether the student (the second policy) is worse than the teacher by less than ``margin``, in words.

    Decided by the score test at the margin, one-sided at half of ``alpha`` (:func:`robopolicy.evaluate.stats.paired_score`). The
    interval that is shown beside it is too short where the two hardly ever disagree. Both are approximate for few episodes:
    what the exact paired test cannot tell from equal is not called worse.
    """
    pair = comparison.pairs[0]
    only_a, only_b, p = pair.mcnemar
    score = float(paired_score(only_a, only_b, comparison.shared, -margin))
    needed = stats.norm.isf(comparison.alpha / 2)
    shown = f"student - teacher {pair.success.signed()} on {comparison.shared} paired seeds"
    if score > needed:
        return f"not worse by {margin:.0%}: {shown}, score test p = {stats.norm.sf(score):.2g}"
    if score < -needed and p <= comparison.alpha:
        return f"worse by more than {margin:.0%}: {shown}, score test p = {stats.norm.cdf(score):.2g}"
    return f"no verdict on a margin of {margin:.0%}: {shown}"


def calls(distiller: Distiller) -> dict[str, Any]:
    """Network calls: of a chunk of teacher and student, and those that the teacher made for the run so far."""
    policy = distiller.averaged_policy
    return {
        "teacher": distiller.teacher.nfe,
        "student": policy.nfe,
        "spent": distiller.teacher.calls,
    }


def write_result(distiller: Distiller, measured: Spread, test: Comparison | None) -> list[str]:
    """Write ``distill.json`` into the run folder; returns what to print."""
    counted = calls(distiller)
    result = {
        "schema_version": 1,
        "method": distiller.experiment.method,
        "step": distiller.step,
        "calls": counted,
        "spread": measured._asdict(),
        "test": None if test is None else {"verdict": non_inferiority(test), **test.pairs[0].success._asdict()},
    }
    write_json(distiller.out / "distill.json", result)
    lines = [
        f"calls: {counted['teacher']} a chunk by the teacher, {counted['student']} by the student, {counted['spent']:,} to teach",
        str(measured),
    ]
    return lines if test is None else [*lines, *_tested(test, distiller.experiment)]


def _tested(test: Comparison, asked: DistillConfig) -> Sequence[str]:
    noise = [] if asked.teacher_noise is None else [f"noise of scale {asked.teacher_noise:g}"]
    sampler = [] if asked.teacher_sampler is None else [f"sampler {asked.teacher_sampler}"]
    copied = [f"A, the teacher, ran as it was copied: {', '.join(noise + sampler)}"] if noise or sampler else []
    return [*copied, *test.lines(), non_inferiority(test)]
