"""`report.html`: one static page about a run that opens from a file, with no network and no script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from asystem.tracking.charts import SMOOTHED, busy_strip, line_chart
from asystem.tracking.rollouts import read_rollouts, steps_written
from asystem.tracking.run_dir import write_whole
from asystem.tracking.timeline import ROLES

STRIP_SECONDS = 30.0
STRIP_ROWS = 32
SAMPLES = 10
SHOWN_TOKENS = 400  # of one sample
SHOWN_CHARACTERS = 4000

# Title, metrics, bounds of the y axis. Metrics that a run did not measure are left out.
CHARTS: tuple[tuple[str, tuple[str, ...], tuple[float, float] | None], ...] = (
    ("Reward of trained rollouts", ("reward/mean",), None),
    ("Held-out accuracy", ("eval/*/accuracy",), (0.0, 1.0)),
    ("Staleness of trained tokens, weight versions", ("rollout/staleness_max", "rollout/staleness_mean"), None),
    ("|log p_train - log p_infer|, mean over tokens", ("mismatch/logprob_diff_mean",), None),
    ("|log p_train - log p_infer|, largest", ("mismatch/logprob_diff_max",), None),
    (
        "p_train / p_infer before masking",
        ("mismatch/ratio_p01", "mismatch/ratio_p50", "mismatch/ratio_p99"),
        None,
    ),
    ("Share of tokens masked by the correction", ("icepop/masked_fraction",), None),
    ("Entropy, nats a token", ("train/entropy",), None),
    ("Gradient norm before clipping", ("train/grad_norm",), None),
    ("Loss", ("train/loss", "eval/*/loss"), None),
    ("Share of pairs in which the chosen answer gained more", ("dpo/accuracy",), (0.0, 1.0)),
    ("Margin of the chosen answer, β times nats", ("dpo/margin", "eval/*/margin"), None),
    ("Log-probability of answers, nats", ("dpo/chosen_logprob", "dpo/rejected_logprob"), None),
    ("Perplexity", ("train/perplexity", "eval/*/perplexity"), None),
    ("Response length, tokens", ("rollout/length_max", "rollout/length_mean"), None),
    ("Rollouts carried over and purged", ("rollout/carried", "rollout/purged"), None),
    ("Tokens a second", ("rollout/tokens_per_second", "train/tokens_per_second"), None),
    ("Model FLOPs utilisation of the updates (MFU)", ("train/mfu",), None),
    ("Seconds a step, and of them publishing weights", ("time/step", "sync/seconds"), None),
    ("Peak memory, GiB", ("memory/*_peak_gib",), None),
)

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5d6776; --line: #d8dde5; --paper: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --dim: #9aa5b5; --line: #343c48; --paper: #14181f; --card: #1c222b; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 24px;
  max-width: 1360px; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 32px 0 12px; }
.dim, figcaption, .key { color: var(--dim); } .facts { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 16px; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
.fact b { display: block; font-size: 19px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
figcaption { font-size: 13px; display: flex; flex-wrap: wrap; gap: 4px 14px; } figcaption b { color: var(--ink); }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: var(--dim); }
svg .column { fill: transparent; } svg .column:hover { fill: var(--ink); opacity: 0.08; }
svg .grid { stroke: var(--line); } svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .faint { stroke-width: 1; opacity: 0.35; }
.strips { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin-bottom: 6px; }
.who { font-size: 13px; line-height: 22px; } svg.strip { height: 22px; background: var(--paper); }
svg.axis { background: none; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.rollout { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin-bottom: 10px; }
.text { font: 14px/1.6 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; margin: 4px 0; }
.tokens { font: 12px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; }
.tokens span { border-radius: 3px; padding: 1px 3px; } .tokens .masked { outline: 1.5px solid #d81b60; }
.tokens .newer { border-left: 3px solid var(--ink); border-radius: 0 3px 3px 0; }
table { border-collapse: collapse; font-size: 13px; } td { padding: 2px 16px 2px 0; vertical-align: top; }
td + td { overflow-wrap: anywhere; } details { margin-top: 24px; } summary { cursor: pointer; font-weight: 600; }
"""


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` from what stands in the run's folder, of a run that goes on too; returns its path."""
    summary = _read_json(run_dir / "summary.json")
    title = escape(f"{summary.get('recipe') or run_dir.parent.name} · {run_dir.resolve().name}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{_headline(summary)}\n{_curves(run_dir)}\n"
        f"{_strip(run_dir)}\n{_samples(run_dir)}\n{_config(run_dir)}\n</body></html>\n"
    )
    path = run_dir / "report.html"
    write_whole(path, page)
    return path


def _headline(summary: dict[str, Any]) -> str:
    overlap = summary.get("overlap") or {}
    facts = [("held-out accuracy", _before_after(summary, "eval"))]
    facts += [("held-out loss", _before_after(summary, "eval_loss"))]
    facts += [(label, f"{summary[key]:,}") for label, key in _COUNTS if summary.get(key) is not None]
    if summary.get("wall_seconds") is not None:
        facts.append(("wall time", f"{summary['wall_seconds']:,.0f} s"))
    for label, key in (("training", "generation_training"), ("reward", "generation_reward")):
        if overlap.get(key) is not None:
            facts.append((f"overlap · generation with {label}", f"{overlap[key]:.0%}"))
    facts += [(f"idle · {group}", f"{share:.0%}") for group, share in (overlap.get("idle_share") or {}).items()]
    cards = "".join(
        f'<div class="fact"><span class="dim">{escape(label)}</span><b>{escape(value)}</b></div>'
        for label, value in facts
        if value
    )
    status = escape(str(summary.get("status", "running")))
    return f'<div class="dim">asystem run, {status}</div><div class="facts">{cards}</div>'


_COUNTS = (("optimizer steps", "steps"), ("tokens generated", "tokens_generated"), ("tokens trained", "tokens_trained"))


def _before_after(summary: dict[str, Any], key: str) -> str:
    first, last = summary.get(f"{key}_first"), summary.get(f"{key}_last")
    return "" if first is None or last is None else f"{first:.3f} → {last:.3f}"


def _curves(run_dir: Path) -> str:
    rows = list(_read_lines(run_dir / "metrics.jsonl"))
    names = sorted({name for row in rows for name in row})
    charts = []
    for title, wanted, bounds in CHARTS:
        shown = [name for pattern in wanted for name in names if _matches(name, pattern)]
        curves = {
            name: [(row["step"], row[name]) for row in rows if name in row and _is_shown(row, name)] for name in shown
        }
        charts.append(line_chart(title, curves, bounds))
    hint = "Over each long curve, drawn faint, stands its moving mean over a fiftieth of the run."
    note = f'<p class="dim">{hint}</p>' if len(rows) > SMOOTHED else ""
    return f'<h2>Curves</h2>{note}<div class="charts">{"".join(charts)}</div>'


def _strip(run_dir: Path) -> str:
    events = _read_json(run_dir / "timeline.json").get("traceEvents", [])
    calls = [event for event in events if event["ph"] == "X"]
    if not calls:
        return ""
    groups = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    end = max(call["ts"] + call["dur"] for call in calls) / 1e6
    begin = max(min(call["ts"] for call in calls) / 1e6, end - STRIP_SECONDS)
    rows: dict[str, list[tuple[str, float, float]]] = {}
    for call in sorted(calls, key=lambda call: (call["pid"], call["tid"], call["ts"])):
        row = rows.setdefault(f"{groups[call['pid']]} {call['tid']}", [])
        start, stop = call["ts"] / 1e6, (call["ts"] + call["dur"]) / 1e6
        if stop > begin:
            row.append((call["name"], max(start, begin) - begin, stop - begin))
    hidden = f", the first {STRIP_ROWS} of {len(rows)} workers" if len(rows) > STRIP_ROWS else ""
    shown = dict(list(rows.items())[:STRIP_ROWS])
    span = max(end - begin, 1e-6)
    hint = '<p class="dim">The whole run: open timeline.json in ui.perfetto.dev.</p>'
    return f"<h2>Who was busy: the last {span:.0f} s{hidden}</h2>{busy_strip(shown, span, tuple(ROLES))}{hint}"


def _samples(run_dir: Path) -> str:
    cards = [_sample(rollout) for rollout in _pick(run_dir)]
    if not cards:
        return ""
    legend = (
        '<p class="dim">Tokens by number. Blue: training gives the token more probability than generation did; orange: '
        "less. Outlined: masked by the correction. A bar on the left: sampled under newer weights than the token "
        "before. The pointer shows the figures.</p>"
    )
    return f"<h2>{len(cards)} trained rollouts, early to late</h2>{legend}{''.join(cards)}"


def _pick(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Rollouts spread evenly over the run, and over their step's batch."""
    steps = steps_written(run_dir)
    if not steps:
        return
    picks = [steps[round(index * (len(steps) - 1) / (SAMPLES - 1))] for index in range(SAMPLES)]
    for step in sorted(set(picks)):
        rollouts, count = list(read_rollouts(run_dir, [step])), picks.count(step)
        chosen = sorted({(2 * place + 1) * len(rollouts) // (2 * count) for place in range(count)})
        yield from (rollouts[place] for place in chosen if place < len(rollouts))


def _sample(rollout: dict[str, Any]) -> str:
    facts = [f"step {rollout['step']}", f"rollout {rollout['rollout']}", f"reward {_number(rollout['reward'], 'g')}"]
    facts += [f"advantage {_number(rollout['advantage'], '+.2f')}", f"{len(rollout['tokens'])} tokens"]
    facts += [str(rollout["finish"])] + ([f"error: {rollout['error']}"] if rollout.get("error") else [])
    tokens = " ".join(_tokens(rollout))
    more = len(rollout["tokens"]) - SHOWN_TOKENS
    rest = f' <span class="dim">… {more:,} more</span>' if more > 0 else ""
    return (
        f'<div class="rollout"><div class="dim">{escape(" · ".join(facts))}</div>'
        f'<div class="text">{_text(rollout["prompt_text"])}<b>{_text(rollout["response_text"])}</b></div>'
        f'<div class="tokens">{tokens}{rest}</div></div>\n'
    )


def _tokens(rollout: dict[str, Any]) -> Iterable[str]:
    columns = [rollout[name] for name in ("tokens", "infer_logprobs", "train_logprobs", "versions", "mask")]
    before = None
    for token, infer, train, version, kept in list(zip(*columns, strict=False))[:SHOWN_TOKENS]:
        marks = [] if kept else ["masked"]
        marks += ["newer"] if before is not None and version > before else []
        before = version
        known = infer is not None and train is not None
        shade = f' style="background:{_shade(train - infer)}"' if known else ""
        ratio = f"{math.exp(min(train - infer, 700)):.3g}" if known else "unknown"
        hint = f"log p_infer {infer}, log p_train {train}, ratio {ratio}, weights {version}{'' if kept else ', masked'}"
        yield f'<span class="{" ".join(marks)}"{shade} title="{escape(hint)}">{escape(str(token))}</span>'


def _shade(log_ratio: float) -> str:
    """Full colour where one side gives the token at least e times the probability of the other."""
    color = "47,111,222" if log_ratio > 0 else "217,98,43"
    return f"rgba({color},{0.7 * min(1.0, abs(log_ratio)):.2f})"


def _config(run_dir: Path) -> str:
    import yaml

    path = run_dir / "config.yaml"
    if not path.is_file():
        return ""
    rows = "".join(
        f'<tr><td class="key">{escape(key)}</td><td>{escape(str(value))}</td></tr>\n'
        for key, value in _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    )
    return f"<details><summary>Configuration</summary><table>\n{rows}</table></details>"


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else value


def _is_shown(row: dict[str, Any], name: str) -> bool:
    """Step 0 is the start and the warm-up: its accuracy counts, its times would hide those of all steps."""
    return bool(row["step"] > 0) or name.startswith("eval/")


def _matches(name: str, pattern: str) -> bool:
    start, star, end = pattern.partition("*")
    return name.startswith(start) and name.endswith(end) if star else name == pattern


def _text(text: str) -> str:
    cut = len(text) - SHOWN_CHARACTERS
    return escape(text[:SHOWN_CHARACTERS]) + (f"<i>… {cut:,} more characters</i>" if cut > 0 else "")


def _number(value: float | None, spec: str) -> str:
    return "unknown" if value is None else f"{value:{spec}}"


def _read_json(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return result


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; one cut off by a crash ends it."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
