"""Curves over load, as PNG or SVG, for `xlane bench serve --plot`. Needs matplotlib, which is the extra `plot`.

Knows names and numbers; not what was measured nor how.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .bench_report import Result
from .options import UsageError

KINDS = (".png", ".svg")
COLOURS = ("#0b6e4f", "#d1495b", "#30638e", "#edae49", "#6a4c93", "#555555")
"""Told apart on a light ground, also by those who see few colours."""
MARKERS = "osD^vP"


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the small diagrams."""

    title: str
    unit: str
    curves: Mapping[str, Sequence[float]]
    """Name -> a value for each load."""


def check_plot(path: str) -> None:
    """Refuse, before anything is measured, what could not be drawn afterwards. Raises UsageError."""
    if Path(path).suffix not in KINDS:
        raise UsageError(f"--plot {path}: expected a name that ends in {' or '.join(KINDS)}")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such directory")
    if find_spec("matplotlib") is None:
        raise UsageError(f"--plot {path} needs matplotlib: pip install 'xlane[plot]'")


def panels_of(results: Sequence[Result]) -> list[Panel]:
    """What one server did: throughput, and percentiles of what its users felt."""
    done = {"all complete answers": [run.requests_per_s for run in results]}
    if any(run.within_slo is not None for run in results):
        done["within the SLO"] = [run.goodput_requests_per_s or 0.0 for run in results]
    panels = [
        Panel("Output tokens", "tokens/s", {"": [run.output_tokens_per_s for run in results]}),
        Panel("Requests", "requests/s", done),
    ]
    for title, name in (
        ("Time to first token", "ttft_ms"),
        ("Time between tokens", "itl_ms"),
        ("Time per token of a request", "tpot_ms"),
        ("Time to the complete answer", "e2e_ms"),
    ):
        spreads = [getattr(run, name) for run in results]
        curves = {share: [getattr(spread, share) for spread in spreads] for share in ("p50", "p90", "p99")}
        panels.append(Panel(title, "ms", curves))
    return panels


def draw(path: str, title: str, axis: str, loads: Sequence[str], panels: Sequence[Panel]) -> None:
    """Write a figure of all panels; `loads` are the ticks below each, `axis` says what they are."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    # The same numbers make the same file, so that a plot in a repository changes only when they do.
    with matplotlib.rc_context({"svg.hashsalt": "xlane", "font.size": 10}):
        figure = Figure(figsize=(4.2 * columns, 3.1 * rows + 0.6), facecolor="white", layout="constrained")
        figure.suptitle(title, fontsize=12)
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            for (name, values), colour, marker in zip(panel.curves.items(), COLOURS, MARKERS):
                axes.plot(range(len(loads)), values, color=colour, marker=marker, markersize=5, label=name)
            axes.set_title(panel.title, fontsize=11)
            axes.set_ylabel(panel.unit)
            axes.set_xlabel(axis)
            axes.set_xticks(range(len(loads)), loads)
            # Of a load that was not measured there is no number (NaN), and no mark.
            known = [v for values in panel.curves.values() for v in values if not math.isnan(v)]
            most = max(known, default=0.0)
            axes.set_ylim(0, 1.08 * most or 1)
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if any(panel.curves):
                axes.legend(frameon=False, fontsize=9)
        metadata = {"Date": None} if path.endswith(".svg") else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)
