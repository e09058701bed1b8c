"""`report.html`: one static page about a run that opens from a file, with no network."""

from __future__ import annotations

import html
import json
from pathlib import Path

from asystem.tracking.run_dir import write_whole


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` from what stands in the run's folder, and returns its path."""
    summary_path = run_dir / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.is_file() else {}
    page = f"<!doctype html><title>asystem run</title><pre>{html.escape(json.dumps(summary, indent=2))}</pre>"
    path = run_dir / "report.html"
    write_whole(path, page)
    return path
