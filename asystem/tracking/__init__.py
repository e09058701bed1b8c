"""What a run leaves behind, and what it shows while it goes on: metrics, W&B, console, timeline, report."""

from asystem.tracking.report import write_report
from asystem.tracking.run_dir import new_run_dir
from asystem.tracking.timeline import overlap
from asystem.tracking.tracker import EVENTS, Tracker, is_timing

__all__ = ["EVENTS", "Tracker", "is_timing", "new_run_dir", "overlap", "write_report"]
