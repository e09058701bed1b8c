"""Whole runs in one process: they learn, they repeat exactly, and they keep their bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run, metrics

from asystem.compose import read_config
from asystem.controller.replay import replay
from asystem.errors import RewardError
from asystem.tracking import is_timing


def test_a_model_learns(run: Run) -> None:
    run_dir, summary = run("steps=50", "training.warmup.steps=100", "rollout.token_budget=192", "rollout.capacity=128")
    assert summary["status"] == "finished"
    assert summary["eval_first"] < 0.75
    assert summary["eval_last"] > summary["eval_first"] + 0.2
    rewards = [row["reward/mean"] for row in metrics(run_dir)[1:]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_two_runs_with_one_seed_have_equal_metrics(run: Run) -> None:
    first, second = (metrics(run("rollout.max_staleness=2", "rollout.retention=2")[0]) for _ in range(2))
    assert len(first) == 5
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if not is_timing(k)} == {k: v for k, v in b.items() if not is_timing(k)}
    other = metrics(run("rollout.max_staleness=2", "rollout.retention=2", "seed=1")[0])
    assert other[-1]["train/grad_norm"] != first[-1]["train/grad_norm"]


@pytest.mark.parametrize(("eta", "sigma"), [(0, 0), (0, 1), (1, 1), (3, 2)])
def test_staleness_keeps_its_bound(run: Run, eta: int, sigma: int) -> None:
    run_dir, _ = run("steps=8", f"rollout.max_staleness={eta}", f"rollout.retention={sigma}", "training.warmup.steps=2")
    rows = metrics(run_dir)[1:]
    assert max(row["rollout/staleness_max"] for row in rows) <= eta + sigma
    assert all(row["version"] == row["step"] for row in rows)


def test_dynamic_sampling_waits_for_groups_with_signal_and_repeats(run: Run) -> None:
    """Asynchronous, with a curriculum: what is asked depends on rewards, and a replay asks the same."""
    dynamic = (
        "algorithm=dapo",
        "algorithm.dynamic_sampling=7",
        "algorithm.dynamic_windows=3",
        "data.curriculum=pass_rate",
    )
    bounds = ("rollout.max_staleness=2", "rollout.retention=2", "training.warmup.steps=60", "steps=8")
    run_dir, _ = run(*dynamic, *bounds, "data.curriculum_visits=1")
    rows = metrics(run_dir)[1:]
    for row in rows:
        signal = round(row["reward/groups_with_signal"] * row["rollout/groups"])
        assert signal >= 7 or row["rollout/windows"] == 3
        assert row["rollout/staleness_max"] <= 4
    assert {row["rollout/windows"] for row in rows} > {1}
    assert replay(read_config(run_dir / "config.yaml"), run_dir)[1:] == (9, [])


def test_kv_of_carried_rollouts_is_kept_or_recomputed(run: Run) -> None:
    """The same schedule either way; log-probabilities part once a carried rollout goes on under new weights."""
    overrides = ("rollout=c3po", "rollout.token_budget=300", "generation.max_running=24")
    keep, recompute = (metrics(run(*overrides, f"generation.kv_on_update={kv}")[0])[1:] for kv in ("keep", "recompute"))
    assert any(row["rollout/carried"] > 0 for row in keep)
    for row in (*keep, *recompute):
        assert 0 < row["mismatch/logprob_diff_mean"] <= row["mismatch/logprob_diff_max"]
    name = "mismatch/logprob_diff_mean"
    assert abs(keep[0][name] - recompute[0][name]) < 1e-6
    assert any(abs(a[name] - b[name]) > 1e-6 for a, b in zip(keep, recompute, strict=True))


def test_the_synchronous_baseline_is_on_policy(run: Run) -> None:
    run_dir, _ = run("rollout=sync", "rollout.capacity=64", "training.warmup.steps=2")
    for row in metrics(run_dir)[1:]:
        assert row["rollout/staleness_max"] == row["rollout/carried"] == 0
        assert row["rollout/groups"] == 8
        assert row["mismatch/logprob_diff_max"] < 1e-4  # the same weights through both runtimes


def test_hybrid_placement_gives_the_metrics_of_split_in_lockstep(run: Run) -> None:
    overrides = ("rollout=sync", "rollout.capacity=64", "training.warmup.steps=2")
    split, hybrid = metrics(run(*overrides)[0]), metrics(run(*overrides, "placement=hybrid")[0])
    for a, b in zip(split, hybrid, strict=True):
        assert {k: v for k, v in a.items() if not is_timing(k)} == {k: v for k, v in b.items() if not is_timing(k)}


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_hybrid_rank_alternates_in_lockstep_and_interleaves_ahead_of_it(run: Run, ahead: int) -> None:
    overrides = ("rollout=sync", "rollout.capacity=64", "training.warmup.steps=1", "steps=3")
    placement = "placement=hybrid" if ahead else "placement=auto"  # which without overlap is hybrid
    run_dir, _ = run(
        *overrides, placement, f"rollout.max_staleness={ahead}", "tracking.timeline=true", "weights.probe_every=0"
    )
    events = json.loads((run_dir / "timeline.json").read_text())["traceEvents"]
    hybrid = next(e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == "hybrid")
    calls = [e for e in events if e["ph"] == "X" and e["pid"] == hybrid]
    order = [e["name"] for e in sorted(calls, key=lambda e: e["ts"])]
    updates = [index for index, name in enumerate(order) if name == "update"]
    between = [order[index + 1 : order.index("load_weights", index)] for index in updates]
    assert len(updates) == 3
    # Ahead, a slice of the next batch waits for the update to end and runs before its weights are announced.
    assert any("decode" in calls for calls in between) is (ahead == 1)


def test_phases_that_sleep_change_nothing(run: Run) -> None:
    """Unfinished rollouts keep their KV over the updates, which come between their tokens."""
    adapted = ("training.lora.rank=4", "algorithm.kl_coefficient=0.1", "training.warmup.steps=2")
    overrides = ("placement=hybrid", "weights.probe_every=2", "rollout.token_budget=64", "steps=3", *adapted)
    awake, asleep = (metrics(run(*overrides, f"placement.sleep={sleep}")[0]) for sleep in ("never", "always"))
    for a, b in zip(awake, asleep, strict=True):
        kept = {k: v for k, v in b.items() if not is_timing(k)}
        assert {k: v for k, v in a.items() if not is_timing(k)} == kept
    assert any(row["rollout/carried"] > 0 for row in asleep[1:]), "else there was no KV to keep"
    assert asleep[-1]["memory/moved_gib"] > 0


def test_several_updates_a_batch_clip_against_the_first_weights(run: Run) -> None:
    run_dir, _ = run("training.minibatches=2", "steps=3", "checkpoint.at_end=false")
    rows = metrics(run_dir)[1:]
    assert not (run_dir / "checkpoints").exists()
    assert any(row["train/clip_fraction"] > 0 for row in rows)


def test_a_value_head_trains_beside_the_policy(run: Run) -> None:
    ppo = ("algorithm=ppo", "rollout=sync", "rollout.capacity=64", "training.minibatches=2", "training.lr=3e-3")
    rows = metrics(run(*ppo, "algorithm.value_coefficient=1", "steps=6")[0])[1:]
    assert rows[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6), "all values are 0 at first"
    assert max(row["value/explained_variance"] for row in rows) > 0.1
    for row in rows:
        assert 0 < row["value/return_mean"] < 1, "with gamma and lambda 1 a token's return is its rollout's reward"
        assert 0 < row["value/loss"] < 0.5


def test_a_run_folder_holds_what_the_design_names(run: Run) -> None:
    run_dir, summary = run("steps=3", "evaluation.every=2", "checkpoint.every=1", "checkpoint.keep_last=2")
    assert [row["step"] for row in metrics(run_dir)] == [0, 1, 2, 3]
    assert json.loads((run_dir / "summary.json").read_text())["tokens_trained"] == summary["tokens_trained"] > 0
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert (run_dir / "report.html").stat().st_size > 1000
    assert json.loads((run_dir / "timeline.json").read_text())["traceEvents"]
    rollouts = [
        json.loads(line) for line in (run_dir / "rollouts" / "step-000001-rank0.jsonl").read_text().splitlines()
    ]
    for rollout in rollouts:
        assert len(rollout["tokens"]) == len(rollout["infer_logprobs"]) == len(rollout["train_logprobs"])
        assert len(rollout["versions"]) == len(rollout["mask"]) == len(rollout["tokens"])
        assert rollout["prompt_text"].endswith("=")
    assert (run_dir / "config.yaml").is_file()


def test_a_reward_that_raises_is_masked_and_counted(recipe: Path, run: Run) -> None:
    task = recipe / "task.py"
    broken = '    if row["prompt"].startswith("3"):\n        raise ValueError("no threes")\n    return float'
    task.write_text(task.read_text().replace("    return float", broken))
    run_dir, summary = run("reward.max_error_share=0.9", "training.warmup.steps=2")
    assert summary["status"] == "finished"
    assert sum(row["reward/errors"] for row in metrics(run_dir)[1:]) > 0
    with pytest.raises(RewardError, match=r"rewards failed at step \d+.*ValueError: no threes"):
        run("reward.max_error_share=0.0", "training.warmup.steps=2")
    latest = json.loads((recipe.parent.parent / "runs" / "larger" / "latest" / "summary.json").read_text())
    assert latest["status"] == "failed"


def test_experts_of_older_weights_are_replayed(run: Run) -> None:
    asynchronous = ("rollout=c3po", "rollout.token_budget=300", "rollout.max_staleness=1", "training.lr=1e-3")
    experts = ("model=tiny_moe", "generation.return_routing=true", "training.balance_coefficient=0.01")
    replayed, own = (
        metrics(run(*asynchronous, *experts, f"algorithm.routing_replay={on}")[0])[1:] for on in ("true", "false")
    )
    assert 0 < max(row["routing/replaced_fraction"] for row in replayed) < 0.5
    assert not any("routing/replaced_fraction" in row for row in own)
    for row in (*replayed, *own):
        assert row["train/expert_load_max"] > 1 and row["train/balance_loss"] > 0.9
        assert row["train/mfu"] > 0 and row["train/tokens_per_second"] > 0
