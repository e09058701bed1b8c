"""Whole fine-tuning runs: they learn, they repeat, ranks agree, and what they leave can be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics
from local_ranks import LocalRuntime

from asystem.cli import main
from asystem.compose import load_config
from asystem.config import LoraConfig
from asystem.controller.finetune import finetune
from asystem.data.packing import Sample, pack_one
from asystem.data.tokenizer import load_tokenizer
from asystem.models import add_lora, load_adapter, load_model, merge
from asystem.tracking import is_timing
from asystem.training.policy import Policy

COMMON = ("runtime=inline", "tracking=none", "tracking.console=false", "tracking.report=false")


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sft(*overrides: str) -> tuple[Path, dict[str, Any]]:
    summary = finetune(load_config(["command=sft", "recipe=sft_sort", *COMMON, *overrides]))
    return Path("runs/sft_sort/latest").resolve(), summary


def dpo(*overrides: str) -> tuple[Path, dict[str, Any]]:
    summary = finetune(load_config(["command=dpo", "recipe=dpo_sort", *COMMON, *overrides]))
    return Path("runs/dpo_sort/latest").resolve(), summary


SHORT = ("steps=4", "finetune.epochs=null", "finetune.batch_size=8", "data.task=null", "finetune.held_out=16")


@pytest.fixture
def short() -> tuple[str, ...]:
    """Four steps on a file of 48 rows, which may be learned from as they are or as preferences."""
    rows = []
    for digits in range(100, 148):
        prompt, answer = [{"role": "user", "content": f"sort {digits}"}], "".join(sorted(str(digits)))
        rows.append({"prompt": prompt, "response": answer, "chosen": answer, "rejected": answer[::-1] + "!"})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (*SHORT, f"data.train={Path('rows.jsonl').resolve()}")


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in metrics(run_dir)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A third of the recipe."""
    run_dir = tmp_path_factory.mktemp("learned") / "run"
    return run_dir, sft("finetune.epochs=0.35", "evaluation.prompts=64", f"run_dir={run_dir}")[1]


def test_the_recipe_learns_and_leaves_a_model_folder(learned: tuple[Path, dict[str, Any]]) -> None:
    run_dir, summary = learned
    assert (summary["status"], summary["steps"], summary["rows"]) == ("finished", 71, 3203)
    assert summary["eval_loss_first"] > 5 and summary["eval_loss_last"] < 1
    rows = metrics(run_dir)
    assert rows[-1]["eval/sort/perplexity"] == pytest.approx(math.exp(summary["eval_loss_last"]))
    assert rows[-1]["train/epoch"] == pytest.approx(0.35, abs=1e-3) and rows[0]["data/dropped"] == 0
    # The folder's model has learned it, with its own tokenizer and template.
    policy, tokenizer = Policy(load_model(run_dir / "model")), load_tokenizer(run_dir / "model")
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "sort 4213"}])
    losses = {}
    for answer in ("1234", "4213"):  # sorted, and not
        logprobs, _ = policy(pack_one([Sample(prompt, [*tokenizer.encode(answer), tokenizer.eos_id], 1.0)]))
        losses[answer] = -float(logprobs.detach().sum())
    assert losses["1234"] < losses["4213"] - 2


def test_one_seed_gives_one_run(short: tuple[str, ...]) -> None:
    first, again = comparable(sft(*short)[0]), comparable(sft(*short)[0])
    assert first == again
    other = comparable(sft(*short, "seed=1", "steps=1")[0])
    assert other[1]["train/loss"] != first[1]["train/loss"]


@pytest.mark.parametrize("program", [sft, dpo])
def test_two_ranks_give_the_run_of_one(
    program: Callable[..., tuple[Path, dict[str, Any]]], short: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*short, "model.path=null", "evaluation.every=2")
    one = comparable(program(*options)[0])
    monkeypatch.setattr("asystem.controller.finetune.make_runtime", LocalRuntime)
    two = comparable(program(*options, "runtime=ray", "training.ranks=2")[0])
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), name


def test_preferences_are_learned_against_the_weights_it_started_from(learned: tuple[Path, dict[str, Any]]) -> None:
    start = ("finetune.epochs=null", "steps=12", "finetune.batch_size=12", "evaluation.prompts=32", "training.lr=1e-4")
    run_dir, summary = dpo(*start, f"model.path={learned[0] / 'model'}")
    rows = metrics(run_dir)
    assert rows[0]["eval/sort/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[0]["eval/sort/accuracy"] == 0.5 and rows[1]["dpo/accuracy"] == 0.5
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert summary["eval_last"] > 0.9 and summary["eval_loss_last"] < 0.5
    gained = rows[-1]["eval/sort/chosen_logprob"] - rows[-1]["eval/sort/rejected_logprob"]
    before = rows[0]["eval/sort/chosen_logprob"] - rows[0]["eval/sort/rejected_logprob"]
    assert rows[-1]["eval/sort/margin"] == pytest.approx(gained - before, rel=1e-3)  # β = 1


def test_adapters_learn_preferences_and_are_exported_merged(
    learned: tuple[Path, dict[str, Any]], short: tuple[str, ...]
) -> None:
    base = learned[0] / "model"
    run_dir, summary = dpo(*short, f"model.path={base}", "training=lora", "training.lr=3e-3")
    assert summary["eval_last"] > 0.9 > 0.5 == metrics(run_dir)[0]["eval/sort/accuracy"]
    before, after = load_model(base).state_dict(), load_model(run_dir / "model").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "_proj" in name
    }
    adapted = load_model(base)
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    add_lora(adapted, LoraConfig(rank=config["r"], alpha=config["lora_alpha"]))
    load_adapter(adapted, run_dir / "adapter")
    for name, value in merge(adapted).items():
        assert torch.equal(value, after[name]), name


def test_the_loss_is_the_mean_over_the_assistants_tokens(short: tuple[str, ...]) -> None:
    run_dir, summary = sft(*short, "steps=1", "finetune.batch_size=3", "training.micro_batch_tokens=60")
    # An untrained model gives each of 259 tokens nearly the same probability.
    assert metrics(run_dir)[1]["train/loss"] == pytest.approx(math.log(259), rel=0.05)
    assert summary["tokens_trained"] == 3 * 4  # three digits and the end token


def test_checkpoints_keep_the_last_and_the_best_and_export_again(
    short: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, summary = sft(
        *short, "training.schedule=constant", "evaluation.every=1", "checkpoint.every=1", "checkpoint.keep_last=1",
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
    rows.pop()
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["sft", "recipe=sft_sort", override, "data.task=null", "finetune.max_tokens=2"]) == 2
    assert "all 1 training rows are longer than finetune.max_tokens=2" in capsys.readouterr().err
    assert not Path("runs").exists()
