"""What studies show beside their figures: curves as PNG, and tables that a script writes into a page of `docs/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""

DOCS = Path(__file__).resolve().parent.parent / "docs"


def plot(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    *,
    xlabel: str,
    logarithmic: Sequence[str] = (),
    columns: int = 2,
) -> Path | None:
    """Writes a figure of several panels.

    Args:
        panels: by title; each has lines by name, and each line one curve a seed: all of one colour, their mean thick
            where they have the same x.
        logarithmic: titles of panels whose y is so.

    Returns:
        the path; None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no {path.name}: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(lines)}
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.0 * rows), squeeze=False)
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        for name, curves in panel.items():
            for curve in curves:
                axis.plot(*_columns(curve), color=colours[name], linewidth=0.5, alpha=0.5)
            if (mean := _mean(curves)) is not None:
                axis.plot(*_columns(mean), color=colours[name], linewidth=1.6, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_yscale("log" if title in logarithmic else "linear")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    own_legends = len(set(map(tuple, panels.values()))) > 1  # panels of different lines
    for axis in axes.flat[: len(panels) if own_legends else 1]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(page: str, name: str, text: str) -> None:
    """Puts ``text`` between the markers `<!-- NAME -->` and `<!-- end of NAME -->` of a page of `docs/`.

    Raises:
        SystemExit: the page has no such markers.
    """
    path = DOCS / page
    content, first, last = path.read_text(), f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = content.partition(first)
    _, ended, after = rest.partition(last)
    if not found or not ended:
        raise SystemExit(f"{path} has no place for {name}: write {first} and {last}, a line each")
    path.write_text(f"{before}{first}\n{text}\n{last}{after}")


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _mean(curves: Sequence[Curve]) -> Curve | None:
    """Of curves over the same x, cut to the shortest; None without any."""
    if not curves:
        return None
    return [(points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*curves, strict=False)]
