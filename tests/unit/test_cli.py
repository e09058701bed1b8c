"""The command line: one line for every error, and the right exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asystem import cli
from asystem.cli import main
from asystem.compose import recipe_names
from asystem.config import Command, Config
from asystem.errors import WorkerError

Train = Callable[[Config], None]


@pytest.fixture(autouse=True)
def _hydra_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["asystem"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    """The configurations of runs that the command line starts, none of which takes any time."""
    started: list[Config] = []
    monkeypatch.setattr(cli, "_start", started.append)
    monkeypatch.chdir(tmp_path)
    return started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], 'unknown command "trian" (did you mean "train"?)'),
        (["train", "recipe=nothing-like-it"], 'unknown recipe "nothing-like-it"'),
        (["train", "recipe=quickstart", "seeed=3"], 'unknown key "seeed" (did you mean "seed"?)'),
        (["train", "recipe=quickstart", "data.task=nowhere.py"], "nowhere.py does not exist"),
        (["train", "recipe=quickstart", "model.path=nowhere"], "nowhere"),
        (["train", "recipe=quickstart", "model.vocab_size=100"], "100"),
        (["report", "nowhere"], "nowhere is no run's folder"),
        (["stf", "recipe=sft_sort"], 'unknown command "stf" (did you mean "sft"?)'),
        (
            ["sft", "recipe=sft_sort", "finetune.epoch=2"],
            'unknown key "finetune.epoch" (did you mean "finetune.epochs"?)',
        ),
        (["dpo", "recipe=sft_sort"], 'train() row 0: "chosen" is missing or empty'),
        (["dpo", "recipe=dpo_sort", "model.path=nowhere"], "nowhere/config.json does not exist"),
        (["sft", "recipe=quickstart"], 'train() row 0: neither "messages" nor "prompt" and "response"'),
        (["export", "nowhere", "out"], "nowhere holds no complete checkpoint"),
        (["export", "nowhere"], "name two folders"),
        (["export", "nowhere", "out", "dtype=float8"], "dtype=float8: choose float32, bfloat16, float16"),
        (["train", "recipe=quickstart", "--bogus"], "unrecognized arguments: --bogus"),
        (["train", "--cfg", "job"], "which recipe?"),
        (["train", "--cfg", "job", "recipe=quickstart", "steps=many"], "steps: value 'many'"),
        (["train", "--cfg", "job", "--multirun", "recipe=quickstart"], "leave --multirun out"),
        (["train", "--multirun", "recipe=quickstart,quikstart"], 'unknown recipe "quikstart"'),
        (["train", "-m", "recipe=quickstart", "rollout.max_staleness=0,-1"], "rollout.max_staleness=-1 (η)"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asystem: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "asystem train recipe=NAME" in capsys.readouterr().out


def test_a_run_starts_where_it_was_called_and_leaves_nothing_of_hydra(runs: list[Config], tmp_path: Path) -> None:
    assert main(["train", "recipe=quickstart", "steps=3"]) == 0
    assert [config.steps for config in runs] == [3]
    assert (Path.cwd(), list(tmp_path.iterdir())) == (tmp_path, [])


def test_sft_has_the_flags_of_train(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "recipe=sft_sort", "finetune.epochs=2"]) == 0
    assert [(config.command, config.finetune.epochs) for config in runs] == [(Command.sft, 2)]
    assert main(["dpo", "recipe=sft_sort", "--cfg", "job"]) == 0
    assert "command: dpo\n" in capsys.readouterr().out


def test_multirun_starts_each_combination(runs: list[Config], tmp_path: Path) -> None:
    assert main(["train", "--multirun", "recipe=quickstart", "seed=1", "rollout=sync,c3po"]) == 0
    assert [(config.seed, config.rollout.token_budget) for config in runs] == [(1, None), (1, 4096)]
    assert Path.cwd() == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_cfg_shows_the_configuration_and_starts_nothing(runs: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe=quickstart", "rollout=sync", "--cfg", "job"]) == 0
    out = capsys.readouterr().out
    assert "recipe: quickstart\n" in out
    assert "  token_budget: null\n" in out
    assert runs == []


def test_help_of_train_lists_recipes_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"recipe: {', '.join(recipe_names())}\n" in out
    assert "rollout: async, c3po, sync\n" in out


@pytest.mark.parametrize(
    ("typed", "choices"),
    [
        ("asystem train recipe=q", "recipe=quickstart\n"),
        ("asystem train recipe=quickstart rollout.tok", "rollout.token_budget=\n"),
        ("asystem train runtime=", "runtime=inline runtime=ray\n"),
        ("asystem sft finetune.too_l", "finetune.too_long=\n"),
    ],
)
def test_shell_completion(
    typed: str, choices: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", typed)
    monkeypatch.setenv("COMP_POINT", str(len(typed)))
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out == choices


def failing(error: BaseException) -> Train:
    def start(config: Config) -> None:
        raise error

    return start


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (WorkerError("trainers", 3, "node7", "update", "out of memory"), 1, "error: trainers rank 3 on node7: update"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failed_run_is_one_line(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_start", failing(error))
    assert main(["train", "recipe=quickstart"]) == status
    assert capsys.readouterr().err.startswith(f"asystem: {message}")


def test_debugging_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_start", failing(WorkerError("trainers", 3, "node7", "update", "out of memory")))
    monkeypatch.setenv("ASYSTEM_DEBUG", "1")
    with pytest.raises(WorkerError):
        main(["train", "recipe=quickstart"])


def test_bad_input_is_refused_before_anything_heavy_is_imported() -> None:
    program = (
        "import sys; from asystem.cli import main; status = main(['train', 'recipe=quickstart', 'steps=0'])\n"
        "sys.exit(0 if status == 2 and not {'torch', 'ray', 'wandb'} & set(sys.modules) else 1)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "asystem: error: steps=0 is below 1\n")
