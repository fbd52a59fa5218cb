"""What programs reach of a GPU's data sheet: one set of constants for each program and kind of GPU.

The constants were fitted to published throughput, on some of the rows; `examples/planning` says which, and how far off
the others are. A constant that no published row speaks of is the neighbour's.
"""

import difflib
from dataclasses import dataclass

from vishwamai_mp.config import UserError
from vishwamai_mp.planning.hardware import Gpu

FORMATS = ("fp32", "16", "fp8", "fp8_rowwise", "mxfp8", "nvfp4")
_BITS = {"16": "16", "fp8": "8", "fp8_rowwise": "8", "mxfp8": "8", "nvfp4": "4"}


@dataclass(frozen=True)
class Stack:
    """A program that trains.

    Attributes:
        name: as `find_stack` takes it.
        elementwise: bytes moved by norms, activations, casts and residuals, over those that must be moved.
        tensor_overlap: share of tensor parallel traffic that runs behind matrix products.
        tensor_overlap_asynchronous: the same where products are cut so that traffic runs between the pieces.
        context_overlap: share of context parallel traffic that runs behind attention.
        context_attention: times the work of attention where it goes round in pieces.
        data_overlap: share of gradient and parameter traffic that runs behind the passes.
        pipeline_overlap: share of traffic between stages that runs behind the passes.
        link: share of a link's rate that collectives reach.
        latency: of a collective, seconds.
        layer: the host's time for one layer's forward pass, seconds; kernels shorter than that wait for it.
        step: seconds of a step besides (data, logging, norms).
        jitter: share of a step lost with each doubling of the machines: the slowest is waited for.
        gradient_bytes: of a gradient on its way.
        parameter_bytes: of a gathered parameter.
        selective: what `recompute: selective` makes again: core attention, or every other matrix product.
        flash: attention keeps no scores, so there is nothing of it to make again.
    """

    name: str
    elementwise: float = 1.0
    tensor_overlap: float = 0.3
    tensor_overlap_asynchronous: float = 0.7
    context_overlap: float = 0.8
    context_attention: float = 1.0
    data_overlap: float = 0.9
    pipeline_overlap: float = 0.5
    link: float = 0.75
    latency: float = 15e-6
    layer: float = 0.4e-3
    step: float = 5e-3
    jitter: float = 0.005
    gradient_bytes: float = 4.0
    parameter_bytes: float = 2.0
    selective: str = "attention"
    flash: bool = True


@dataclass(frozen=True)
class Kept:
    """What a program keeps in memory, where it is not this one.

    Attributes:
        residual: numbers of 16 bits that a layer keeps of each token, over the residual stream's width.
        mlp: the same over the MLP's width.
        logit: bytes of a logit at the peak, its gradient and copies in other types included.
        gradient: bytes of a gradient beside its fp32 sum, where replicas sum theirs.
        reserved: bytes that the allocator has taken from the device, over those in tensors.
        libraries: bytes besides.
    """

    residual: float
    mlp: float
    logit: float
    gradient: float
    reserved: float
    libraries: float


# Shares of the peak by (stack, GPU): matrix products in a format, "attention" of the 16-bit peak.
REACHED: dict[str, dict[str, dict[str, float]]] = {
    "megatron": {
        "h100": {"16": 0.674, "fp8": 0.651, "attention": 0.593},
        "b200": {"16": 0.683, "fp8": 0.643, "mxfp8": 0.582, "attention": 0.39},
        "gb200": {"16": 0.592, "fp8": 0.63, "mxfp8": 0.588, "nvfp4": 0.432, "attention": 0.29},
        "gb300": {"16": 0.684, "fp8": 0.7, "mxfp8": 0.65, "nvfp4": 0.444, "attention": 0.721},
    },
    "nemo-2024": {
        "h100": {"16": 0.502, "fp8": 0.606, "attention": 0.385},
    },
    "torchtitan": {
        "h100-96-500w": {"16": 0.54, "fp8": 0.722, "fp8_rowwise": 0.238, "attention": 0.252},
        "h200": {"16": 0.653, "fp8": 0.55, "attention": 0.525},
    },
    "torchtitan-eager": {
        "h100-96-500w": {"16": 0.42, "attention": 0.52},
    },
    "nanotron": {
        "h100": {"16": 0.65, "attention": 0.703},
    },
    "megatron-2021": {
        "a100-80": {"16": 0.707, "attention": 0.15},
    },
    "deepspeed": {
        "a100-80": {"16": 0.7, "attention": 0.15},
    },
}
# Whose shares hold where the table has none: GPUs of the same generation.
_NEIGHBOURS = {
    "gb200": "b200",
    "gb300": "gb200",
    "b300": "gb300",
    "b200": "gb200",
    "h200": "h100",
    "h100-96-500w": "h100",
    "a100-40": "a100-80",
}
_STACKS = [
    Stack("megatron", tensor_overlap=0.495, context_attention=1.045, data_overlap=0.6478, link=0.8005, jitter=0.002),
    Stack(
        "nemo-2024",
        elementwise=1.032,
        tensor_overlap=0.375,
        data_overlap=0.9409,
        pipeline_overlap=0.428,
        link=0.85,
        latency=5e-06,
        jitter=0.01124,
    ),
    Stack(
        "torchtitan",
        elementwise=1.96,
        tensor_overlap=0.5,
        tensor_overlap_asynchronous=0.6,
        context_attention=1.36,
        data_overlap=0.6769,
        link=0.51,
        jitter=0.002,
        selective="products",
    ),
    Stack("torchtitan-eager", elementwise=2.096, data_overlap=0.9291, link=0.4, selective="products"),
    Stack(
        "nanotron",
        elementwise=1.96,
        tensor_overlap=0.285,
        data_overlap=0.0,
        pipeline_overlap=0.9,
        link=0.4,
        latency=5e-06,
        jitter=0.0284,
    ),
    Stack(
        "megatron-2021",
        elementwise=1.992,
        tensor_overlap=0.425,
        data_overlap=0.5896,
        pipeline_overlap=0.9,
        link=0.841,
        jitter=0.002,
        flash=False,
    ),
    Stack("deepspeed", elementwise=3.656, data_overlap=0.318, link=0.48, jitter=0.0284, flash=False),
]
STACKS = {stack.name: stack for stack in _STACKS}

# By stack; a program that is not here is taken to keep what this one keeps.
KEPT = {
    "nanotron": Kept(residual=16.3, mlp=3.9, logit=7.9, gradient=2.0, reserved=1.0, libraries=2.0 * 2**30),
    "torchtitan": Kept(residual=12.0, mlp=4.0, logit=11.9, gradient=0.0, reserved=1.08, libraries=1.2 * 2**30),
}
KEPT["torchtitan-eager"] = KEPT["torchtitan"]


def find_stack(name: str) -> Stack:
    """The stack of that name.

    Raises:
        UserError: there is none; the nearest name is told.
    """
    if name in STACKS:
        return STACKS[name]
    near = difflib.get_close_matches(name, STACKS, n=1, cutoff=0.3)
    raise UserError(
        f"--stack {name}: not a known one; {f'did you mean {near[0]}? ' if near else ''}known: {', '.join(STACKS)}"
    )


def reached(stack: Stack, gpu: Gpu, kind: str) -> float:
    """FLOP/s of large products.

    Args:
        kind: one of `FORMATS`, "attention", or "vector" for fp32 outside tensor cores. Where the GPU lacks the type's
            units, those of 16 bits compute. No row tells what fp32 reaches: taken to be the share of 16 bits.
    """
    table, missing = shares(stack, gpu)
    derate = gpu.derate if missing else 1.0
    if kind == "attention":
        return table["attention"] * gpu.peak["16"] * derate
    if kind in ("fp32", "vector"):
        return table["16"] * (gpu.tensor_fp32 if kind == "fp32" else gpu.vector) * derate
    bits = _BITS[kind]
    if bits in gpu.peak:
        near = REACHED[stack.name].get(_NEIGHBOURS.get(gpu.name, ""), {})
        share = table.get(kind) or near.get(kind) or table.get("fp8", table["16"])
        return share * gpu.peak[bits] * derate
    return table["16"] * gpu.peak["16"] * derate


def shares(stack: Stack, gpu: Gpu) -> tuple[dict[str, float], bool]:
    """Shares of the peak, and whether they are another GPU's for want of rows."""
    tables = REACHED[stack.name]
    if gpu.name in tables:
        return tables[gpu.name], False
    near = _NEIGHBOURS.get(gpu.name, "")
    return tables.get(near) or next(iter(tables.values())), True
