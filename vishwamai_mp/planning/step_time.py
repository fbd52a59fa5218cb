"""How long a training step takes, from shapes, data sheets and a program's constants. Nothing is run.

A micro-batch on a stage: matrix products at the rate that the program reaches, plus the time to read and write their
operands, which is what makes small ones slow; attention; operators bound by memory; traffic of tensor and context
parallelism that is not hidden. The pipeline repeats it (arXiv 2104.04473, section 2.2: its bubble is (p − 1) / v
micro-batches); then come gradients, parameters and the optimizer.

Seconds throughout. B micro-batch, S sequence, t tensor, c context, p pipeline, v chunks, d data parallel size.
"""

import math
from dataclasses import dataclass, field

from vishwamai_mp.config import (
    PretrainConfig,
    data_parallel_size,
    frozen_parts,
    micro_batches_per_step,
    padded_vocab_size,
    parts_documents,
)
from vishwamai_mp.config.layer_windows import layer_windows
from vishwamai_mp.planning.activations import key_width, number_bytes, query_width, recomputed_layers, stage_layers
from vishwamai_mp.planning.cache_costs import cache_forward_flops_per_token
from vishwamai_mp.planning.flops import mean_keys
from vishwamai_mp.planning.hardware import Gpu
from vishwamai_mp.planning.neural_memory_costs import memory_forward_flops_per_token
from vishwamai_mp.planning.parameters import mlp_matrices
from vishwamai_mp.planning.stacks import Stack, reached
from vishwamai_mp.planning.states import moment_bytes, trained_parameters


@dataclass(frozen=True)
class Machine:
    """What a job runs on and with.

    Attributes:
        format: of the linear layers' products; None: what `precision` says.
    """

    gpu: Gpu
    stack: Stack
    format: str | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause. What is hidden behind something else is not in them.

    Attributes:
        parts: matrix products, attention, …; they add up to `total`.
        micro_batches: of a step and a replica.
        stage: seconds of one micro-batch, forward and backward, on the slowest stage.
    """

    parts: dict[str, float] = field(hash=False)
    micro_batches: int
    stage: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def number_format(config: PretrainConfig) -> str:
    """Of the linear layers' products, in the names of `stacks.FORMATS`."""
    return {"fp8_mx": "mxfp8", "fp8_blockwise": "mxfp8", "nvfp4": "nvfp4"}.get(
        config.precision, "fp8" if config.precision.startswith("fp8") else _wide_format(config)
    )


def _wide_format(config: PretrainConfig) -> str:
    """Of products that no recipe rounds."""
    return "fp32" if config.precision == "fp32" else "16"


def tokens_per_second_per_gpu(config: PretrainConfig, world_size: int, time: StepTime) -> float:
    return config.training.global_batch_size * config.training.sequence_length / time.total / world_size


@dataclass(frozen=True)
class _Pass:
    """Seconds of a layer (or the head) and a micro-batch, forward plus backward, by cause."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    def __add__(self, other: "_Pass") -> "_Pass":
        return _Pass(*(getattr(self, name) + getattr(other, name) for name in _CAUSES))

    def __mul__(self, factor: float) -> "_Pass":
        return _Pass(*(getattr(self, name) * factor for name in _CAUSES))

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in _CAUSES)


_HOST_LINK = 25e9  # bytes/s between a GPU and its host while the others use theirs, one way at a time
_CAUSES = ("products", "attention", "elementwise", "tensor", "context")


def step_time(config: PretrainConfig, world_size: int, machine: Machine) -> StepTime:
    """A step of a job that runs undisturbed.

    Args:
        config: resolved, or a layout that only other programs run (`published`).
        world_size: GPUs.
    """
    parallel, stack = config.parallel, machine.stack
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    replicas, count = data_parallel_size(config, world_size), micro_batches_per_step(config, world_size)
    forward, backward = _layer(config, machine)
    head = _head(config, machine)
    layers = stage_layers(config)
    embedding = [_Pass()] * stages
    embedding[-1] = head
    stage_passes = [(forward + backward) * n + extra for n, extra in zip(layers, embedding, strict=True)]
    slowest = max(stage_passes, key=lambda one: one.total)
    mean = sum(one.total for one in stage_passes) / stages
    exposed = _between_stages(config, machine)
    parts = {
        "matrix products": slowest.products * count,
        "attention": slowest.attention * count,
        "memory-bound operators": slowest.elementwise * count,
        "tensor parallel traffic": slowest.tensor * count,
        "context parallel traffic": slowest.context * count,
        "traffic between stages": exposed * count,
        "pipeline bubble": (stages - 1) / chunks * (mean + exposed),
        "data parallel traffic": _data_parallel(config, world_size, machine, slowest.total, count),
        "optimizer": _optimizer(config, replicas, machine),
        "host": stack.step,
    }
    machines = max(world_size / machine.gpu.domain, 1.0)
    waiting = stack.jitter * math.log2(machines)
    parts["waiting for the slowest"] = waiting * sum(parts.values())
    return StepTime({name: value for name, value in parts.items() if value}, count, slowest.total)


def _layer(config: PretrainConfig, machine: Machine) -> tuple[_Pass, _Pass]:
    """Forward and backward pass of a layer and a micro-batch, what recomputation repeats in the latter."""
    model, parallel, stack = config.model, config.parallel, machine.stack
    assert model.intermediate_size is not None
    tokens, tensor = _tokens(config), parallel.tensor_model_parallel_size
    queries, keys = query_width(config), key_width(config)
    inner = mlp_matrices(model) / model.hidden_size - model.intermediate_size  # of the first product: gate and up
    kind = machine.format or number_format(config)
    shapes = [
        (model.hidden_size, (queries + 2 * keys) / tensor),
        (queries / tensor, model.hidden_size),
        (model.hidden_size, inner / tensor),
        (model.intermediate_size / tensor, model.hidden_size),
    ]
    products = sum(_product(tokens, *shape, kind, machine) for shape in shapes) + _components(config, machine)
    scores = _attention(config, machine)
    elementwise = _elementwise(config, kind, machine)
    traffic = _tensor_traffic(config, machine)
    forward = _Pass(products, scores, elementwise, 4 * traffic, _context_traffic(config, machine, scores))
    if forward.total < stack.layer:  # kernels wait for the host
        forward += _Pass(elementwise=stack.layer - forward.total)
    frozen = "base" in frozen_parts(config) or config.lora.enabled
    # Gradients of inputs and, unless frozen, of weights; fused attention multiplies five times instead of twice, others
    # four times.
    is_fused = config.precision != "fp32"
    backward = _Pass(
        products * (1 if frozen else 2),
        (2.5 if is_fused else 2) * scores,
        (1.5 if frozen else 2) * elementwise,
        4 * traffic,
        (1 if parts_documents(config) else 2) * _context_traffic(config, machine, 1.25 * scores),
    )
    match config.training.recompute:
        case "full":
            share = sum(recomputed_layers(config, count) for count in stage_layers(config)) / config.model.num_layers
            backward += forward * share
        case "selective" if stack.selective == "products":
            backward += _Pass(products / 2, 0, elementwise, 2 * traffic)
        case "selective":
            modules = config.training.recompute_modules or ["core_attn"]
            if "core_attn" in modules and not (stack.flash and is_fused):
                backward += _Pass(attention=scores)
            if "mlp" in modules:  # half of a layer's norms, residuals and exchanges are an MLP's
                mlp = sum(_product(tokens, *shape, kind, machine) for shape in shapes[2:])
                backward += _Pass(mlp, elementwise=elementwise / 2, tensor=2 * traffic)
    return forward, backward


def _attention(config: PretrainConfig, machine: Machine) -> float:
    """A layer's scores and what they weigh, forward.

    No fused kernel takes fp32: there all pairs are multiplied, outside tensor cores, and pass through memory when they
    are multiplied, masked, made weights and multiplied again, read and written.
    """
    model, stack, length = config.model, machine.stack, config.training.sequence_length
    share = _tokens(config) / config.parallel.tensor_model_parallel_size
    if config.precision == "fp32":
        operations = 4 * share * length * query_width(config) / reached(stack, machine.gpu, "vector")
        return operations + 6 * 4 * share * length * model.num_attention_heads / machine.gpu.bandwidth
    windows = layer_windows(model)
    seen = sum(mean_keys(length, window) for window in windows) / len(windows)
    scores = 4 * share * seen * query_width(config) / reached(stack, machine.gpu, "attention")
    if config.parallel.context_parallel_size > 1 and not parts_documents(config):
        scores *= stack.context_attention
    return scores


def _product(tokens: float, inputs: float, outputs: float, kind: str, machine: Machine) -> float:
    """One product: its operations at the rate that large ones reach, and its operands through memory."""
    numbers = tokens * inputs + inputs * outputs + tokens * outputs
    operations = 2 * tokens * inputs * outputs / reached(machine.stack, machine.gpu, kind)
    return operations + (4 if kind == "fp32" else 2) * numbers / machine.gpu.bandwidth


def _components(config: PretrainConfig, machine: Machine) -> float:
    """Memory and cache, spread over all layers; small products, which reach about half of what large ones do."""
    length = config.training.sequence_length
    flops = memory_forward_flops_per_token(config.memory) + cache_forward_flops_per_token(config.cache, length)
    share = config.model.num_layers * config.parallel.tensor_model_parallel_size
    return 2 * _tokens(config) * flops / share / reached(machine.stack, machine.gpu, _wide_format(config))


def _elementwise(config: PretrainConfig, kind: str, machine: Machine) -> float:
    """Norms and residuals of the width; rotary turns of queries and keys; gated units; casts and transposes for FP8."""
    model, parallel = config.model, config.parallel
    assert model.intermediate_size is not None
    tensor = parallel.tensor_model_parallel_size
    own = model.hidden_size / (tensor if parallel.sequence_parallel else 1)
    numbers = 10 * own + (2 * query_width(config) + 2 * key_width(config) + 3 * model.intermediate_size) / tensor
    if kind not in ("16", "fp32"):
        gathered = 2 * model.hidden_size + (query_width(config) + model.intermediate_size) / tensor
        numbers += 2 * gathered
    return number_bytes(config) * _tokens(config) * numbers * machine.stack.elementwise / machine.gpu.bandwidth


def _head(config: PretrainConfig, machine: Machine) -> _Pass:
    """Logits, which no recipe rounds, and the loss, which goes over them a few times in fp32."""
    rows = padded_vocab_size(config) / config.parallel.tensor_model_parallel_size
    tokens = _tokens(config)
    products = 3 * _product(tokens, config.model.hidden_size, rows, _wide_format(config), machine)
    return _Pass(products, 0, 16 * tokens * rows * machine.stack.elementwise / machine.gpu.bandwidth)


def _rate(config: PretrainConfig, machine: Machine, ranks: float, stride: float) -> float:
    """Bytes/s per GPU of a collective among `ranks`, `stride` apart: within a domain NVLink, else the network.

    Ranks of one machine use all its network cards between them.
    """
    gpu, stack = machine.gpu, machine.stack
    if ranks * stride <= gpu.domain:
        return gpu.nvlink * stack.link
    neighbours = max(gpu.domain / stride, 1)
    return min(gpu.nvlink, neighbours * gpu.network) * stack.link


def _tensor_traffic(config: PretrainConfig, machine: Machine) -> float:
    """What is not hidden of one gather or scatter of the residual stream."""
    tensor = config.parallel.tensor_model_parallel_size
    if tensor == 1:
        return 0.0
    size = number_bytes(config) * _tokens(config) * config.model.hidden_size * (tensor - 1) / tensor
    stack = machine.stack
    hidden = stack.tensor_overlap
    if config.parallel.overlap_tensor_parallel:
        hidden = max(hidden, stack.tensor_overlap_asynchronous)
    return (size / _rate(config, machine, tensor, 1) + stack.latency) * (1 - hidden)


def _context_traffic(config: PretrainConfig, machine: Machine, attention: float) -> float:
    """What is not hidden behind a layer's attention of keys and values that come from the other ranks.

    Parts of documents have them gathered before attention, and their gradients scattered after it: nothing is hidden,
    and a backward pass sends them once, where those that go round in a ring come by again with their gradients.
    """
    parallel, stack = config.parallel, machine.stack
    context = parallel.context_parallel_size
    if context == 1:
        return 0.0
    numbers = _tokens(config) * (context - 1) * 2 * key_width(config) / parallel.tensor_model_parallel_size
    size = number_bytes(config) * numbers
    rate = _rate(config, machine, context, parallel.tensor_model_parallel_size)
    if parts_documents(config):
        return size / rate + 2 * stack.latency
    time = size / rate + (context - 1) * stack.latency
    return max(time - stack.context_overlap * attention, (1 - stack.context_overlap) * time)


def _between_stages(config: PretrainConfig, machine: Machine) -> float:
    """What is not hidden of a micro-batch's way into a stage and back."""
    parallel, stack = config.parallel, machine.stack
    if parallel.pipeline_model_parallel_size == 1:
        return 0.0
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    size = number_bytes(config) * _tokens(config) * config.model.hidden_size / shards
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    # Stages lie as far apart as can be; in a domain that holds a whole replica, NVLink joins them.
    stride = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    within = stride * parallel.pipeline_model_parallel_size <= machine.gpu.domain
    rate = (machine.gpu.nvlink if within else machine.gpu.network) * stack.link
    return 2 * chunks * (size / rate + stack.latency) * (1 - stack.pipeline_overlap)


def _data_parallel(config: PretrainConfig, world_size: int, machine: Machine, stage: float, count: int) -> float:
    """What is not hidden of summing gradients and gathering parameters."""
    parallel, stack = config.parallel, machine.stack
    replicas = data_parallel_size(config, world_size) * parallel.context_parallel_size
    if replicas == 1 or stage == 0:
        return 0.0
    parameters = max(trained_parameters(config, i) for i in range(parallel.pipeline_model_parallel_size))
    share = parameters * (replicas - 1) / replicas
    rate = _rate(config, machine, replicas, parallel.tensor_model_parallel_size)
    hops = config.model.num_layers * stack.latency
    gradient = 2.0 if parallel.reduce_grads_in == "bf16" else stack.gradient_bytes
    parameter = 1.0 if config.fp8.params else stack.parameter_bytes
    gather, scatter = (share * size / rate for size in (parameter, gradient))
    if parallel.fully_sharded:  # each layer's parameters come before its forward and again before its backward pass
        each = 2 * gather + scatter + 3 * hops
        return count * max(each - stack.data_overlap * stage, (1 - stack.data_overlap) * each)
    time = gather + scatter
    hidden = min(stack.data_overlap * time, stage * (1 if parallel.overlap_grad_reduce else 0))
    return time - hidden


def _optimizer(config: PretrainConfig, replicas: int, machine: Machine) -> float:
    """AdamW reads and writes fp32 weights, moments and gradients, and writes the 16-bit weights."""
    moments = 2 * moment_bytes(config)  # read and written
    parallel = config.parallel
    parameters = max(trained_parameters(config, i) for i in range(parallel.pipeline_model_parallel_size))
    shared = parallel.use_distributed_optimizer or parallel.fully_sharded
    mine = parameters / (replicas * parallel.context_parallel_size if shared else 1)
    # The norm of all gradients, and clearing them, comes on top.
    norm = 8 * parameters / (replicas if parallel.fully_sharded else 1)
    fetched = moments * mine / _HOST_LINK if config.optimizer.moments_on_host else 0.0
    return ((18 + moments) * mine + norm) / machine.gpu.bandwidth + fetched


def _tokens(config: PretrainConfig) -> float:
    training = config.training
    return training.micro_batch_size * training.sequence_length / config.parallel.context_parallel_size
