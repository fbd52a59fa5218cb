"""Dry runs as one HTML page: memory in the course of a step, what the peak consists of, and what is exchanged."""

from typing import Any

from vishwamai_mp.observability.page import page, render
from vishwamai_mp.planning.footprint_advice import size_text

_WIDTH, _HEIGHT = 1000, 160
_STYLE = """
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; margin: 10px 0; }
.panel svg { display: block; width: 100%; height: 180px; }
.course { fill: color-mix(in srgb, var(--c0) 30%, transparent); stroke: var(--c0); }
.limit { stroke: var(--wrong); stroke-dasharray: 5 4; } .bar { display: flex; height: 20px; margin: 8px 0; }
.bar span { background: var(--key); } .key { display: inline-block; margin-right: 14px; color: var(--faint); }
.key::before { content: ''; display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px;
  background: var(--key); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); }
"""


def dry_run_page(name: str, runs: list[dict[str, Any]]) -> str:
    """One page that needs no network.

    Args:
        name: of the recipe.
        runs: a rank each, as `tools/dry_run.py --json` prints them.
    """
    title = f"Dry run: {name} on {runs[0]['world_size']:,} GPUs"
    return page(title, render("dry_run.html", title=title, runs=[_values(run) for run in runs]), _STYLE, "")


def _values(run: dict[str, Any]) -> dict[str, Any]:
    peak, predicted, course = run["peak_bytes"], run["predicted_bytes"], run["course"]
    highest = 1.05 * max(peak, predicted)
    step = _WIDTH / max(len(course) - 1, 1)
    points = [f"{i * step:.1f},{_HEIGHT * (1 - size / highest):.1f}" for i, size in enumerate(course)]
    collectives = sorted(run["collectives"], key=lambda one: -one["bytes"])
    return {
        "place": f"{run['place']} of {run['world_size']:,}, {run['layers']}'s layers",
        "notes": run["notes"],
        "facts": [
            ("parameters", f"{run['parameters']:,}"),
            ("peak memory", size_text(peak)),
            ("predicted", size_text(predicted)),
            ("operations", f"{run['flops']:.4g} FLOP in {run['launches']:,} kernels"),
            ("waits of the host", f"{sum(run['host_waits'].values()):,}"),
        ],
        "area": " ".join([f"0,{_HEIGHT}", *points, f"{_WIDTH},{_HEIGHT}"]),
        "predicted_y": round(_HEIGHT * (1 - predicted / highest), 1),
        "kinds": [
            (kind, size_text(size), round(100 * size / peak, 2), colour)
            for colour, (kind, size) in enumerate(_largest_first(run["at_peak"]))
        ],
        "modules": [(module, size_text(size)) for module, size in _largest_first(run["activations_at_peak"])],
        "collectives": [
            (one["operation"], one["group"], one["size"], f"{one['count']:,}", size_text(one["bytes"]))
            for one in collectives
        ],
    }


def _largest_first(sizes: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])
