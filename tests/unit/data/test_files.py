"""Datasets on disk: every format gives the same rows, and what cannot be read is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from asystem.data.files import read_rows
from asystem.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "a\u2028b", "response": "x"},
    {"prompt": "é", "response": "y\n"},
    {"prompt": "c", "response": "z"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_by_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert read_rows(path) == [(f"{path}, line {n}", row) for n, row in enumerate(ROWS, start=1)]


def test_parquet_by_row(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "x"}]}]
    pq.write_table(pa.Table.from_pylist(messages), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == [(f"{tmp_path / 'rows.parquet'}, row 1", messages[0])]


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name, rows in (("b.jsonl", ROWS[2:]), ("a.jsonl", ROWS[:2])):
        write_jsonl(tmp_path / name, rows)
    (tmp_path / "README.md").write_text("not a dataset")
    assert [row for _, row in read_rows(tmp_path)] == ROWS


def test_a_saved_dataset_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    for name, rows in (("data-00001.arrow", ROWS[:1]), ("data-00000.arrow", ROWS[1:])):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    files = [{"filename": "data-00001.arrow"}, {"filename": "data-00000.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    assert [row for _, row in read_rows(tmp_path)] == ROWS


def test_what_the_datasets_library_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    assert [row for _, row in read_rows(tmp_path / "d" / "train")] == ROWS
    with pytest.raises(DataError, match=r"holds the splits train: name one, as .*/d/train"):
        read_rows(tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', "a.jsonl, line 2: the line is empty"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.csv", "a,b\n", "a.csv: unknown format; known are .jsonl"),
        ("a.parquet", "no parquet", "a.parquet cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as raised:
        read_rows(tmp_path / name)
    assert message in str(raised.value)


def test_missing_datasets_and_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"neither \.jsonl nor \.parquet files"):
        read_rows(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(DataError, match=r"a\.parquet needs pyarrow: pip install 'asystem\[parquet\]'"):
        read_rows(tmp_path / "a.parquet")
