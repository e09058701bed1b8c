"""Advantages, losses, corrections and KL against verl's, same inputs, to 1e-6.

verl works on padded rectangles [responses, tokens] with a mask; ours on packed tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from asystem.algorithms import advantages, choose, correction_weights, gae, policy_loss, token_weights, value_loss
from asystem.algorithms.advantages import ADVANTAGES, WHITEN_EPS
from asystem.algorithms.corrections import CORRECTIONS
from asystem.algorithms.penalties import kl_to_reference
from asystem.config import AlgorithmConfig, KLEstimator, Normalizer


def _import(module: str) -> Any:
    """A module of verl's; importing it sets up the root logger, which is left here as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        return pytest.importorskip(module, exc_type=ImportError)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


verl = _import("verl.trainer.ppo.core_algos")
rollout_corr = _import("verl.trainer.ppo.rollout_corr_helper")

LENGTHS = torch.tensor([3, 7, 1, 5, 4, 6])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
MASK = torch.arange(7) < LENGTHS[:, None]
SEQUENCE = torch.repeat_interleave(torch.arange(6), LENGTHS)


def _draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities now, before, and as sampled, [6, 7]."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(6, 7, generator=generator)
    return old + 0.3 * torch.randn(6, 7, generator=generator), old, old + 0.5 * torch.randn(6, 7, generator=generator)


def _rewards() -> Tensor:
    return torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("name", "theirs", "normalize_std"),
    [
        ("grpo", "compute_grpo_outcome_advantage", True),
        ("grpo", "compute_grpo_outcome_advantage", False),
        ("rloo", "compute_rloo_outcome_advantage", True),
        ("reinforce++", "compute_reinforce_plus_plus_outcome_advantage", True),
        ("reinforce++baseline", "compute_reinforce_plus_plus_baseline_outcome_advantage", True),
    ],
)
def test_advantages(name: str, theirs: str, normalize_std: bool) -> None:
    rewards = torch.zeros(6, 7).scatter_(1, LENGTHS[:, None] - 1, _rewards()[:, None])
    arguments: dict[str, Any] = {"token_level_rewards": rewards, "response_mask": MASK.float()}
    if name == "reinforce++":
        arguments["config"] = type("Config", (), {"gamma": 1.0})()
    else:
        arguments["index"] = GROUPS.numpy()
    if name == "grpo":
        arguments["norm_adv_by_std_in_grpo"] = normalize_std
    wanted, _ = getattr(verl, theirs)(**arguments)
    cfg = AlgorithmConfig(normalize_std=normalize_std)
    found = advantages(ADVANTAGES[name], _rewards(), GROUPS, LENGTHS, torch.ones(6, dtype=torch.bool), cfg)
    torch.testing.assert_close(found[SEQUENCE], wanted[MASK], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_their_gradients(surrogate: str, seed: int) -> None:
    new, old, _ = _draw(seed)
    given = torch.randn(6, generator=torch.Generator().manual_seed(seed + 100))
    cfg = AlgorithmConfig(surrogate=surrogate, correction="none", clip_low=0.2, clip_high=0.28, dual_clip=None)
    mode, normalizer = ("seq-mean-token-mean", Normalizer.response) if surrogate == "gspo" else (
        "token-mean", Normalizer.token)  # fmt: skip
    theirs = {"ppo": "vanilla", "gspo": "gspo", "cispo": "cispo"}[surrogate]
    if surrogate == "ppo":
        cfg.dual_clip = 3.0  # theirs always has one
    new_theirs = new.clone().requires_grad_()
    wanted, _ = verl.get_policy_loss_fn(theirs)(
        old, new_theirs, given[:, None].expand(6, 7), MASK.float(), loss_agg_mode=mode, config=_actor_config(cfg)
    )
    wanted.backward()
    weights = token_weights(normalizer, LENGTHS.tolist(), num_rollouts=6, num_tokens=int(LENGTHS.sum()))
    ours = new[MASK].clone().requires_grad_()
    found, _ = policy_loss(
        ours, infer_logprobs=old[MASK], advantages=given[SEQUENCE], token_weights=torch.tensor(weights)[SEQUENCE],
        rows=torch.arange(len(SEQUENCE)), sequence=SEQUENCE, algorithm=choose(cfg, "."),
        old_logprobs=old[MASK],
    )  # fmt: skip
    found.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert ours.grad is not None and new_theirs.grad is not None
    torch.testing.assert_close(ours.grad, new_theirs.grad[MASK], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0)])
def test_token_advantages_and_the_value_loss(gamma: float, gae_lambda: float) -> None:
    new, old, _ = _draw(3)
    rewards = torch.zeros(6, 7).scatter_(1, LENGTHS[:, None] - 1, _rewards()[:, None])
    whitened, returns = verl.compute_gae_advantage_return(rewards, old, MASK.float(), gamma, gae_lambda)
    cfg = AlgorithmConfig(gamma=gamma, gae_lambda=gae_lambda, value_clip=0.2, value_coefficient=1.0)
    found, found_returns = gae(old[MASK], _rewards()[SEQUENCE], SEQUENCE, cfg)
    torch.testing.assert_close(found_returns, returns[MASK], atol=1e-6, rtol=1e-6)
    found = (found - found.mean()) * (found.var() + WHITEN_EPS).rsqrt()
    torch.testing.assert_close(found, whitened[MASK], atol=1e-6, rtol=1e-6)

    wanted, clipped = verl.compute_value_loss(new, returns, old, MASK.float(), cliprange_value=0.2)
    loss, stats = value_loss(
        new[MASK], old_values=old[MASK], returns=found_returns, token_weights=torch.full((26,), 1 / 26),
        rows=torch.arange(26), cfg=cfg,
    )  # fmt: skip
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    assert stats.to_dict()["value/clip_fraction"] == pytest.approx(float(clipped)) != 0


def _actor_config(cfg: AlgorithmConfig) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=cfg.clip_low,
        clip_ratio_low=cfg.clip_low, clip_ratio_high=cfg.clip_high, clip_ratio_c=cfg.dual_clip or 3.0,
    )  # fmt: skip


@pytest.mark.parametrize(("correction", "threshold"), [("tis", 1.3), ("icepop", "0.7_1.5")])
def test_corrections(correction: str, threshold: Any) -> None:
    _, old, infer = _draw(7)
    wanted, _ = rollout_corr.compute_rollout_correction_weights(old - infer, MASK.float(), "token", threshold)
    cfg = AlgorithmConfig(correction=correction, tis_cap=1.3, icepop_alpha=0.7, icepop_beta=1.5)
    found = correction_weights(CORRECTIONS[correction], old[MASK], infer[MASK], SEQUENCE, cfg)
    torch.testing.assert_close(found, wanted[MASK], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_kl(ours: str, theirs: str) -> None:
    new, old, _ = _draw(3)
    torch.testing.assert_close(
        kl_to_reference(new, old, KLEstimator[ours]), verl.kl_penalty_forward(new, old, theirs), atol=1e-6, rtol=1e-6
    )
