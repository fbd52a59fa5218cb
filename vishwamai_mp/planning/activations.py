"""Memory of activations: what a rank keeps of a forward pass for the backward pass. A test counts what is really kept.

After Korthikanti et al. (arXiv 2205.05198, sections 4 and 5) for this model: gated MLP, grouped queries, no biases, and
an attention that never has all scores at once, but for a GPU's in fp32. Memory and cache are in
`component_activations`. What is wide as the heads or as the MLP is divided over tensor parallel ranks; the residual
stream is so under sequence parallelism only.
"""

from collections import Counter
from dataclasses import dataclass, replace

from vishwamai_mp.config import (
    ConfigError,
    PretrainConfig,
    frozen_parts,
    layers_per_stage,
    padded_vocab_size,
    parts_documents,
)
from vishwamai_mp.config.resolve_fp8 import rounds_operands
from vishwamai_mp.config.resolve_rotary import layer_is_turned
from vishwamai_mp.planning.component_activations import component_activations, components_on_stage

_QUERIES = 64  # that a CPU's attention takes at a time
_LONGEST = 2048  # queries up to which it keeps its weights
# Bytes of logits that a GPU turns into their gradient at a time, in fp32 (`runtime.device.row_blocks`).
_LOSS_BLOCK = 2**28

# Of a number and its part of a block's scale, where they are not one byte and next to nothing: 16 share an E4M3 scale.
QUANTIZED = {"nvfp4": 1 / 2 + 1 / 16}


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one micro-batch in one layer.

    Attributes:
        kept: what lies there from the forward pass to the backward pass.
        again: what is there besides while the layer's backward pass runs: what recomputation makes anew and, on a GPU,
            gradients and gathered sequences.
    """

    kept: float
    again: float


def layer_activations(config: PretrainConfig, on_gpu: bool) -> LayerActivations:
    """Of one transformer layer that `training.recompute`, as it is set, applies to.

    Args:
        config: resolved.
        on_gpu: Transformer Engine's attention keeps no weights, but in fp32; a CPU's keeps them of short sequences.
    """
    tokens, size = tokens_of_micro_batch(config), number_bytes(config)
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    assert model.intermediate_size is not None
    width = model.hidden_size / _sequence_shards(config)
    # Inputs of norms and of linears after them; gate, up and their product; of dropout the masks, which CPUs keep as
    # numbers.
    norms = 4 if model.norm_position == "sandwich" else 2
    linears = tokens * size * ((norms + 2) * width + 3 * model.intermediate_size / tensor)
    if model.hidden_dropout:
        linears += 2 * tokens * width * (1 if on_gpu else size)
    if on_gpu and "base" in frozen_parts(config):
        linears += tokens * _of_frozen_linears(config, width)
    output = tokens * size * query_width(config) / tensor
    working = _working(config) if on_gpu else 0.0
    spent = tokens * size * (3 * model.intermediate_size / tensor + width)  # by an MLP, whose backward pass comes first
    match config.training.recompute:
        case "none":
            again = max(working, _attention_working(config, on_gpu, spent))
            return LayerActivations(linears + output + _attention(config, on_gpu), again)
        case "selective":
            modules = config.training.recompute_modules or ["core_attn"]
            # Nobody has copied the values: on GPUs too the projection stays.
            attention = _inputs(config, on_gpu=False) if "core_attn" in modules else _attention(config, on_gpu)
            attention_again = _attention(config, on_gpu) if "core_attn" in modules else 0.0
            mlp = 0.0
            if "mlp" in modules:  # its input stays; on GPUs a norm before is a part of it
                normed = width if on_gpu and model.norm_position != "post" else 0
                mlp = tokens * size * (3 * model.intermediate_size / tensor + normed)
            attention_again += _attention_working(config, on_gpu, spent - mlp)
            again = max(attention_again, mlp + working)
            return LayerActivations(linears - mlp + output + attention, again)
        case _:
            again = linears + output + _attention(config, on_gpu)
            again += max(working, _attention_working(config, on_gpu, spent))
            return LayerActivations(tokens * size * width, again)


def _of_frozen_linears(config: PretrainConfig, width: float) -> float:
    """Bytes for each token that a frozen layer keeps more than one that is trained, or less.

    The inputs of linear layers are needed by adapters alone. Norms within adapted layers are computed once more for
    these, and keep their input in fp32.
    """
    model, size = config.model, number_bytes(config)
    assert model.intermediate_size is not None
    adapted = set(config.lora.targets) if config.lora.enabled else set()
    more = (
        0.0 if "linear_fc2" in adapted else -size * model.intermediate_size / config.parallel.tensor_model_parallel_size
    )
    if model.norm_position != "post":
        for target in ("linear_qkv", "linear_fc1"):
            more += width * ((4 if size == 2 else 0) if target in adapted else -size)
    return more


def _working(config: PretrainConfig) -> float:
    """What the backward pass of an MLP, the first of its layer, holds more than the forward pass left, on a GPU.

    Either of the second product: the gradients of what it multiplied, of its weights and of the residual stream. Or of
    the first: those of gate and up, whose values and product are gone, of its input and weights. Under sequence
    parallelism a product's wide side is gathered; the gradient of its input is whole until it is scattered.
    """
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    assert model.intermediate_size is not None
    size, shards = number_bytes(config), _sequence_shards(config)
    rows = tokens_of_micro_batch(config) * size
    whole, wide = rows * model.hidden_size, rows * model.intermediate_size / tensor
    # Fully sharded ranks' gradients of weights are counted with the layer that is gathered; others add theirs at once.
    alone = config.parallel.fully_sharded or config.parallel.fuse_grad_accumulation
    weights = 0.0 if alone else size * model.intermediate_size * model.hidden_size / tensor
    gathered, residual = (whole, whole / shards) if shards > 1 else (0.0, whole)
    second = gathered + wide + weights + residual
    rounded = rounds_operands(config.precision)
    quantized = 2 * wide * QUANTIZED.get(config.precision, 1.0) if rounded else 0.0  # gradients of gate and up, twice
    first = gathered - wide + quantized + whole + 2 * weights + residual + (residual if shards > 1 else 0)
    return max(first, second)


@dataclass(frozen=True)
class StageActivations:
    """Most bytes of activations on one rank of a pipeline stage.

    Attributes:
        kept: of all micro-batches that wait for their backward pass.
        again: of the layer whose backward pass runs first, beside what was kept, as `LayerActivations` has it.
        head: of the last norm and the logits, when `again` is not there yet; none before the last stage.
        passed: of `kept`, what is gone when the backward pass comes to a layer that is recomputed, or was offloaded;
            none where all are.
        remade: `again` of that layer, with what comes back.
        pools: what CUDA graphs hold beside `kept`, and all of which they never give back: for each micro-batch that
            waits, room for `again`, and hidden states and a gradient where the graphs find them.
    """

    kept: float
    again: float
    head: float
    passed: float
    remade: float
    pools: float = 0.0

    @property
    def total(self) -> float:
        if self.pools:
            return self.kept + self.pools + self.head
        return self.kept + max(self.again, self.head, self.remade - self.passed)

    def beside(self, copies: float) -> float:
        """The most there is, when the optimizer's step makes `copies` after the backward passes."""
        return max(self.total, copies + (self.kept + self.pools if self.pools else 0))


def stage_activations(config: PretrainConfig, stage: int, micro_batches: int, on_gpu: bool) -> StageActivations:
    """Of the ranks of one pipeline stage.

    Args:
        config: resolved.
        stage: from 0.
        micro_batches: of a step. A stage keeps those that are on their way through the later stages (1F1B).
        on_gpu: as `layer_activations` has it.
    """
    layer, layers = layer_activations(config, on_gpu), config.training.recompute_layers
    stages = config.parallel.pipeline_model_parallel_size
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    per_stage = stage_layers(config)
    remade, tokens = layer.again, tokens_of_micro_batch(config)
    whole, rest = layer, 0  # what a layer that is not recomputed keeps, and how many a chunk has of them
    if layers is not None:
        rest = max(per_stage[stage] // chunks - layers, 0)
        whole = layer_activations(replace(config, training=replace(config.training, recompute="none")), on_gpu)
    offloaded = config.training.offload_layers
    if offloaded:  # of the rest as above; of the others, whose activations come back, two layers' at a time
        rest = max(per_stage[stage] // chunks - offloaded, 0)
        remade += min(2, offloaded) * layer.kept
        layer = replace(layer, kept=0.0)
    kept = per_stage[stage] * layer.kept + chunks * (rest * (whole.kept - layer.kept) + _between_layers(config, stages))
    passed = rest * whole.kept
    carried: Counter[int] = Counter()  # bytes of components by layer
    for section in ("memory", "cache"):
        options = getattr(config, section)
        here = components_on_stage(config, options.layers, per_stage, stage) if options.enabled else 0
        if here:
            one = tokens * component_activations(config, section, on_gpu)
            # What fully sharded ranks gather of components is not counted apart: both stand for it, as if in one layer.
            carried.update({0: one} if config.parallel.fully_sharded else dict.fromkeys(options.layers, one))
            if config.training.recompute == "full":
                here -= components_on_stage(config, options.layers, per_stage, stage, layers)
            if offloaded:
                here -= components_on_stage(config, options.layers, per_stage, stage, offloaded)
            kept += here * one
            passed += here / chunks * one
    if config.training.recompute == "full" or offloaded:
        remade += max(carried.values(), default=0.0)  # of the one layer that is made again
    head, buffer = (_head(config, on_gpu), _gathered_for_head(config, on_gpu)) if stage == stages - 1 else (0.0, 0.0)
    underway, pools = micro_batches_underway(config, stage, micro_batches), 0.0
    if config.training.cuda_graphs:
        places = _graph_places(config, stage, micro_batches)
        hidden = tokens * number_bytes(config) * config.model.hidden_size / _sequence_shards(config)
        underway, pools = places / chunks, places * (layer.again + 2 * hidden)
    kept = underway * kept + buffer
    return StageActivations(kept, whole.again if rest else remade, head, passed if rest else 0.0, remade, pools)


def micro_batches_underway(config: PretrainConfig, stage: int, micro_batches: int) -> float:
    """Forward passes through a whole stage that wait for their backward pass, at the most.

    Args:
        config: resolved.
        stage: from 0.
        micro_batches: of a step.
    """
    stages = config.parallel.pipeline_model_parallel_size
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if chunks:  # the interleaved schedule starts more of them (section 4.2.3), in passes through single chunks
        return min((2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks, micro_batches)
    return min(stages - stage, micro_batches)


def _graph_places(config: PretrainConfig, stage: int, micro_batches: int) -> float:
    """Passes through a chunk that CUDA graphs are captured for: for each chunk the most that wait at a time.

    The interleaved schedule is at the most of one chunk and of another at different times; graphs keep their memory.
    """
    stages = config.parallel.pipeline_model_parallel_size
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if not chunks:
        return micro_batches_underway(config, stage, micro_batches)
    early, waiting, most = 2 * (stages - stage - 1) + (chunks - 1) * stages, Counter[int](), Counter[int]()
    for number in range(chunks * micro_batches):
        chunk = number // stages % chunks
        waiting[chunk] += 1
        most[chunk] = max(most[chunk], waiting[chunk])
        if number >= early:
            waiting[chunks - 1 - (number - early) // stages % chunks] -= 1
    return most.total()


def _between_layers(config: PretrainConfig, stages: int) -> float:
    """Of a micro-batch in a chunk: what went to the next stage, and the angles that recomputed layers share (fp32)."""
    sent = tokens_of_micro_batch(config) * number_bytes(config) * config.model.hidden_size / _sequence_shards(config)
    assert config.model.head_dim is not None
    own = config.training.sequence_length // config.parallel.context_parallel_size
    kinds = 2 if config.model.window_rope_theta else 1
    angles = 4 * own * config.model.head_dim * kinds if config.training.recompute == "full" else 0
    return (sent if stages > 1 else 0) + angles


def stage_layers(config: PretrainConfig) -> list[int]:
    """Layers on each stage; where they do not divide, as programs deal them that count both tables as a layer each."""
    try:
        return layers_per_stage(config)
    except ConfigError:
        stages = config.parallel.pipeline_model_parallel_size
        each, more = divmod(config.model.num_layers + 2, stages)
        dealt = [each + (stage < more) for stage in range(stages)]
        dealt[0], dealt[-1] = dealt[0] - 1, dealt[-1] - 1
        return dealt


def recomputed_layers(config: PretrainConfig, on_stage: int) -> int:
    """How many of a stage's layers `training.recompute=full` applies to."""
    chunks, first = config.parallel.virtual_pipeline_model_parallel_size or 1, config.training.recompute_layers
    if config.training.recompute != "full":
        return 0
    return on_stage if first is None else min(first, on_stage // chunks) * chunks


def number_bytes(config: PretrainConfig) -> int:
    """Of an activation."""
    return 4 if config.precision == "fp32" else 2


def tokens_of_micro_batch(config: PretrainConfig) -> int:
    """On one context parallel rank."""
    training = config.training
    return training.micro_batch_size * training.sequence_length // config.parallel.context_parallel_size


def _sequence_shards(config: PretrainConfig) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1


def query_width(config: PretrainConfig) -> int:
    """Of all heads' queries together."""
    assert config.model.head_dim is not None
    return config.model.num_attention_heads * config.model.head_dim


def key_width(config: PretrainConfig) -> int:
    """Of all heads' keys together; values are as wide."""
    assert config.model.head_dim is not None
    assert config.model.num_key_value_heads is not None
    return config.model.num_key_value_heads * config.model.head_dim


def _inputs(config: PretrainConfig, on_gpu: bool) -> float:
    """Queries and keys, turned by position, and values: on CPUs with all of the projection that they are a part of.

    Transformer Engine copies the values, so that the projection need not stay. Where nothing is turned, CPUs copy the
    queries of groups alone; the average over layers stands for each.
    """
    queries, keys, model = query_width(config), key_width(config), config.model
    numbers = float(queries + 2 * keys)
    if not on_gpu:
        turned = sum(layer_is_turned(model, layer) for layer in range(model.num_layers)) / model.num_layers
        numbers += turned * (queries + keys) + (1 - turned) * (queries if queries != keys else 0)
    return tokens_of_micro_batch(config) * numbers * number_bytes(config) / config.parallel.tensor_model_parallel_size


def _keeps_weights(config: PretrainConfig, on_gpu: bool) -> bool:
    """Whether a GPU's attention keeps the weights of all pairs: in fp32, which no fused kernel takes."""
    return on_gpu and config.precision == "fp32"


def _weights(config: PretrainConfig) -> float:
    """Of all pairs of a GPU's heads, in fp32."""
    training = config.training
    heads = config.model.num_attention_heads / config.parallel.tensor_model_parallel_size
    return 4 * training.micro_batch_size * heads * training.sequence_length**2


def _copies_of_weights(config: PretrainConfig) -> tuple[float, float]:
    """How many are kept, and how many more attention's backward pass has at a time.

    Kept are those after softmax; also after dropout, and its mask, or without the places behind a document's end.
    """
    packed = config.data.reset_attention_mask
    if config.model.attention_dropout:
        return 2.25, 2.25 if packed else 1.75
    return (2, 2) if packed else (1, 3)


def _attention_working(config: PretrainConfig, on_gpu: bool, spent: float) -> float:
    """What the backward pass of an attention that keeps weights holds more than the layer's forward pass left.

    Args:
        spent: bytes of its layer that are free again by then.
    """
    return _copies_of_weights(config)[1] * _weights(config) - spent if _keeps_weights(config, on_gpu) else 0.0


def _attention_with_weights(config: PretrainConfig) -> float:
    """Transformer Engine's attention that keeps weights, its mask, and keys and values once for each query head."""
    repeated = 2 * (query_width(config) - key_width(config)) * number_bytes(config)
    copied = tokens_of_micro_batch(config) * repeated / config.parallel.tensor_model_parallel_size
    weights = _copies_of_weights(config)[0] * _weights(config)
    return _inputs(config, on_gpu=True) + copied + weights + config.training.sequence_length**2


def _attention(config: PretrainConfig, on_gpu: bool) -> float:
    """What attention keeps beside its output. Keys and values are those of all context parallel ranks.

    Of rows that are one document a GPU's rank has two parts, whose keys together are half a share more (`masks.py`).
    Packed documents' output of several rows is there in both orders, by row and by place.
    """
    if _keeps_weights(config, on_gpu):
        return _attention_with_weights(config)
    model, length, context = config.model, config.training.sequence_length, config.parallel.context_parallel_size
    queries, keys, tokens = query_width(config), key_width(config), tokens_of_micro_batch(config)
    share = number_bytes(config) / config.parallel.tensor_model_parallel_size
    is_long = length // context > _LONGEST and not model.attention_softcap
    if on_gpu or is_long or model.attention_dropout:
        shares = context + (0.5 if on_gpu and parts_documents(config) else 0)
        inputs = _inputs(config, on_gpu) if context == 1 else tokens * (queries + 2 * keys * shares) * share
        sums = 4 * tokens * model.num_attention_heads / config.parallel.tensor_model_parallel_size  # fp32, per query
        reordered = on_gpu and config.data.reset_attention_mask and config.training.micro_batch_size > 1
        if on_gpu or not model.attention_dropout:
            return inputs + sums + (tokens * queries * share if reordered else 0)
        # torch's kernel for CPUs knows no dropout: weights, mask, and the product of both.
        return inputs + 3 * tokens * length * model.num_attention_heads * share
    # Of each block of queries the weights; keys and values once for each query head.
    pairs = length * (length + _QUERIES) / 2 if context == 1 else length * length / context
    weights = config.training.micro_batch_size * model.num_attention_heads * pairs * share
    if queries == keys and context == 1:
        return _inputs(config, on_gpu) + weights
    return tokens * queries * (1 + 2 * context) * share + weights


def _gathered_for_head(config: PretrainConfig, on_gpu: bool) -> float:
    """The buffer that megatron-core gathers the output layer's input into, under sequence parallelism, and keeps."""
    if not on_gpu or _sequence_shards(config) == 1:
        return 0.0
    return tokens_of_micro_batch(config) * number_bytes(config) * config.model.hidden_size


def _head(config: PretrainConfig, on_gpu: bool) -> float:
    """The last norm, the logits and their gradient, and the block of it in fp32 that a GPU makes at a time.

    The gradient of capped logits becomes one of logits beside it.
    """
    tokens, size = tokens_of_micro_batch(config), number_bytes(config)
    width = 2 * config.model.hidden_size / _sequence_shards(config)
    logits = tokens * padded_vocab_size(config) / config.parallel.tensor_model_parallel_size
    block = min(4 * logits, _LOSS_BLOCK) if on_gpu else 0.0
    capped = size * logits if config.model.logit_softcap is not None else 0.0
    return size * (tokens * width + 2 * logits) + max(block, capped)
