"""A search's outcome as data and as text."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import yaml

from vishwamai_mp.config import PretrainConfig
from vishwamai_mp.config.wording import count_text
from vishwamai_mp.planning.flops import training_flops_per_token
from vishwamai_mp.planning.footprint import (
    activations_host_bytes,
    inference_bytes,
    moments_host_bytes,
    saving_host_bytes,
    tree_bytes,
)
from vishwamai_mp.planning.footprint_advice import size_text
from vishwamai_mp.planning.layout_search import MOST_GPUS, Candidate, Plan
from vishwamai_mp.planning.parameters import total_parameters

_REJECTED_SHOWN = 50  # of those that lack memory, the nearest


def plan_dict(plan: Plan, top: int, tokens: float, nearest: Candidate | None) -> dict[str, Any]:
    """For JSON. Bytes, seconds, tokens/s and US dollars.

    Args:
        top: layouts that are listed.
        tokens: that are to be trained on.
        nearest: a layout on more GPUs that would fit.
    """
    return {
        "gpu": plan.machine.gpu.name,
        "gpus": plan.world_size,
        "stack": plan.machine.stack.name,
        "usable_bytes_per_gpu": plan.room,
        "best": _candidate(plan.fitting[0], plan, tokens) if plan.fitting else None,
        "layouts": [_candidate(one, plan, tokens) for one in plan.fitting[:top]],
        "fitting": len(plan.fitting),
        "too_large": len(plan.too_large),
        "rejected": [
            {
                "parallel": asdict(one.config.parallel),
                "training": asdict(one.config.training),
                "bytes_per_gpu": one.footprint.total,
                "reason": f"lacks {size_text(one.footprint.total - plan.room)} on stage {one.footprint.stage}",
            }
            for one in plan.too_large[:_REJECTED_SHOWN]
        ]
        + [{"layouts": count, "reason": reason} for reason, count in plan.refused.items()],
        "nearest_that_fits": _candidate(nearest, replace(plan, world_size=nearest.world_size), tokens)
        if nearest
        else None,
    }


def budget(candidate: Candidate, plan: Plan, tokens: float) -> tuple[float, float]:
    """Seconds and dollars until `tokens` are trained on, without interruptions."""
    seconds = tokens / (candidate.rate * candidate.world_size)
    return seconds, seconds / 3600 * candidate.world_size * plan.machine.gpu.dollars


def _candidate(one: Candidate, plan: Plan, tokens: float) -> dict[str, Any]:
    assert one.time is not None
    seconds, dollars = budget(one, plan, tokens)
    return {
        "gpus": one.world_size,
        "precision": one.config.precision,
        "parallel": asdict(one.config.parallel),
        "training": asdict(one.config.training),
        "tokens_per_second_per_gpu": one.rate,
        "step_seconds": one.time.total,
        "mfu": mfu(one, plan),
        "bytes_per_gpu": one.footprint.total,
        "memory": one.footprint.parts,
        "time": one.time.parts,
        "budget": {"tokens": tokens, "seconds": seconds, "dollars": dollars},
    }


def mfu(one: Candidate, plan: Plan) -> float:
    """Share of the 16-bit peak that the model's own operations take."""
    return one.rate * training_flops_per_token(one.config) / plan.machine.gpu.peak["16"]


def plan_text(plan: Plan, config: PretrainConfig, top: int, tokens: float, nearest: Candidate | None) -> str:
    """A table of the fastest layouts, or what is missing."""
    gpu = plan.machine.gpu
    lines = [
        f"{count_text(total_parameters(config))} parameters on {plan.world_size} × {gpu.title}"
        f" ({size_text(plan.room)} usable each), program: {plan.machine.stack.name}",
        f"layouts: {len(plan.fitting)} fit, {len(plan.too_large)} need more memory,"
        f" {sum(plan.refused.values())} are not possible",
    ]
    if not plan.fitting:
        return "\n".join([*lines, *_missing(plan, nearest)])
    lines.append("")
    lines.append(
        "tokens/s/GPU   step s  MFU %  GiB/GPU  free %  tensor  pipeline  chunks  context  data  micro  recompute"
        "  precision"
    )
    for one in plan.fitting[:top]:
        assert one.time is not None
        parallel, training = one.config.parallel, one.config.training
        sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
        context = parallel.context_parallel_size
        data = one.world_size // (sizes[0] * sizes[1] * context)
        lines.append(
            f"{one.rate:12.1f} {one.time.total:8.2f} {100 * mfu(one, plan):6.1f}"
            f" {one.footprint.total / 2**30:8.1f} {100 * (1 - one.footprint.total / gpu.memory):7.0f}"
            f" {sizes[0]:7} {sizes[1]:9} {parallel.virtual_pipeline_model_parallel_size or 1:7} {context:8}"
            f" {f'{data}, FSDP' if parallel.fully_sharded else data:>5} {training.micro_batch_size:6}"
            f"  {training.recompute:9}  {one.config.precision}"
        )
    seconds, dollars = budget(plan.fitting[0], plan, tokens)
    lines += [
        "",
        f"{count_text(tokens)} tokens with the first: {seconds / 86400:,.1f} days without interruptions,"
        f" {dollars:,.0f} $ at {gpu.dollars} $ per GPU and hour",
    ]
    return "\n".join(lines)


def _missing(plan: Plan, nearest: Candidate | None) -> list[str]:
    lines = []
    if plan.too_large:
        least = plan.too_large[0]
        lines += [
            f"nothing fits: the smallest layout ({least.label}) needs {size_text(least.footprint.total)} per GPU,"
            f" {size_text(least.footprint.total - plan.room)} more than there is:",
            *_parts(least.footprint.parts, size_text),
        ]
    else:
        lines.append("no layout is possible:")
        lines += [f"  {reason}" for reason in list(plan.refused)[:5]]
    if nearest:
        lines.append(
            f"the nearest that fits: {nearest.world_size} GPUs, {nearest.label}, global batch"
            f" {nearest.config.training.global_batch_size}, {size_text(nearest.footprint.total)} per GPU"
        )
    else:
        lines.append(f"no power of two up to {MOST_GPUS:,} GPUs holds it: use a smaller model or sequence length")
    return lines


def explanation(plan: Plan) -> str:
    """Memory and time of the best layout broken down; what else the model will ask for."""
    best = plan.fitting[0]
    assert best.time is not None
    config = best.config
    stages = range(config.parallel.pipeline_model_parallel_size)
    saving, moments, offloaded = (
        max(host_bytes(config, best.world_size, stage) for stage in stages)
        for host_bytes in (saving_host_bytes, moments_host_bytes, activations_host_bytes)
    )
    answers = inference_bytes(config, config.training.sequence_length, 1)
    lines = [
        f"the first, {best.label}:",
        f"memory of a rank of stage {best.footprint.stage}, which needs most: {size_text(best.footprint.total)}",
        *_parts(best.footprint.parts, size_text),
        f"a step of {best.time.micro_batches} micro-batches: {best.time.total:.3f} s; not hidden behind other things:",
        *_parts(best.time.parts, lambda seconds: f"{seconds:.3f} s"),
        *([f"the host's memory of moments: {size_text(moments)} per rank, at all times"] if moments else []),
        *([f"the host's memory of activations: {size_text(offloaded)} per rank"] if offloaded else []),
        f"the host's memory of a save: {size_text(saving)} per rank",
        f"a text of {config.training.sequence_length} tokens on one replica, per GPU:",
        *_parts(answers, size_text),
    ]
    if config.tree.enabled:
        lines += ["a tree search from half as long a prompt:"]
        lines += _parts(tree_bytes(config, config.training.sequence_length // 2), size_text)
    return "\n".join(lines)


def _parts(parts: Mapping[str, float], text: Any) -> list[str]:
    whole = sum(parts.values()) or 1.0
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return [f"  {name:26} {text(value):>12}  {value / whole:6.1%}" for name, value in ordered if value]


def recipe(config: PretrainConfig, best: Candidate) -> str:
    """A recipe that trains `config` as `best` lays it out: what differs from the defaults."""
    training = replace(
        config.training,
        micro_batch_size=best.config.training.micro_batch_size,
        recompute=best.config.training.recompute,
        global_batch_size=best.config.training.global_batch_size,
    )
    laid_out = replace(config, parallel=best.config.parallel, training=training, precision=best.config.precision)
    return yaml.safe_dump(_differences(laid_out, PretrainConfig()), sort_keys=False, allow_unicode=True)


def _differences(config: Any, default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(config):
        value, usual = getattr(config, item.name), getattr(default, item.name)
        if value == usual:
            continue
        nested = is_dataclass(value) and is_dataclass(usual)
        found[item.name] = _differences(value, usual) if nested else asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
    return found
