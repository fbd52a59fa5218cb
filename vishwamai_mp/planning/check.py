"""What is predicted beside what was published, row by row."""

from typing import Any

from vishwamai_mp.planning.footprint import job_footprint
from vishwamai_mp.planning.published import PublishedRun
from vishwamai_mp.planning.published_memory import peak_bytes
from vishwamai_mp.planning.stacks import KEPT


def check_rows(runs: list[PublishedRun]) -> list[dict[str, Any]]:
    """Published and predicted tokens/s and GPU (and bytes, where a row has them) with the relative error."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"row": run.number, "layout": run.label, "stack": run.machine.stack.name}
        row["assumed"] = list(run.assumed)
        if run.measured:
            rate = run.predicted_rate
            row |= {"published": run.measured, "predicted": rate, "error": rate / run.measured - 1}
        elif run.memory:
            kept = KEPT.get(run.machine.stack.name)
            need = (
                peak_bytes(run.config, run.world_size, kept)
                if kept
                else job_footprint(run.config, run.world_size).total
            )
            row |= {"published": run.memory, "predicted": need, "error": need / run.memory - 1, "unit": "bytes"}
        else:
            continue
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median and 90th percentile of the absolute errors, and how many rows there are."""
    sizes = sorted(abs(row["error"]) for row in rows)
    return {"rows": len(sizes), "median": _quantile(sizes, 0.5), "percentile_90": _quantile(sizes, 0.9)}


def _quantile(sizes: list[float], share: float) -> float:
    """Between neighbours linearly; NaN of nothing."""
    if not sizes:
        return float("nan")
    place = share * (len(sizes) - 1)
    low = int(place)
    high = min(low + 1, len(sizes) - 1)
    return sizes[low] + (sizes[high] - sizes[low]) * (place - low)


def check_text(rows: list[dict[str, Any]]) -> str:
    """A line for each row; the last has median and 90th percentile."""
    lines = [f"{'row':>4}  {'layout':72} {'published':>12} {'predicted':>12}   error"]
    for row in rows:
        scale = 2**30 if row.get("unit") == "bytes" else 1
        lines.append(
            f"{row['row']:4}  {row['layout']:72} {row['published'] / scale:12.1f}"
            f" {row['predicted'] / scale:12.1f}  {row['error']:+6.1%}"
        )
    found = summary(rows)
    lines.append(
        f"{found['rows']} rows: median absolute error {found['median']:.1%},"
        f" 90th percentile {found['percentile_90']:.1%}"
    )
    return "\n".join(lines)
