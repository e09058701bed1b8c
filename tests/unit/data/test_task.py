"""Tasks: rows from Python and from JSONL, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from asystem.config import DataConfig
from asystem.data.task import load_task
from asystem.errors import DataError

TASK = """
def train(): return [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]
def evaluation(): return [{"prompt": "2+2=", "answer": "4"}]
def reward(row, response): return float(response == row["answer"])
"""


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return name


def test_a_task_file_gives_rows_and_reward(tmp_path: Path) -> None:
    task = load_task(DataConfig(task=write(tmp_path, "task.py", TASK)), str(tmp_path))
    assert [row["prompt"] for row in task.train] == ["1+1=", "1+2="]
    assert task.demonstrations == []
    assert task.reward is not None
    assert task.reward(task.evaluation[0], "4") == 1.0
    assert task.fingerprint() == load_task(DataConfig(task="task.py"), str(tmp_path)).fingerprint()


def test_files_take_the_place_of_functions(tmp_path: Path) -> None:
    write(tmp_path, "task.py", TASK)
    rows = write(tmp_path, "train.jsonl", '{"prompt": "5+5=", "answer": "10"}\n')
    task = load_task(DataConfig(task="task.py", train=rows), str(tmp_path))
    assert [row["answer"] for row in task.train] == ["10"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', "line 2: the line is empty"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"prompt": "a"}\n[1]\n', "line 2: expected an object with prompt, got list"),
        ('{"answer": "a"}\n', 'line 1: "prompt" is missing or empty'),
        ('{"prompt": 7}\n', 'line 1: "prompt" is not text'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(DataConfig(train=write(tmp_path, "rows.jsonl", text)), str(tmp_path))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("import nothing_of_that_name", "failed to import: ModuleNotFoundError"),
        ("def train(): return 1 / 0", r"train\(\) failed: ZeroDivisionError"),
        ("def train(): return [3]", r"train\(\) row 0: expected an object"),
        ("def train(): return []", "no training prompts"),
        (
            TASK + 'def demonstrations(): return [{"prompt": "2+2=", "response": "4"}]',
            "1 held-out prompts occur in demo",
        ),
    ],
)
def test_a_bad_task_is_named(tmp_path: Path, task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(DataConfig(task=write(tmp_path, "task.py", task)), str(tmp_path))


def test_a_missing_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.py does not exist"):
        load_task(DataConfig(task="nowhere.py"), str(tmp_path))
