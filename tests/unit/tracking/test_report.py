"""The page: its curves lie where the numbers say, and text from outside stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from asystem.tracking import write_report
from asystem.tracking.charts import COLORS, busy_strip, line_chart, short, smooth, thin, ticks

HOSTILE = '<script>alert("x")</script> & 3<4='


def rollout(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "rollout": step, "group": 0, "prompt": 0, "prompt_text": HOSTILE, "response_text": "<b>7</b>",
        "tokens": [11, 12, 13], "infer_logprobs": [-1.0, -1.0, -2.0], "train_logprobs": [-0.5, -1.5, None],
        "versions": [0, 0, 1], "mask": [1, 0, 1], "reward": 1.0, "advantage": -0.5, "finish": "stop", "error": None,
        **changes,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 30 steps by hand."""
    rows = [{"step": step, "version": step, "time": 0.0, "reward/mean": step / 30} for step in range(1, 31)]
    rows = [{"step": 0, "version": 0, "time": 0.0, "eval/sort/accuracy": 0.25, "time/step": 900.0}, *rows]
    rows[-1]["eval/sort/accuracy"] = 0.75
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "rew')
    summary = {
        "status": "interrupted", "recipe": HOSTILE, "steps": 30, "wall_seconds": 61.2, "eval_first": 0.25,
        "eval_last": 0.75, "tokens_generated": 12345,
        "overlap": {"generation_training": 0.625, "generation_reward": None, "idle_share": {"trainers": 0.25}},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").write_text("recipe: demo\nrollout: {token_budget: null, capacity: 64}\n")
    events = [
        {"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "trainers"}},
        {"name": "setup", "ph": "X", "pid": 1, "tid": 0, "ts": 0.0, "dur": 5e6, "args": {}},
        {"name": "update", "ph": "X", "pid": 1, "tid": 0, "ts": 45e6, "dur": 15e6, "args": {}},
    ]
    (tmp_path / "timeline.json").write_text(json.dumps({"traceEvents": events}))
    (tmp_path / "rollouts").mkdir()
    for step in range(1, 31):
        path = tmp_path / "rollouts" / f"step-{step:06d}-rank0.jsonl"
        path.write_text("".join(json.dumps(rollout(step)) + "\n" for _ in range(3)))
    return tmp_path


def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def test_text_from_outside_is_escaped(run_dir: Path) -> None:
    text = page(run_dir)
    assert "<script" not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; 3&lt;4=<b>&lt;b&gt;7&lt;/b&gt;</b>" in text


def test_the_page_needs_no_network(run_dir: Path) -> None:
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?:""", page(run_dir))


def test_tags_are_balanced(run_dir: Path) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page(run_dir))
    assert parser.open == []


def test_the_headline(run_dir: Path) -> None:
    text = page(run_dir)
    assert "asystem run, interrupted" in text
    facts = dict(re.findall(r'<span class="dim">([^<]*)</span><b>([^<]*)</b>', text))
    assert facts == {
        "held-out accuracy": "0.250 → 0.750",
        "optimizer steps": "30",
        "tokens generated": "12,345",
        "wall time": "61 s",
        "overlap · generation with training": "62%",
        "idle · trainers": "25%",
    }


def test_curves_lie_where_the_numbers_say(run_dir: Path) -> None:
    figure = re.search(r"<figure><figcaption><b>Held-out accuracy.*?</figure>", page(run_dir))
    assert figure is not None
    # The plot spans x 52..410 for steps 0..30 and y 166..8 for accuracy 0..1.
    assert 'points="52.0,126.5 410.0,47.5"' in figure[0]
    # Two steps have values: the pointer finds either in the half of the plot that is nearer to it.
    assert re.findall(
        r'<rect class="column" x="([^"]*)" y="8" width="([^"]*)" height="158"><title>(.*?)<', figure[0]
    ) == [
        ("52.0", "179.0", "step 0&#10;eval/sort/accuracy 0.25"),
        ("231.0", "179.0", "step 30&#10;eval/sort/accuracy 0.75"),
    ]
    assert "eval/sort/accuracy <b>0.75</b>" in figure[0]


def test_the_start_is_no_step(run_dir: Path) -> None:
    assert "Seconds a step" not in page(run_dir)


def test_the_strip_shows_the_last_30_seconds(run_dir: Path) -> None:
    text = page(run_dir)
    assert "the last 30 s" in text
    assert re.findall(r'<rect x="([\d.]+)%" y="2" width="([\d.]+)%"[^>]*><title>([^<]*)', text) == [
        ("50.00", "50.00", "update: 15,000.0 ms")
    ]


def test_ten_rollouts_from_the_first_step_to_the_last(run_dir: Path) -> None:
    steps = [int(step) for step in re.findall(r'"dim">step (\d+) · rollout', page(run_dir))]
    assert len(steps) == 10 and steps[0] == 1 and steps[-1] == 30 and steps == sorted(steps)


def test_a_short_run_shows_several_rollouts_a_step(run_dir: Path) -> None:
    for path in sorted((run_dir / "rollouts").iterdir())[2:]:
        path.unlink()
    for path in (run_dir / "rollouts").iterdir():
        path.write_text("".join(json.dumps(rollout(1, rollout=index)) + "\n" for index in range(50)))
    shown = [int(number) for number in re.findall(r'"dim">step 1 · rollout (\d+)', page(run_dir))]
    assert shown == [5, 15, 25, 35, 45] * 2


def test_tokens_carry_their_ratio_mask_and_version(run_dir: Path) -> None:
    tokens = re.findall(r'<span class="([^"]*)"( style="[^"]*")? title="([^"]*)">(\d+)</span>', page(run_dir))[:3]
    assert tokens == [
        (
            "",
            ' style="background:rgba(47,111,222,0.35)"',
            "log p_infer -1.0, log p_train -0.5, ratio 1.65, weights 0",
            "11",
        ),
        (
            "masked",
            ' style="background:rgba(217,98,43,0.35)"',
            "log p_infer -1.0, log p_train -1.5, ratio 0.607, weights 0, masked",
            "12",
        ),
        ("newer", "", "log p_infer -2.0, log p_train None, ratio unknown, weights 1", "13"),
    ]  # fmt: skip


def test_the_configuration_is_a_flat_table(run_dir: Path) -> None:
    rows = re.findall(r'<td class="key">([^<]*)</td><td>([^<]*)</td>', page(run_dir))
    assert rows == [("recipe", "demo"), ("rollout.token_budget", "null"), ("rollout.capacity", "64")]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert "asystem run, running" in page(tmp_path)


def test_gaps_split_a_curve() -> None:
    chart = line_chart("t", {"a": [(0, 0.0), (1, 1.0), (2, None), (3, 0.0), (4, 1.0)]})
    assert re.findall(r'points="([^"]*)"', chart) == ["52.0,166.0 141.5,8.0", "320.5,166.0 410.0,8.0"]


def test_the_pointer_finds_at_most_120_steps_the_first_and_the_last_among_them() -> None:
    chart = line_chart("t", {"a": [(step, 1.0) for step in range(1, 1001)], "b<": [(1000, 2.0)]})
    titles = re.findall(r"<title>(.*?)</title>", chart)
    assert len(titles) == 120
    assert titles[0] == "step 1&#10;a 1" and titles[-1] == "step 1,000&#10;a 1&#10;b&lt; 2"


def test_main_methods_have_the_same_colours_whatever_else_ran() -> None:
    rows = {"generators 0": [("a", 0.0, 1.0), ("update", 1.0, 2.0)]}
    colors = re.findall(r'fill="([^"]*)"><title>(\w+):', busy_strip(rows, 2.0, ("decode", "update")))
    assert colors == [(COLORS[2], "a"), (COLORS[1], "update")]


def test_a_long_curve_stands_faint_behind_its_moving_mean() -> None:
    points = [(float(step), float(step % 2)) for step in range(300)]  # 0, 1, 0, 1, ...
    means = [value for _, value in smooth(points)]
    assert means[10] == 4 / 7 and means[11] == 3 / 7  # of 3 neighbours on each side
    assert means[0] == 2 / 4  # the ends have fewer
    assert re.findall(r'<polyline class="(.*?)"', line_chart("t", {"a": points})) == ["curve faint", "curve"]
    assert smooth([(0.0, 1.0), (1.0, None), (2.0, 3.0)]) == [(0.0, 1.0), (1.0, None), (2.0, 3.0)]


def test_long_curves_keep_their_gaps() -> None:
    points = [(float(step), None if 5000 <= step < 6000 else 1.0) for step in range(10_000)]
    assert sum(value is None for _, value in thin(points)) >= 25
    assert len(thin(points)) <= 600


def test_long_curves_keep_their_peaks() -> None:
    points = [(float(step), 0.0) for step in range(10_000)]
    points[4567] = (4567.0, 9.0)
    thinned = thin(points)
    assert len(thinned) <= 600 and (4567.0, 9.0) in thinned


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 9_500, [0, 2000, 4000, 6000, 8000, 10_000]), (-3, 1, [-3, -2, -1, 0, 1])],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_ticks_of_a_constant() -> None:
    constant = ticks(2.0, 2.0, 5)
    assert constant[0] <= 2.0 <= constant[-1] and len(constant) > 2
    assert ticks(3, 3, 6, whole=True, inside=True) == [3]


@pytest.mark.parametrize(
    ("value", "step", "expected"),
    [(0, 0.5, "0"), (0.30000000000000004, 0.1, "0.3"), (20_000, 5000, "20,000"), (2e-6, 1e-6, "2.0e-06")],
)  # fmt: skip
def test_tick_labels(value: float, step: float, expected: str) -> None:
    assert short(value, step) == expected
