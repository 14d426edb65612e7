"""One look for every figure of the course.

Lines differ in colour *and* dash, so that a figure reads without colour; the colours are told apart
by colour-blind readers and stand out on the figures' own paper, which the site shows as a card in
the dark theme too. A figure's title is its claim; its axes carry units.
"""

import collections
import json
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils import CourseError

PAPER, INK, GREY = "#fbfaf7", "#1b2733", "#6b7280"
COLORS = {
    "blue": "#2563a8",
    "orange": "#c2570c",
    "green": "#2e7d5b",
    "purple": "#7a4fa3",
    "grey": GREY,
}
LINESTYLES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]


def use_style() -> None:
    """Make the course's style matplotlib's default, for this session."""
    plt.rcParams.update(
        {
            "figure.facecolor": PAPER,
            "axes.facecolor": PAPER,
            "savefig.facecolor": PAPER,
            "figure.dpi": 120,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.edgecolor": GREY,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#d9d6cf",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "image.cmap": "cividis",
            "axes.prop_cycle": cycler(color=list(COLORS.values())) + cycler(linestyle=LINESTYLES),
        }
    )


def figure(
    width: float = 6.4, height: float = 3.2, *, rows: int = 1, columns: int = 1, **kwargs
) -> tuple[Figure, Axes]:
    """A figure in the course's style, `width` x `height` inches; `axes` is an array when there are
    several."""
    use_style()
    return plt.subplots(rows, columns, figsize=(width, height), **kwargs)


def smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Running mean over up to `window` values before and at each point; the same length as `values`."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    end = np.arange(1, len(total))
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def parts(array) -> dict[tuple[int, int, int, int], list[int]]:
    """(first row, end row, first column, end column) of the last two axes -> devices' numbers."""
    devices_of = collections.defaultdict(list)
    for device, index in array.sharding.devices_indices_map(tuple(array.shape)).items():
        ends = [(0, 1), *(s.indices(size)[:2] for s, size in zip(index, array.shape))][-2:]
        devices_of[(*ends[0], *ends[1])].append(device.id)
    return {place: sorted(devices) for place, devices in sorted(devices_of.items())}


def sharding(array, title: str = "Which device holds which part") -> tuple[Figure, Axes]:
    """A drawing of which device holds which part of an array, from `parts`.

    Each rectangle bears its devices' numbers, so that no colour is needed. `array` is anything with
    a shape and a sharding; nothing need be allocated to draw a plan.
    """
    fig, axes = figure(4.8, 3.2)
    rectangles = parts(array)
    tops, lefts = (sorted({corners[i] for corners in rectangles}) for i in (0, 2))
    for (top, bottom, left, right), devices in rectangles.items():
        shade = "white" if (tops.index(top) + lefts.index(left)) % 2 else "#dddad2"
        size = right - left, bottom - top
        axes.add_patch(Rectangle((left, top), *size, facecolor=shade, edgecolor=INK))
        middle, label = ((left + right) / 2, (top + bottom) / 2), ", ".join(map(str, devices))
        axes.text(*middle, label, ha="center", va="center", fontsize="small")
    rows, columns = [1, *array.shape][-2:]
    axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel="column", ylabel="row", title=title)
    axes.grid(False)
    return fig, axes


def guess_data(name: str, x: Sequence[float], y: Sequence[float], label: str = "recorded") -> None:
    """Hand a recorded curve to the site's "draw your guess" widget of the same name (`data-name`).

    Shows one line in a notebook; the numbers travel hidden in the cell's output, where the site's
    script finds them. More than 400 points are thinned evenly, first and last kept.
    """
    from IPython.display import HTML, display  # only a notebook needs it

    x, y = np.asarray(x, float), np.asarray(y, float)
    if not name or not all(c.isascii() and (c.isalnum() or c == "-") for c in name):
        what = f"expected a name of letters, digits and hyphens, found {name!r}"
        raise CourseError(f"guess_data: {what}")
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        what = f"expected x and y of one equal length, found {x.shape} and {y.shape}"
        raise CourseError(f"guess_data: {what}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        what = "expected finite numbers, found NaN or infinity: drop those points first"
        raise CourseError(f"guess_data: {what}")
    keep = np.unique(np.linspace(0, x.size - 1, min(x.size, 400)).round().astype(int))
    points = {"label": label, "x": x[keep].tolist(), "y": [float(f"{v:.6g}") for v in y[keep]]}
    text = json.dumps(points).replace("<", "\\u003c")  # no "</script>" can end the element early
    display(HTML(f'<script type="application/json" data-guess="{name}">{text}</script>'))
    print(f'recorded curve for the guess "{name}": {keep.size} points')


def widget_data(widget: str, name: str, content: dict) -> None:
    """Hand recorded numbers to a widget of the site, by its kind and its `data-name`; prints a line."""
    from IPython.display import HTML, display  # only a notebook needs it

    for word in (widget, name):
        if not word or not all(c.isascii() and (c.isalnum() or c == "-") for c in word):
            what = f"expected names of letters, digits and hyphens, found {word!r}"
            raise CourseError(f"widget_data: {what}")
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    display(HTML(f'<script type="application/json" data-{widget}="{name}">{text}</script>'))
    print(f'recorded numbers for the widget {widget} "{name}": {len(text):,} bytes')
