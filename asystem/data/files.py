"""Rows of datasets on disk: JSONL, Parquet, and folders that Hugging Face's `datasets` has saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asystem.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")

Located = tuple[str, Any]
"""(where a row stands, for messages; the row)."""


def read_rows(path: Path) -> list[Located]:
    """The rows of a JSONL or Parquet file, or of all those in a folder, in the order of their names; or of a folder
    that `Dataset.save_to_disk` has written.

    Raises:
        DataError: no such file, nothing in it, a line that is no JSON (with its number), or a format whose library is
            not installed.
    """
    if not path.exists():
        raise DataError(f"dataset {path} does not exist")
    files = _files_of(path) if path.is_dir() else [path]
    rows = [located for file in files for located in _read_file(file)]
    if not rows:
        raise DataError(f"dataset {path} is empty")
    return rows


def _files_of(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise DataError(f"dataset {folder} holds the splits {', '.join(splits)}: name one, as {folder / splits[0]}")
    if (folder / "state.json").is_file():  # of save_to_disk: its order is not that of names
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
    files = sorted(file for file in folder.iterdir() if file.suffix in (".jsonl", ".parquet"))
    if not files:
        raise DataError(
            f"dataset {folder} is a folder with neither .jsonl nor .parquet files, nor one of Dataset.save_to_disk"
        )
    return files


def _read_file(file: Path) -> Iterator[Located]:
    if file.suffix not in SUFFIXES:
        raise DataError(f"dataset {file}: unknown format; known are {', '.join(SUFFIXES)} and folders of them")
    if file.suffix in (".jsonl", ".json"):
        return _read_jsonl(file)
    return ((f"{file}, row {number}", row) for number, row in enumerate(_read_arrow(file), start=1))


def _read_jsonl(file: Path) -> Iterator[Located]:
    # Not splitlines(), which also cuts at characters that JSON strings may hold, such as U+2028.
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            if number == 1:
                return  # an empty file
            raise DataError(f"{where}: the line is empty; remove it")
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error}") from error


def _read_arrow(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"dataset {file} needs pyarrow: pip install 'asystem[parquet]', or make it JSONL") from None
    try:
        if file.suffix == ".parquet":
            table = pq.read_table(file)
        else:
            with pa.memory_map(str(file)) as source:
                table = pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"dataset {file} cannot be read: {error}") from None
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
