"""What every benchmark writes: `results/<study>-<device>.json` with device, versions and command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FOLDER = Path(__file__).parent / "results"


def row(
    name: str, value: float | None, unit: str, *, mark: float | None = None, better: str = "higher", note: str = ""
) -> Row:
    """A figure of four digits, None = not run; ``mark`` is what was aimed at, ``better`` is higher or lower."""
    figure = None if value is None else float(f"{value:.4g}")
    return {"name": name, "value": figure, "unit": unit, "mark": mark, "better": better, "note": note}


def show(rows: Sequence[Row]) -> None:
    """Prints figures as they come."""
    for each in rows:
        value = "not run" if each["value"] is None else f"{each['value']:,g}"
        mark = "" if each["mark"] is None else f"mark {each['mark']:g}"
        print(f"{each['name']:72} {value:>12} {each['unit']:10} {mark:10} {each['note']}".rstrip(), flush=True)


def cpu_name() -> str:
    """The processor, as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slug(device: str) -> str:
    """A device's name as a part of a file's."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def write(
    study: str,
    device: str,
    rows: Sequence[Row],
    *,
    packages: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    name: str | None = None,
    partial: bool = False,
) -> Path:
    """Writes a study's results.

    Args:
        packages: distributions whose versions count, beside Python and torch; ``versions`` of others.
        name: the file's device; None = made from ``device``.
        partial: figures of an earlier run stay where this one has none, and say of which commit they are.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    known = {package: _version(package) for package in ("torch", *packages)}
    result: dict[str, Any] = {
        "study": study,
        "device": device,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": os.environ.get("COMMIT") or commit,
        "command": f"python {' '.join(sys.argv)}",
        "versions": {"python": platform.python_version()} | known | dict(versions or {}),
    }
    path = FOLDER / f"{study}-{name or slug(device)}.json"
    path.parent.mkdir(exist_ok=True)
    result["rows"] = list(rows)
    if partial and path.exists():
        before = json.loads(path.read_text())
        result["rows"] = _kept(rows, before["rows"], before["commit"])
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _kept(rows: Sequence[Row], before: Sequence[Row], commit: str) -> list[Row]:
    """The rows, and what an earlier run has that they have not: in their place, or behind them."""
    old = {each["name"]: each for each in before if each["value"] is not None}
    for each in old.values():
        if "of commit " not in each["note"]:
            each["note"] = "; ".join(filter(None, [each["note"], f"of commit {commit[:7]}"]))
    measured = [old.get(each["name"], each) if each["value"] is None else each for each in rows]
    names = {each["name"] for each in rows}
    return measured + [each for name, each in old.items() if name not in names]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
