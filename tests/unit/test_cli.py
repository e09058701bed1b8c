"""The command line: one line for every error, and the right exit status."""

from __future__ import annotations

import pytest

from asystem.cli import main


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
