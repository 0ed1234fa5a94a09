"""An anomaly as a picture: what was read and expected of each channel, and the anomaly score.

The only file that draws. matplotlib is imported when it is first needed, and without its `pyplot`,
so that no window system and no global state is involved.
"""

import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tsdiff.errors import TsdiffError
from tsdiff.types import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES: Final = (".png", ".svg", ".pdf")
_INK, _PALE, _GRID = "#1b1f24", "#68707a", "#e6e8eb"
_EXPECTED, _BAND, _STRETCH, _ALARM = "#1f6fb4", "#cfe1f2", "#fdebd8", "#c8401a"
_WIDTH_INCHES, _DPI = 10.0, 144
_PANEL_INCHES, _SCORE_INCHES = 1.15, 1.35
_TEXT_COLUMNS = 136  # characters of the subtitle's size that fit into the width
_LINE_INCHES = 0.19
_STYLE: Final[Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _PALE,
    "axes.labelcolor": _PALE,
    "xtick.color": _PALE,
    "ytick.color": _PALE,
    "svg.hashsalt": "tsdiff",
}


@dataclass(frozen=True)
class Panel:
    """One channel: everything (T,) in its own unit, NaN = missing; its share of all deviation."""

    channel: str
    unit: str
    observed: FloatArray
    expected: FloatArray
    lower: FloatArray
    upper: FloatArray
    share: float


@dataclass(frozen=True)
class Picture:
    """What is drawn: slots `numbers` (T,), ascending, each `period_ms` long.

    `stretch` is the anomalous part as positions from, to before; `at` the position asked for.
    With `steps` the axis counts slots, else it tells the time in UTC.
    """

    title: str
    text: str
    panels: tuple[Panel, ...]
    numbers: NDArray[np.int64]
    anomaly_score: FloatArray
    stretch: tuple[int, int] | None
    at: int
    period_ms: int
    steps: bool


def require_matplotlib() -> None:
    """Fail before minutes are spent, not after.

    Raises:
        TsdiffError: matplotlib is not installed.

    """
    try:
        import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise TsdiffError(
            "drawing needs the package matplotlib, which is not installed; "
            "install it with: pip install 'tsdiff[eval]'"
        ) from error


def save_picture(picture: Picture, path: Path) -> None:
    """Draw, and write the file that the suffix of `path` says.

    Raises:
        TsdiffError: matplotlib is missing, or the file cannot be written.

    """
    require_matplotlib()
    from matplotlib import rc_context  # noqa: PLC0415 - optional, and slow to import

    with rc_context(_STYLE):
        figure = draw(picture)
        # The same picture is the same file: no date in it.
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        try:
            figure.savefig(path, dpi=_DPI, metadata=metadata)
        except OSError as error:
            raise TsdiffError(f"cannot write {path}: {error.strerror}; name another file") from (
                error
            )


def draw(picture: Picture) -> "Figure":
    """Lay out the title, a panel a channel, and the anomaly score."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    # textwrap does not break at a no-break space.
    lines = textwrap.wrap(picture.text.replace(" %", "\u00a0%"), _TEXT_COLUMNS)
    head = 0.42 + _LINE_INCHES * len(lines) + 0.4  # title, text, legend
    rows = len(picture.panels)
    foot = 0.5
    body = rows * _PANEL_INCHES + _SCORE_INCHES
    height = head + body + foot
    figure = Figure(figsize=(_WIDTH_INCHES, height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.3 / height, picture.title, size=13, weight="bold", va="baseline")
    figure.text(
        0.02, 1 - 0.42 / height, "\n".join(lines), size=9.5, va="top", linespacing=1.35, color=_INK
    )
    grid = figure.add_gridspec(
        rows + 1,
        1,
        height_ratios=[*[_PANEL_INCHES] * rows, _SCORE_INCHES],
        left=0.085,
        right=0.97,
        top=1 - (head + 0.12) / height,
        bottom=foot / height,
        hspace=0.38,
    )
    below = figure.add_subplot(grid[rows, 0])
    axes = [*(figure.add_subplot(grid[row, 0], sharex=below) for row in range(rows)), below]
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    x = _positions(picture)
    for axis, panel in zip(axes, picture.panels, strict=False):
        _draw_panel(axis, x, panel)
    _draw_score(axes[-1], x, picture)
    for axis in axes:
        _dress(axis, x, picture)
    _label_time(axes[-1], picture)
    if rows:
        _legend(figure, axes[0], picture, 1 - (head - 0.28) / height)
    return figure


def _positions(picture: Picture) -> NDArray[Any]:
    """Where slots are on the axis: their numbers, or their times."""
    if picture.steps:
        return picture.numbers
    return (picture.numbers * picture.period_ms).astype("datetime64[ms]")


def _thickness(x: NDArray[Any]) -> float:
    """Thinner where slots are hardly wider than the line."""
    return 1.2 if len(x) < 600 else 0.7


def _draw_panel(axis: "Axes", x: NDArray[Any], panel: Panel) -> None:
    axis.fill_between(
        x, panel.lower, panel.upper, color=_BAND, linewidth=0, step="mid", label="90 % band"
    )
    axis.plot(
        x,
        panel.expected,
        color=_EXPECTED,
        linewidth=_thickness(x),
        drawstyle="steps-mid",
        label="expected",
    )
    axis.plot(x, panel.observed, color=_INK, linewidth=_thickness(x), label="observed")
    lonely = np.isfinite(panel.observed) & ~_has_neighbour(panel.observed)
    axis.plot(x[lonely], panel.observed[lonely], ".", color=_INK, markersize=3.5)
    unit = f" ({panel.unit})" if panel.unit else ""
    axis.set_title(f"{panel.channel}{unit}", loc="left", size=10, weight="bold", pad=4)
    if np.isfinite(panel.share):
        said = f"{100 * panel.share:.0f} % of the deviation"
        axis.set_title(said, loc="right", size=9, color=_PALE, pad=4)
    axis.set_ylim(*_limits(panel))


def _has_neighbour(values: FloatArray) -> NDArray[np.bool_]:
    finite = np.isfinite(values)
    return np.asarray(np.r_[False, finite[:-1]] | np.r_[finite[1:], False], np.bool_)


def _limits(panel: Panel) -> tuple[float, float]:
    """All that was read and expected, and what of the band is not beyond all measure."""
    lines = np.concatenate([panel.observed, panel.expected])
    lines = lines[np.isfinite(lines)]
    band = [edge[np.isfinite(edge)] for edge in (panel.lower, panel.upper)]
    if len(lines) == 0 or min(len(edge) for edge in band) == 0:
        return 0.0, 1.0
    low = min(float(lines.min()), float(np.quantile(band[0], 0.05)))
    high = max(float(lines.max()), float(np.quantile(band[1], 0.95)))
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.06
    return low - room, high + room


def _draw_score(axis: "Axes", x: NDArray[Any], picture: Picture) -> None:
    score = picture.anomaly_score
    axis.axhline(1.0, color=_ALARM, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.plot(x, score, color=_INK, linewidth=_thickness(x))
    above = np.isfinite(score) & (score > 1)
    axis.fill_between(x, 1.0, score, where=above.tolist(), color=_ALARM, alpha=0.35, linewidth=0)
    axis.set_title("anomaly score", loc="left", size=10, weight="bold", pad=4)
    axis.set_title("dashed: the threshold", loc="right", size=9, color=_ALARM, pad=4)
    top = np.nanmax(score) if np.isfinite(score).any() else 1.0
    axis.set_ylim(0, max(1.25, 1.08 * float(top)))


def _dress(axis: "Axes", x: NDArray[Any], picture: Picture) -> None:
    """Shade the stretch, mark the moment, and take away what says nothing."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_linewidth(0.6)
    axis.grid(axis="y", color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(width=0.6, length=3, labelsize=8.5)
    axis.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    if picture.stretch is not None:
        half = _half_slot(picture)
        first, last = picture.stretch[0], picture.stretch[1] - 1
        axis.axvspan(x[first] - half, x[last] + half, color=_STRETCH, linewidth=0, zorder=0)
    axis.axvline(x[picture.at], color=_PALE, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    axis.set_xlim(x[0], x[-1])


def _half_slot(picture: Picture) -> Any:  # noqa: ANN401 - of the kind that the axis is of
    return 0.5 if picture.steps else np.timedelta64(max(1, picture.period_ms // 2), "ms")


def _label_time(axis: "Axes", picture: Picture) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    if picture.steps:
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_xlabel(f"step (of {picture.period_ms / 1000:g} s)", size=9)
        return
    locator = AutoDateLocator(minticks=4, maxticks=9)  # type: ignore[no-untyped-call]
    axis.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator, show_offset=False)  # type: ignore[no-untyped-call]
    # The date stands where the day begins, and at the left end in any case.
    formatter.zero_formats = ["", "%Y", "%b", "%d %b", "%H:%M", "%H:%M"]
    formatter.formats = ["%Y", "%b", "%d %b", "%H:%M", "%H:%M", "%H:%M:%S"]
    axis.xaxis.set_major_formatter(formatter)
    first, last = (
        str(np.datetime64(int(picture.numbers[end]) * picture.period_ms, "ms")) for end in (0, -1)
    )
    days = [moment.partition("T")[0] for moment in (first, last)]
    axis.set_xlabel(f"UTC, {days[0] if days[0] == days[1] else ' to '.join(days)}", size=9)


def _legend(figure: "Figure", axis: "Axes", picture: Picture, y: float) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    handles: list[Any] = [
        Line2D([], [], color=_INK, linewidth=1.4, label="observed"),
        Line2D([], [], color=_EXPECTED, linewidth=1.3, label="expected"),
        Patch(color=_BAND, label="90 % band"),
    ]
    if picture.stretch is not None:
        handles.append(Patch(color=_STRETCH, label="anomalous"))
    handles.append(
        Line2D([], [], color=_PALE, linewidth=1, linestyle=(0, (1, 2)), label="asked for")
    )
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(0.012, y),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.6,
        columnspacing=1.6,
        borderpad=0,
    )
