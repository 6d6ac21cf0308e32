"""One training step as a picture: what computed, what was read and written meanwhile, and who waited.

The trace is a file that `gptj_stream.trace.Trace` wrote. A step is what lies within a span of the lane `step`; spans
with a `layer` are coloured by it. The lanes `compute` and `wait` share a row: it is the same thread.

    python benchmarks/timeline.py TRACE.json step.svg --step 3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from gptj_stream.errors import UserError
from gptj_stream.files import read_json

# dark to light, ending before yellow: a label can be read on every colour
LAYERS = LinearSegmentedColormap.from_list("layers", ["#2b2d6e", "#2f6fab", "#2aa198", "#8cc63f", "#f2b134"])
WITHOUT_LAYER, INK, QUIET = "#b8bcc4", "#22252b", "#6b717c"
TINTS = {"forward": "#e8f1fa", "backward": "#fdf1e3"}
WAITING: dict[str, Any] = {"facecolor": "white", "edgecolor": "#c8402f", "linewidth": 0.5, "hatch": "////"}


@dataclass(frozen=True)
class Span:
    """Times are in seconds from the start of the step."""

    row: str
    lane: str
    name: str
    start: float
    end: float
    layer: int | None

    @property
    def waits(self) -> bool:
        return self.lane == "wait"


@dataclass(frozen=True)
class Step:
    number: int
    seconds: float
    rows: list[str]  # from top to bottom
    spans: list[Span]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("output", type=Path, help="an .svg, .png or .pdf")
    parser.add_argument("--step", type=int, help="its number; by default the last one of the trace")
    arguments = parser.parse_args()
    try:
        step = read_step(arguments.trace, arguments.step)
    except UserError as error:
        parser.error(str(error))
    draw(step).savefig(arguments.output, dpi=160)


def read_step(path: Path, number: int | None) -> Step:
    """A step of a trace.

    Raises:
        UserError: the file is no trace, or the step is not in it.
    """
    lines = read_json(path).get("traceEvents", [])
    order = {line["tid"]: line["args"]["sort_index"] for line in lines if line["name"] == "thread_sort_index"}
    events = [line for line in lines if line["ph"] == "X"]
    steps = {event["args"]["step"]: event for event in events if event["cat"] == "step"}
    if not steps:
        raise UserError(f"{path}: no step was recorded")
    if number is None:
        number = max(steps)
    if number not in steps:
        raise UserError(f"{path}: no step {number}; it has {min(steps)} to {max(steps)}")
    zero, length = steps[number]["ts"], steps[number]["dur"]
    inside = [
        event
        for event in events
        if event["cat"] != "step" and event["ts"] < zero + length and event["ts"] + event["dur"] > zero
    ]
    lanes = {event["tid"]: "compute" if event["cat"] == "wait" else event["cat"] for event in inside}
    threads = sorted(lanes, key=lambda thread: order[thread])
    rows: dict[int, str] = {}
    for thread in threads:  # numbered among those that did something in this step
        alike = [other for other in threads if lanes[other] == lanes[thread] and lanes[thread] != "compute"]
        rows[thread] = f"{lanes[thread]} {alike.index(thread) + 1}" if len(alike) > 1 else lanes[thread]
    spans = [span(event, rows[event["tid"]], zero, length) for event in inside]
    return Step(number, length / 1e6, list(dict.fromkeys(rows.values())), spans)


def span(event: dict[str, Any], row: str, zero: float, length: float) -> Span:
    """An event as seen from its step, cut at the step's ends."""
    start, end = max(0.0, event["ts"] - zero), min(length, event["ts"] + event["dur"] - zero)
    return Span(row, event["cat"], event["name"], start / 1e6, end / 1e6, event["args"].get("layer"))


def draw(step: Step) -> Figure:
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "svg.hashsalt": "timeline"})
    layers = [span.layer for span in step.spans if span.layer is not None]
    norm = Normalize(0, max(layers, default=1))
    figure, axis = plt.subplots(figsize=(12, 1.5 + 0.42 * len(step.rows)), layout="constrained")
    unit, factor = ("s", 1.0) if step.seconds >= 1 else ("ms", 1e3)
    width = step.seconds * factor
    places = {row: place for place, row in enumerate(step.rows)}
    mark_phases(axis, step, factor)
    for span in sorted(step.spans, key=lambda span: span.start - span.end):  # the inner ones on top
        box = (span.start * factor, (span.end - span.start) * factor)
        color = WITHOUT_LAYER if span.layer is None else LAYERS(norm(span.layer))
        narrow = box[1] < 0.003 * width  # an edge would cover it
        looks: dict[str, Any] = {"facecolor": color, "edgecolor": "none" if narrow else "white", "linewidth": 0.5}
        if span.waits:
            looks = {"facecolor": WAITING["edgecolor"], "linewidth": 0} if narrow else WAITING
        axis.broken_barh([box], (places[span.row] - 0.36, 0.72), zorder=2, **looks)
        label = span.name if span.layer is None else str(span.layer)
        if not span.waits and box[1] > (0.004 + 0.008 * len(label)) * width:
            ink = "white" if is_dark(color) else INK
            axis.text(box[0] + box[1] / 2, places[span.row], label, ha="center", va="center", color=ink, fontsize=7.5)
    for row, place in places.items():
        spans = [span for span in step.spans if span.row == row]
        busy = covered(spans) - covered([span for span in spans if span.waits])
        axis.text(1.008 * width, place, f"{busy / step.seconds:.0%}", va="center", ha="left", color=QUIET)
    axis.text(1.008 * width, -0.75, "busy", va="center", ha="left", color=QUIET, fontsize=8)
    axis.set(xlim=(0, width), ylim=(len(step.rows) - 0.45, -0.55), yticks=range(len(step.rows)), yticklabels=step.rows)
    axis.set_xlabel(f"{unit} from the start of step {step.number}", color=QUIET)
    if any(span.waits for span in step.spans):
        patch = Patch(label="waiting", **WAITING)
        axis.legend(
            handles=[patch], loc="upper right", bbox_to_anchor=(1, -0.04), frameon=False, fontsize=8, labelcolor=QUIET
        )
    axis.tick_params(length=0)
    axis.tick_params(axis="x", colors=QUIET)
    axis.spines[:].set_visible(False)
    if layers:
        bar = figure.colorbar(ScalarMappable(norm, LAYERS), ax=axis, pad=0.045, aspect=14, shrink=0.9)
        bar.set_label("layer", color=QUIET)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, colors=QUIET)
        bar.locator = MaxNLocator(integer=True)
        bar.ax.invert_yaxis()
    return figure


def mark_phases(axis: Axes, step: Step, factor: float) -> None:
    """A tint and a name above for forward, which goes up the layers, and for backward, which begins with the head."""
    spans = sorted((s for s in step.spans if s.lane == "compute" and s.layer is not None), key=lambda s: s.start)
    head = max((span.layer or 0 for span in spans), default=0)
    turn = next((span.start for span in spans if span.layer == head), 0.0)
    phases = {"forward": [s for s in spans if s.start < turn], "backward": [s for s in spans if s.start >= turn]}
    for phase, part in phases.items():
        if part:
            start, end = factor * part[0].start, factor * part[-1].end
            axis.axvspan(start, end, color=TINTS[phase], zorder=0, lw=0)
            axis.text((start + end) / 2, -0.75, phase, ha="center", va="center", fontweight="bold")


def covered(spans: Sequence[Span]) -> float:
    """Seconds within at least one of them: spans may be nested."""
    total, reached = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return total


def is_dark(color: Any) -> bool:
    if isinstance(color, str):
        return False
    red, green, blue, _ = color
    return bool(0.299 * red + 0.587 * green + 0.114 * blue < 0.58)


if __name__ == "__main__":
    main()
