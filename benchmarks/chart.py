"""The figures of ``overhead.py`` as a plot, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from table import LABELS, OURS, Comparison

_TITLES = {
    "untouched": "session not touched: more than no session",
    "select": "one object loaded, commit: more than by hand",
    "insert": "one object added, commit: more than by hand",
}


def draw(comparisons: list[Comparison], path: Path) -> str:
    """Write one panel of bars for each comparison; return what was done, to be printed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "no plot: matplotlib is not installed"
    mpl.use("svg")
    # Text stays text and ids stay the same from run to run, so that the file is small and its diffs are of the figures.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "celery-alchemy"})
    from matplotlib import pyplot as plt

    columns = len({comparison.work for comparison in comparisons})
    lines = len({comparison.database for comparison in comparisons})
    figure, panels = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.2 * lines), squeeze=False)
    for panel, comparison in zip(panels.flat, comparisons, strict=True):
        rows = [row for row in comparison.rows if row.contender != comparison.reference]
        rows.sort(key=lambda row: row.more_us, reverse=True)
        colours = ["#c2410c" if row.contender in OURS else "#94a3b8" for row in rows]
        bars = panel.barh([LABELS[row.contender] for row in rows], [row.more_us for row in rows], color=colours)
        panel.bar_label(bars, [f"{row.more_us:+.1f}" for row in rows], padding=3, fontsize=8)
        panel.set_title(f"{comparison.database}: {_TITLES[comparison.work]}", fontsize=9)
        panel.set_xlabel("microseconds for one task", fontsize=8)
        panel.axvline(0, color="#334155", linewidth=0.8)
        panel.margins(x=0.2)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return f"plot: {path}"
