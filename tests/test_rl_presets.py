"""Presets: every one is a valid configuration, says where it comes from, and holds the figures of its table."""

from __future__ import annotations

from typing import Any

import pytest

from robopolicy.config import component, parse
from robopolicy.errors import ConfigError
from robopolicy.rl.config import PRESETS, FinetuneConfig, merge, preset, presets
from robopolicy.rl.heads.registry import HEADS

ALL = [(method, name) for method in HEADS for name in presets(method)]

PAPERS = {
    "dppo": "lift can square transport pixels gym kitchen furniture avoid scratch",
    "fpo": "playground gridworld plusplus_locomotion can square box tray threading",
    "reinflow": "gym kitchen transport can_pixels square_pixels",
    "policyflow": "",
    "gaussian": "",
}

# What the tables of the papers' code say, in the units of our configuration.
FIGURES: list[tuple[str, str, dict[str, Any]]] = [
    ("dppo", "paper_lift", {"method.num_steps": 20, "method.tuned_steps": 10, "method.clip": 0.01, "method.clip_base": 0.001}),
    ("dppo", "paper_lift", {"env.num_envs": 50, "env.num_chunks": 300, "iterations": 81, "env.reward.gamma": 0.999}),
    ("dppo", "paper_lift", {"ppo.minibatch_size": 7500 // 10, "ppo.epochs": 10, "ppo.lr": 1e-4, "ppo.value_lr": 1e-3}),
    ("dppo", "paper", {"iterations": 81, "ppo.minibatch_size": 750}),
    ("dppo", "paper_transport", {"ppo.epochs": 5, "ppo.minibatch_size": 1000, "env.num_chunks": 400, "iterations": 201}),
    ("dppo", "paper_gym", {"env.num_envs": 40, "env.num_chunks": 500, "ppo.minibatch_size": 5000, "env.reward.gamma": 0.99}),
    ("dppo", "paper_gym", {"method.clip": 0.01, "method.clip_base": None, "env.reward.source": "task"}),
    ("dppo", "paper_kitchen", {"env.num_chunks": 70, "ppo.minibatch_size": 560, "ppo.epochs": 10, "iterations": 301}),
    ("dppo", "paper_furniture", {"env.num_envs": 1000, "env.num_chunks": 88, "ppo.lr": 1e-5, "method.gamma_denoising": 0.9}),
    ("dppo", "paper_furniture", {"method.min_std": 0.04, "method.min_logprob_std": 0.1, "ppo.minibatch_size": 17600 // 5}),
    ("dppo", "paper_avoid", {"method.clip": 0.1, "method.clip_rate": 1.0, "method.gamma_denoising": 0.95, "ppo.lr": 1e-5}),
    (
        "dppo",
        "paper_pixels",
        {"method.num_steps": 5, "method.eval_eta": 0.0, "ppo.minibatch_size": 500 * 15 // 5, "ppo.lr": 5e-5},
    ),
    ("dppo", "paper_scratch", {"method.tuned_steps": 10, "method.gamma_denoising": 1.0, "env.num_envs": 10, "method.clip": 0.1}),
    ("fpo", "paper_playground", {"method.clip": 0.05, "method.target": "eps", "ppo.epochs": 16, "env.reward.gamma": 0.995}),
    ("fpo", "paper_playground", {"ppo.minibatch_size": 2048 * 30 // 32, "env.num_envs": 2048, "method.num_samples": 8}),
    ("fpo", "paper_gridworld", {"method.num_samples": 50, "method.clip": 0.2, "method.log_ratio_clamp": 3.0, "ppo.epochs": 10}),
    ("fpo", "paper_plusplus_locomotion", {"ppo.surrogate": "aspo", "method.num_samples": 16, "method.per_sample": True}),
    ("fpo", "paper_plusplus_locomotion", {"method.num_steps": 64, "method.loss_clamp": 20.0, "method.log_ratio_clamp": 10.0}),
    ("fpo", "paper_can", {"method.clip": 0.02, "method.huber_delta": 0.5, "env.reward.gamma": 0.99, "ppo.max_grad_norm": 5.0}),
    ("fpo", "paper_can", {"ppo.surrogate": "ppo", "method.reduce": "sum_steps", "ppo.minibatch_size": 30 * 1600 // 16 // 8}),
    ("fpo", "paper_square", {"method.clip": 0.01, "method.loss_clamp": None, "method.log_ratio_clamp": None}),
    ("fpo", "paper_box", {"method.clip": 0.03, "method.huber_delta": 0.1, "env.reward.gamma": 0.995, "ppo.max_grad_norm": 5.0}),
    ("fpo", "paper_tray", {"method.clip": 0.03, "method.huber_delta": 1.0, "env.reward.gamma": 0.999, "ppo.max_grad_norm": 1.0}),
    ("fpo", "paper_threading", {"method.clip": 0.01, "method.huber_delta": 0.1, "ppo.lr": 1e-5, "ppo.gae_lambda": 0.99}),
    ("reinflow", "paper", {"method.min_std": 0.1, "method.max_std": 0.24, "method.num_steps": 4, "ppo.entropy_weight": 0.03}),
    ("reinflow", "paper_gym", {"ppo.lr": 4.5e-5, "ppo.value_lr": 6.5e-4, "ppo.value_weight_decay": 1e-5, "method.clip": 0.01}),
    ("reinflow", "paper_kitchen", {"method.min_std": 0.05, "method.max_std": 0.12, "env.num_chunks": 200, "ppo.epochs": 10}),
    ("reinflow", "paper_transport", {"ppo.target_kl": 0.01, "ppo.entropy_weight": 0.01, "env.reward.gamma": 0.999}),
    ("reinflow", "paper_can_pixels", {"method.num_steps": 1, "ppo.lr": 2e-5, "ppo.minibatch_size": 500}),
    ("reinflow", "paper_square_pixels", {"ppo.lr": 3.5e-6, "ppo.value_lr": 4.5e-4, "env.num_chunks": 400}),
    ("policyflow", "paper", {"method.std": 1.0, "method.reg": 0.01, "ppo.desired_kl": 0.01, "ppo.entropy_weight": 0.01}),
    ("policyflow", "paper", {"method.clip": 0.2, "ppo.epochs": 5, "ppo.lr": 1e-4, "ppo.weight_decay": 1e-5}),
    (
        "gaussian",
        "paper",
        {"method.clip": 0.2, "ppo.gae_lambda": 0.95, "env.reward.gamma": 0.99, "ppo.epochs": 10, "ppo.lr": 3e-4},
    ),
]


def parsed(method: str, name: str) -> FinetuneConfig:
    given = {"name": "x", "base": "b", "task": {"name": "t"}, "method": {"type": method}}
    return parse(FinetuneConfig, merge(preset(method, name), given))


@pytest.mark.parametrize(("method", "name"), ALL)
def test_every_preset_is_valid_and_says_where_it_comes_from(method: str, name: str) -> None:
    entry = presets(method)[name]
    assert len(entry["source"]) > 10
    assert entry.get("like", name) in presets(method)
    config = parsed(method, name)
    component("method", config.method, HEADS)
    assert set(entry.get("method", {})) <= set(config.method)
    chunks = config.env.num_envs * config.env.num_chunks
    assert config.ppo.minibatch_size <= chunks or (method, name) in {("reinflow", "paper"), ("reinflow", "paper_gym")}


def test_every_method_has_a_quick_and_the_published_presets() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(HEADS)
    for method, tables in PAPERS.items():
        assert set(presets(method)) == {"cpu", "cpu_reach", "paper", *(f"paper_{table}" for table in tables.split())}


@pytest.mark.parametrize(("method", "name", "figures"), FIGURES)
def test_presets_hold_the_figures_of_their_tables(method: str, name: str, figures: dict[str, Any]) -> None:
    config = parsed(method, name).model_dump()
    for key, expected in figures.items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        assert value == pytest.approx(expected), key


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"method 'fpo' has no preset 'paper_cann'; did you mean 'paper_can'\?"):
        preset("fpo", "paper_cann")
