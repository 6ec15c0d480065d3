"""Charts by matplotlib, as SVG for the page (its colours are the page's, light or dark; its text stays text) and as PNG.

Each is drawn twice, for a wide and for a narrow screen, at the size at which it is shown, so that letters are readable on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas_rl.telemetry.plots import figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from atlas_rl.report.run import Run, Series

WIDTHS = {"wide": 800, "narrow": 340}
"""Of a chart, in CSS pixels."""
POINTS = {"wide": 200, "narrow": 80}
"""Most points of a line."""

# name: (light, dark). Told apart with the common kinds of colour blindness; no light one stands here twice
COLORS = {
    "page": ("#fbfbf9", "#14171a"),
    "ink": ("#1d2126", "#e8eaed"),
    "soft": ("#59616a", "#a5aeb8"),
    "axis": ("#b8bec5", "#4c555f"),
    "grid": ("#e7e9ec", "#2a3036"),
    "plain": ("#8d8d8d", "#9a9fa5"),
    "static": ("#00798c", "#37b0c4"),
    "static-suffix": ("#7fbac3", "#1f6976"),
    "adaptive": ("#d1495b", "#f2788a"),
    "adaptive-suffix": ("#e8a5ad", "#8c3f4c"),
    "suffix": ("#e0a030", "#edb54e"),
    "full": ("#1d4e89", "#86b3ea"),
    "verify": ("#1d4e8a", "#5b8fcf"),
    "sample": ("#6f9bd1", "#3b6497"),
    "prefill": ("#b5cdea", "#2c4a6e"),
    "draft": ("#e0a031", "#edb54d"),
    "refresh": ("#8f7ab8", "#a592d3"),
    "retrain": ("#d1495c", "#f2788b"),
    "exchange": ("#4f9d86", "#5fb89e"),
    "idle": ("#c9a9a0", "#7a5c54"),
    "other": ("#a3a8ae", "#6a727b"),
    "rollouts": ("#1d4e8b", "#86b3eb"),
    "rest": ("#e0e2e5", "#333a42"),
}
NAMES = {
    "plain": "no drafts",
    "static": "static",
    "recurrent": "adaptive",
    "suffix": "suffix",
    "static+suffix": "static + suffix",
    "recurrent+suffix": "adaptive + suffix",
}
"""What drafters and arms are called on the page."""

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": COLORS["ink"][0],
    "axes.labelsize": 11.5,
    "axes.labelcolor": COLORS["soft"][0],
    "axes.edgecolor": COLORS["axis"][0],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"][0],
    "grid.linewidth": 1.0,
    "xtick.color": COLORS["axis"][0],
    "ytick.color": COLORS["axis"][0],
    "xtick.labelcolor": COLORS["soft"][0],
    "ytick.labelcolor": COLORS["soft"][0],
    "ytick.major.size": 0,
    "text.color": COLORS["ink"][0],
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "legend.borderaxespad": 0.0,
    "legend.handlelength": 1.0,
    "legend.handleheight": 0.9,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    key: str
    """Of its file and its place in the page."""
    label: str
    """What it shows, for those who do not see it."""
    how_to_read: str
    finding: str
    """What this run shows."""
    draw: Callable[[Figure, str], None]
    """Into an empty figure, for a wide or a narrow screen."""
    heights: tuple[int, int] = (300, 260)


class NoFigure(Exception):
    """A chart has nothing to show in this run; the message says why."""


def color(name: str) -> str:
    return COLORS[name][0]


def arm_color(arm: str) -> str:
    """Of a drafter or an arm, as the log names it."""
    name = arm.replace("recurrent", "adaptive").replace("+", "-")
    return color(name if name in COLORS else "other")


def arm_label(arm: str) -> str:
    return NAMES.get(arm, arm if len(arm) <= 24 else f"{arm[:23]}…")


def css_colors(theme: int) -> str:
    """The variables of the light (0) or the dark (1) theme."""
    return " ".join(f"--c-{name}: {themes[theme]};" for name, themes in COLORS.items())


# ---- files -------------------------------------------------------------------------------------------------------------------


def svgs_of(chart: Chart) -> dict[str, str]:
    """By screen; to stand in an HTML page that defines the colours' variables."""
    return {screen: _as_part_of_page(chart, screen, _saved(chart, screen, format="svg")) for screen in WIDTHS}


def write_png(chart: Chart, path: Path) -> None:
    """The wide one, in light colours, two dots per pixel."""
    path.write_bytes(_saved(chart, "wide", format="png", dpi=144, facecolor=color("page")))


def _saved(chart: Chart, screen: str, **options: Any) -> bytes:
    import matplotlib

    height = chart.heights[list(WIDTHS).index(screen)]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": f"{chart.key} {screen}"}):
        figure = figure_class()(figsize=(WIDTHS[screen] / 72, height / 72), dpi=72, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04)
        chart.draw(figure, screen)
        file = io.BytesIO()
        metadata = {"Date": None} if options["format"] == "svg" else None
        figure.savefig(file, metadata=metadata, **{"facecolor": "none"} | options)
    return file.getvalue()


def _as_part_of_page(chart: Chart, screen: str, svg: bytes) -> str:
    """Colours by variables, the page's font, names that no other chart has, and nothing but the drawing."""
    text = svg.decode()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    prefix = f"{chart.key}-{screen}-"
    variables = {light: f"var(--c-{name})" for name, (light, _) in COLORS.items()}

    def changed(match: re.Match[str]) -> str:
        tag = re.sub(r"#[0-9a-f]{6}\b", lambda m: variables.get(m[0], m[0]), match[0])
        tag = re.sub(r" (font-family|font): [^;]*;|'DejaVu Sans'[^;\"]*", "", tag)
        tag = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", tag)
        tag = re.sub(r'(?:xlink:)?(href="#)|(url\(#)', lambda m: f"{m[1] or m[2]}{prefix}", tag)
        return re.sub(r"(\d+\.\d\d)\d+", r"\1", tag)

    text = re.sub(r"<[^>]+>", changed, re.sub(r"\s*\n\s*", " ", text)).replace("> <", "><")
    box = re.search(r'viewBox="[^"]+"', text)[0]
    head = f'<svg {box} class="{screen}" role="img" aria-labelledby="{prefix}title">'
    title = f'<title id="{prefix}title">{escape(chart.label)}</title>'
    return head + title + text[text.index(">") + 1 :]


# ---- common to charts --------------------------------------------------------------------------------------------------------


def legend(figure: Figure, screen: str, handles: list[Any] | None = None, columns: int | None = None) -> None:
    """Above the plots (of what is in the first one), in as many columns as the screen has room for."""
    handles = handles or figure.axes[0].get_legend_handles_labels()[0]
    columns = columns or (len(handles) if screen == "wide" else 2)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def patch(name: str, label: str) -> Any:
    """A field of colour for a legend."""
    from matplotlib.patches import Patch

    return Patch(color=name if name.startswith("#") else color(name), label=label)


def line(axes: Axes, series: Series, screen: str, name: str, **options: Any) -> None:
    """Every step as a faint dot, their running medians as a line, which ends where there are no steps."""
    dots = series.thinned(POINTS[screen])
    if len(series) > 1:
        axes.plot(dots.steps, dots.values, "o", ms=4, mew=0, alpha=0.4, color=name)
    calm = series.smooth().thinned(POINTS[screen])
    marker = "o" if len(series) == 1 else ""
    axes.plot(*calm.broken(), marker=marker, color=name, **options)


def step_axis(axes: Axes, run: Run) -> None:
    """The whole run from left to right."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(run.unit)
    axes.set_xlim(run.first_step - 0.6, run.last_step + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def panels(figure: Figure, screen: str, count: int = 2, **options: Any) -> list[Axes]:
    """Side by side where there is room, else one below the other."""
    shape = (1, count) if screen == "wide" else (count, 1)
    return list(figure.subplots(*shape, squeeze=False, **options).flat)
