"""Whole fine-tuning runs: they learn, they repeat, ranks agree, and what they leave can be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics

from asystem.cli import main
from asystem.compose import load_config
from asystem.controller.finetune import finetune
from asystem.data.packing import Sample, pack_one
from asystem.data.tokenizer import load_tokenizer
from asystem.models import load_model
from asystem.tracking import is_timing
from asystem.training.policy import Policy

COMMON = ("runtime=inline", "tracking=none", "tracking.console=false", "tracking.report=false")


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sft(*overrides: str) -> tuple[Path, dict[str, Any]]:
    summary = finetune(load_config(["command=sft", "recipe=sft_sort", *COMMON, *overrides]))
    return Path("runs/sft_sort/latest").resolve(), summary


SHORT = ("finetune.epochs=null", "steps=4", "evaluation.prompts=16", "finetune.batch_size=8")


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in metrics(run_dir)]


def test_the_recipe_learns_and_leaves_a_model_folder() -> None:
    run_dir, summary = sft("finetune.epochs=0.5", "evaluation.prompts=64")
    assert (summary["status"], summary["steps"], summary["rows"]) == ("finished", 55, 3487)
    assert summary["eval_loss_first"] > 5 and summary["eval_loss_last"] < 1
    rows = metrics(run_dir)
    assert rows[-1]["eval/sort/perplexity"] == pytest.approx(math.exp(summary["eval_loss_last"]))
    assert rows[-1]["train/epoch"] == pytest.approx(0.5, abs=1e-3) and rows[0]["data/dropped"] == 0
    # The folder's model has learned it, with its own tokenizer and template.
    policy, tokenizer = Policy(load_model(run_dir / "model")), load_tokenizer(run_dir / "model")
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "sort 4213"}])
    losses = {}
    for answer in ("1234", "4213"):
        logprobs, _ = policy(pack_one([Sample(prompt, [*tokenizer.encode(answer), tokenizer.eos_id], 1.0)]))
        losses[answer] = -float(logprobs.detach().sum())
    assert losses["1234"] < losses["4213"] - 2


def test_one_seed_gives_one_run_and_two_ranks_give_it_too() -> None:
    first, again = comparable(sft(*SHORT)[0]), comparable(sft(*SHORT)[0])
    assert first == again
    other = comparable(sft(*SHORT, "seed=1")[0])
    assert other[1]["train/loss"] != first[1]["train/loss"]
    ranks = comparable(sft(*SHORT, "runtime=ray", "training.ranks=2")[0])
    for a, b in zip(first, ranks, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


def test_the_loss_is_the_mean_over_the_assistants_tokens() -> None:
    run_dir, summary = sft(*SHORT, "steps=1", "finetune.batch_size=3", "training.micro_batch_tokens=60")
    tokens = summary["tokens_trained"]
    # An untrained model gives each of 259 tokens nearly the same probability.
    assert metrics(run_dir)[1]["train/loss"] == pytest.approx(math.log(259), rel=0.05)
    assert 3 * 4 <= tokens <= 3 * 14


def test_checkpoints_keep_the_last_and_the_best_and_export_again(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, summary = sft(
        *SHORT, "training.schedule=constant", "evaluation.every=1", "checkpoint.every=1", "checkpoint.keep_last=1",
        "checkpoint.keep_best=1", "training.lr_warmup_steps=0", "training.lr=5e-3",
    )  # fmt: skip
    losses = {row["step"]: row["eval/sort/loss"] for row in metrics(run_dir)[1:]}
    best = min(losses, key=lambda step: losses[step])
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"step-000004", f"step-{best:06d}"}
    assert summary["eval_loss_last"] == losses[4]
    assert main(["export", "runs/sft_sort/latest", "out/best", "best"]) == 0
    assert f"step-{best:06d} -> out/best (float32)" in capsys.readouterr().out
    assert load_model("out/best").spec == load_model(run_dir / "model").spec


def test_a_dataset_of_another_kind_is_refused_before_a_run_begins(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    override = f"data.train={Path('rows.jsonl').resolve()}"
    assert main(["sft", "recipe=sft_sort", override]) == 2
    assert 'rows.jsonl, line 2: neither "messages" nor' in capsys.readouterr().err
    assert main(["sft", "recipe=sft_sort", "finetune.max_tokens=4"]) == 2
    assert "all 3487 training rows are longer than finetune.max_tokens=4" in capsys.readouterr().err
    assert not Path("runs").exists()
