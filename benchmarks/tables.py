"""Results as tables in the pages of `docs/`: a line a case, a column a figure, marks in brackets.

    python benchmarks/tables.py

What `benchmarks/results/` has of the studies below, of GPUs and of the newest day, is written between the markers of
their pages.
"""

from __future__ import annotations

import json
from typing import Any

from curves import table, write_table
from record import FOLDER, Row

PAGES = {
    "generation": "generation.md", "training": "training.md", "hybrid": "placement.md", "weights": "weights.md",
    "ranks": "gpus.md", "tensor-parallel": "gpus.md",
}  # fmt: skip
"""By study, the page that has its tables; files of CPUs are told of in words there."""
WIDEST = 7  # columns; further figures of a case stand in the file alone


def main() -> None:
    for study, page in PAGES.items():
        found = [json.loads(path.read_text()) for path in sorted(FOLDER.glob(f"{study}-nvidia-*.json"))]
        newest = max((result["date"] for result in found), default="")
        if texts := [of_device(result) for result in found if result["date"] == newest]:
            write_table(page, study, "\n\n".join(texts))


def of_device(result: dict[str, Any]) -> str:
    """A table of one file, with what it was measured on."""
    cases: dict[str, dict[str, Row]] = {}
    for each in result["rows"]:
        case, colon, figure = each["name"].rpartition(": ")
        if colon and each["value"] is not None:
            cases.setdefault(case, {})[f"{figure}, {each['unit']}"] = each
    count = {figure: sum(figure in found for found in cases.values()) for found in cases.values() for figure in found}
    columns = [figure for figure, times in count.items() if times > 1 or len(cases) == 1][:WIDEST]
    lines = [[case, *(_cell(found.get(column)) for column in columns)] for case, found in cases.items()]
    shown = [line for line in lines if any(line[1:])]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version[0].isdigit())
    about = f"{result['device']}, {result['date']}, commit {result['commit'][:7]}, {versions}:"
    return f"{about}\n\n{table(['', *(column.removesuffix(', 1') for column in columns)], shown)}"


def _cell(each: Row | None) -> str:
    if each is None:
        return ""
    mark = "" if each["mark"] is None else f" ({each['mark']:,g})"
    return f"{each['value']:,g}{mark}"


if __name__ == "__main__":
    main()
