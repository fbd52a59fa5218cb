"""A plan as one HTML page: stacked memory of each stage, the pipeline's timeline, throughput over GPU counts."""

from typing import Any

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.wording import count_text, counted
from vishwamai_mp.observability.page import page, render
from vishwamai_mp.planning.footprint import Footprint, stage_footprint
from vishwamai_mp.planning.footprint_advice import size_text
from vishwamai_mp.planning.layout_search import Candidate, Plan, search
from vishwamai_mp.planning.plan_text import budget, mfu

_ROWS, _REJECTED, _STAGES, _PASSES = 12, 40, 16, 8  # shown at most
_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; } .card span { color: var(--faint); }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; }
.panel svg { display: block; width: 100%; height: auto; max-height: 520px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--faint); } svg .value { fill: var(--ink); }
[data-tip]:hover { filter: brightness(1.15); } .limit { stroke: var(--wrong); stroke-dasharray: 5 4; }
.keys { margin: 8px 0 0; } .key { display: inline-block; margin-right: 14px; color: var(--faint); }
.key::before { content: ''; display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px;
  background: var(--key); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--faint); } td.text, th.text { text-align: left; white-space: normal; }
tr.best td { background: color-mix(in srgb, var(--best) 12%, transparent); } .wrong { color: var(--wrong); }
"""
_SCRIPT = """
document.addEventListener('pointermove', event => {
  const part = event.target.closest?.('[data-tip]');
  part ? showTip(event.clientX, event.clientY, part.dataset.tip) : hideTip();
});
"""


def plan_page(plan: Plan, config: PretrainConfig, tokens: float, nearest: Candidate | None) -> str:
    """One page that needs no network.

    Args:
        config: the recipe that was planned, for other GPU counts.
        tokens: to be trained on.
        nearest: what would fit on more GPUs, where nothing does here.
    """
    title = f"Plan: {plan.world_size:,} × {plan.machine.gpu.title}"
    best = plan.fitting[0] if plan.fitting else None
    values: dict[str, Any] = {
        "title": title,
        "facts": f"Layouts: {len(plan.fitting):,} fit, {len(plan.too_large):,} need more memory,"
        f" {sum(plan.refused.values()):,} are not possible.",
        "cards": _cards(plan, best, tokens) if best else [],
        "missing": _missing(plan, nearest) if best is None else "",
        "memory": _memory(plan, best or (plan.too_large[0] if plan.too_large else None)),
        "time": _bars(best.time.parts) if best and best.time else [],
        "timeline": _timeline(best) if best else None,
        "scaling": _scaling(plan, config) if best else None,
        "layouts": [_row(one, plan) for one in plan.fitting[:_ROWS]],
        "rejected": _rejected(plan),
    }
    return page(title, render("plan.html", **values), _STYLE, _SCRIPT)


def _cards(plan: Plan, best: Candidate, tokens: float) -> list[tuple[str, str]]:
    assert best.time is not None
    seconds, dollars = budget(best, plan, tokens)
    return [
        (f"{best.rate:,.0f}", "tokens/s per GPU"),
        (f"{best.time.total:.3g} s", "a step"),
        (f"{mfu(best, plan):.1%}", "MFU"),
        (size_text(best.footprint.total), f"of {size_text(plan.machine.gpu.memory)} per GPU"),
        (f"{seconds / 86400:,.1f} days", f"for {count_text(tokens)} tokens"),
        (f"${dollars:,.0f}", f"at ${plan.machine.gpu.dollars} per GPU hour"),
    ]


def _missing(plan: Plan, nearest: Candidate | None) -> str:
    text = "Nothing fits."
    if plan.too_large:
        lack = plan.too_large[0].footprint.total - plan.room
        text += f" The smallest layout lacks {size_text(lack)} per GPU."
    if nearest:
        text += f" The nearest that fits: {nearest.world_size:,} GPUs, {nearest.label}."
    return text


def _memory(plan: Plan, one: Candidate | None) -> dict[str, Any] | None:
    """Bars of the stages; many stages are thinned."""
    if one is None:
        return None
    stages = one.config.parallel.pipeline_model_parallel_size
    shown = sorted({round(i * (stages - 1) / max(min(stages, _STAGES) - 1, 1)) for i in range(min(stages, _STAGES))})
    prints = [stage_footprint(one.config, one.world_size, stage) for stage in shown]
    names = list(dict.fromkeys(name for one_print in prints for name in one_print.parts))
    longest = max(plan.machine.gpu.memory, *(one_print.total for one_print in prints))
    scale = 760 / longest
    return {
        "label": one.label,
        "height": 26 * len(prints) + 24,
        "limit": 90 + plan.machine.gpu.memory * scale,
        "limit_text": size_text(plan.machine.gpu.memory),
        "rows": [_stack(one_print, names, scale, 26 * i) for i, one_print in enumerate(prints)],
        "keys": [(name, i % 8) for i, name in enumerate(names)],
    }


def _stack(one: Footprint, names: list[str], scale: float, top: float) -> dict[str, Any]:
    parts, left = [], 90.0
    for i, name in enumerate(names):
        size = one.parts.get(name, 0.0)
        tip = f"stage {one.stage}, {name}: {size_text(size)}"
        parts.append({"x": left, "width": size * scale, "colour": i % 8, "tip": tip})
        left += size * scale
    return {"y": top, "name": f"stage {one.stage}", "parts": parts, "end": left + 6, "total": size_text(one.total)}


def _bars(parts: dict[str, float]) -> list[dict[str, Any]]:
    whole = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return [
        {"y": 22 * i, "name": name, "width": 560 * value / whole, "text": f"{value:.3g} s, {value / whole:.1%}"}
        for i, (name, value) in enumerate(ordered)
    ]


def _timeline(best: Candidate) -> dict[str, Any] | None:
    """One forward, one backward of few micro-batches: how the pipeline fills and drains (without its chunks)."""
    stages = best.config.parallel.pipeline_model_parallel_size
    assert best.time is not None
    if stages == 1 or stages > _STAGES:
        return None
    count = min(best.time.micro_batches, max(_PASSES, stages))
    boxes, end = schedule(stages, count)
    scale = 820 / end
    return {
        "height": 22 * stages + 4,
        "stages": [(f"stage {stage}", 22 * stage + 14) for stage in range(stages)],
        "note": f"{count} of {best.time.micro_batches} micro-batches; a backward pass takes twice a forward pass."
        + (" Chunks shorten the bubble further." if best.config.parallel.virtual_pipeline_model_parallel_size else ""),
        "boxes": [
            {
                "x": 60 + start * scale,
                "y": 22 * stage,
                "width": length * scale - 1,
                "colour": 0 if length == 1 else 2,
                "tip": f"stage {stage}: {'forward' if length == 1 else 'backward'} pass of micro-batch {number}",
            }
            for stage, number, start, length in boxes
        ],
    }


def schedule(stages: int, count: int) -> tuple[list[tuple[int, int, float, float]], float]:
    """1F1B (arXiv 2104.04473, figure 4): stage, micro-batch, start and length of each pass; and the end of it all."""
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, count)
        order = [("F", i) for i in range(ahead)]
        for i in range(count - ahead):
            order += [("F", ahead + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(count - ahead, count)])
    done: dict[tuple[str, int, int], float] = {}
    free, boxes = [0.0] * stages, []
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, number = order[0]
            before = stage - 1 if kind == "F" else stage + 1
            needs = (kind, number, before) if 0 <= before < stages else ("F", number, stage)
            if needs not in done and not (kind == "F" and before < 0):
                continue
            start, length = max(free[stage], done.get(needs, 0.0)), 1.0 if kind == "F" else 2.0
            free[stage] = done[kind, number, stage] = start + length
            boxes.append((stage, number, start, length))
            order.pop(0)
    return boxes, max(free)


def _scaling(plan: Plan, config: PretrainConfig) -> dict[str, Any] | None:
    """The best layout's throughput on other numbers of GPUs, the global batch as it is."""
    points = []
    for shift in (-3, -2, -1, 0, 1, 2, 3):
        count = plan.world_size << shift if shift > 0 else plan.world_size >> -shift
        if count < 1 or (shift < 0 and count << -shift != plan.world_size):
            continue
        fitting = plan.fitting if shift == 0 else search(config, count, plan.machine).fitting
        if fitting:
            points.append((count, fitting[0]))
    if len(points) < 2:
        return None
    highest = max(one.rate for _, one in points)
    width = 800 / len(points)
    return {
        "bars": [
            {
                "x": 40 + i * width,
                "y": 170 - 140 * one.rate / highest,
                "width": width * 0.7,
                "height": 140 * one.rate / highest,
                "count": f"{count:,}",
                "rate": f"{one.rate:,.0f}",
                "here": count == plan.world_size,
                "tip": f"{count:,} GPUs: {one.rate * count:,.0f} tokens/s in all\n{one.label}",
            }
            for i, (count, one) in enumerate(points)
        ]
    }


def _row(one: Candidate, plan: Plan) -> list[str]:
    assert one.time is not None
    return [
        f"{one.rate:,.1f}",
        f"{one.time.total:.3g} s",
        f"{mfu(one, plan):.1%}",
        size_text(one.footprint.total),
        f"{1 - one.footprint.total / plan.machine.gpu.memory:.0%}",
        one.label,
    ]


def _rejected(plan: Plan) -> list[tuple[str, str]]:
    lacking = [
        (one.label, f"lacks {size_text(one.footprint.total - plan.room)} of memory")
        for one in plan.too_large[:_REJECTED]
    ]
    return [(counted(count, "layout", ","), reason) for reason, count in plan.refused.items()] + lacking
