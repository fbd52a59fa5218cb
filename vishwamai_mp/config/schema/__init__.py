"""What a user can ask for: one frozen dataclass per concern, nested into `PretrainConfig`.

Every field is a key of a YAML recipe and a dotted override (`training.max_steps=100`). `None` means "derive it":
`resolve.resolve` fills it in without touching the user's object.
"""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

# An unknown key is an error, never ignored; so is a number that is none.
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


# Decimal, as people write it: 1000, 1_000, .5, 3e-4. Leading zeros mean nothing; 0x10, 1:30 and 1,000 are refused.
_DECIMAL = re.compile(r"[+-]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _number(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false")):
        raise PydanticCustomError("boolean", "use a number, not true or false")  # Python's True is an int
    if not isinstance(value, str):
        return value
    if not _DECIMAL.fullmatch(value.strip()):
        raise PydanticCustomError("number", "use a decimal number, such as 1000 or 3e-4")
    number = float(value)
    return int(Decimal(value.strip())) if number.is_integer() and abs(number) < 2**63 else number


def _blend(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else ()
    if items and all(type(item) in (str, int, float) for item in items):
        # In a recipe all are texts; at the places of weights numbers are meant.
        weighted = len(items) % 2 == 0 and all(
            not isinstance(item, str) or _DECIMAL.fullmatch(item) for item in items[::2]
        )
        return [float(item) if weighted and i % 2 == 0 else item for i, item in enumerate(items)]
    if value is None or isinstance(value, str):
        return value
    raise PydanticCustomError("blend", "use a prefix, or a list [weight, prefix, weight, prefix, ...]")


def _split(value: Any) -> Any:
    """`[98, 2, 0]` and `100` are read as the text `98,2,0` and `100`."""
    items = [value] if type(value) in (int, float) else value
    if isinstance(items, list | tuple) and all(type(item) in (str, int, float) for item in items):
        return ",".join(str(item).strip() for item in items)
    return value


def _plain(value: Any) -> Any:
    """Numbers and booleans for texts that look like them, however deep: here no field's type says how to read them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()):
        return _number(value)
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


_Number = BeforeValidator(_number)
PositiveInt = Annotated[int, Field(gt=0), _Number]
NonNegativeInt = Annotated[int, Field(ge=0), _Number]
PositiveFloat = Annotated[float, Field(gt=0), _Number]
NonNegativeFloat = Annotated[float, Field(ge=0), _Number]
Blend = Annotated[list[str | float] | str | None, BeforeValidator(_blend)]
Split = Annotated[str, BeforeValidator(_split)]

Options = Annotated[dict[str, Any], BeforeValidator(_plain)]

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
RecomputedModule = Literal["core_attn", "mlp"]
Part = Literal["base", "embedding", "memory", "cache", "value_head"]

# A part of the user's own in place of one of ours. Only its form is checked here: `config.extensions` imports it.
_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _extension(*ours: str) -> BeforeValidator:
    """Accepts the names of our parts, and `package.module:Name`."""
    own = "name one of yours as package.module:Name"
    message = f"use {', '.join(ours)}, or {own}" if ours else own

    def check(value: Any) -> Any:
        if value in ours or (isinstance(value, str) and _OWN.fullmatch(value)):
            return value
        raise PydanticCustomError("extension", message)

    return BeforeValidator(check)


Precision = Literal["fp32", "bf16", "fp16", "fp8_delayed", "fp8_current", "fp8_blockwise", "fp8_mx", "nvfp4"]


@dataclass(frozen=True)
class RopeScaling:
    """Stretches rotary position embeddings beyond `original_max_position_embeddings` positions.

    `linear` divides every frequency by `factor` (arXiv 2306.15595); `llama3` divides only the low ones and blends
    between `low_freq_factor` and `high_freq_factor` (Llama 3.1's rule); `yarn` blends between the pairs that turn
    `beta_fast` and `beta_slow` times in the original context, and sharpens attention (arXiv 2309.00071); `longrope`
    divides the frequency of each pair by a number of its own (arXiv 2402.13753). The frequencies of `dynamic` and
    `longrope` depend on a text's length: of a whole row in training and evaluation, of all that has been read in
    generation. `dynamic` raises `rope_theta` for texts longer than the original context, as far as each needs it;
    `longrope` has `long_factor` for them.
    """

    __pydantic_config__ = _STRICT
    rope_type: Literal["linear", "llama3", "dynamic", "yarn", "longrope"]
    factor: PositiveFloat  # of longrope: it only sets attention_factor
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: PositiveInt = 8192
    beta_fast: PositiveFloat = 32.0  # of yarn: turns in the original context; pairs with more keep their frequency
    beta_slow: PositiveFloat = 1.0  # of yarn: pairs with fewer turns are divided by factor
    truncate: bool = True  # of yarn: the blend begins and ends at whole pairs
    attention_factor: PositiveFloat | None = None  # of yarn and longrope, on turned queries and keys; as the papers say
    short_factor: list[PositiveFloat] | None = None  # of longrope, one number a pair: texts in the original context
    long_factor: list[PositiveFloat] | None = None  # of longrope: longer texts


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, no biases (a Llama, in short)."""

    __pydantic_config__ = _STRICT
    hidden_size: PositiveInt = 512
    num_layers: PositiveInt = 8
    num_attention_heads: PositiveInt = 8
    num_key_value_heads: PositiveInt | None = None  # num_attention_heads
    head_dim: PositiveInt | None = None  # hidden_size / num_attention_heads
    intermediate_size: PositiveInt | None = None  # 8/3 hidden_size, rounded up to 256
    activation: Literal["swiglu", "geglu"] = "swiglu"  # of the MLP's gates: SiLU, or GELU as approximated by tanh
    vocab_size: PositiveInt = 8192
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = False
    embedding_multiplier: PositiveFloat | None = None  # of the input embedding's output; 1
    residual_multiplier: PositiveFloat | None = None  # of what attention and MLP add to the residual stream; 1
    rms_norm_eps: PositiveFloat = 1e-5
    norm_zero_centered: bool = False  # RMSNorms of the decoder multiply by 1 + weight
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: PositiveFloat = 1.0  # of a head's width that is turned, its first part
    rotary_pattern: str | None = None  # repeated over layers, R: turned, N: without positions; None: all turned
    sliding_window: PositiveInt | None = None  # tokens a token sees, itself included; None: all before it
    layer_pattern: str | None = None  # repeated over layers, S: with the window, F: without; None: all alike
    window_rope_theta: PositiveFloat | None = None  # of its layers S, without rope_scaling; None: all layers turn alike
    attention_multiplier: PositiveFloat | None = None  # of products of queries and keys; 1 / √head_dim
    attention_softcap: PositiveFloat | None = None  # scores become cap · tanh(score / cap) before the softmax
    logit_multiplier: PositiveFloat | None = None  # of logits, before their soft cap; 1
    logit_softcap: PositiveFloat | None = None  # logits become cap · tanh(logit / cap)
    attention_dropout: NonNegativeFloat = 0.0
    hidden_dropout: NonNegativeFloat = 0.0
    attention: Annotated[str, _extension("softmax")] = "softmax"  # or package.module:Class, a KvSelfAttention
    initializer_range: PositiveFloat = 0.02  # standard deviation; divided by √(2·num_layers) on residual outputs
    attention_bias: bool = False  # of queries, keys and values
    # RMSNorm of queries and keys before they are turned, of each head alone or of all heads together
    qk_norm: Literal["none", "head", "full"] = "none"
    # RMSNorm of what attention and MLP are given (pre), of what they add to the residual stream (post), or both
    norm_position: Literal["pre", "post", "sandwich"] = "pre"


@dataclass(frozen=True)
class MemoryConfig:
    """The neural memory: fast weights written by gradient descent at every token."""

    __pydantic_config__ = _STRICT
    enabled: bool = False
    hidden_size: PositiveInt | None = None  # the model's
    memory_size: PositiveInt | None = None  # total width: heads × head_dim; hidden_size / 4, in fours of heads
    num_memory_layers: PositiveInt = 3  # cascaded levels
    dropout: NonNegativeFloat = 0.1
    head_dim: PositiveInt | None = None  # hidden_size / 16, a power of two from 16 to 128
    chunk_size: PositiveInt = 64  # tokens per triangular solve; a performance knob only
    momentum: bool = True
    layers: list[NonNegativeInt] | None = None  # transformer layers (from 0) that carry one; 1 in 8
    carry_state: bool = False  # a row begins with what it remembered at the end of the last micro-batch
    loss_weight: NonNegativeFloat = 0.0  # of the auxiliary loss: what the mix of levels lacks in entropy, nats


@dataclass(frozen=True)
class CacheConfig:
    """The differentiable cache: latents pooled from past segments, retrieved by attention."""

    __pydantic_config__ = _STRICT
    enabled: bool = False
    hidden_size: PositiveInt | None = None  # the model's
    num_heads: PositiveInt | None = None  # of width hidden_size / num_heads; 8, fewer where they would be below 16
    max_cache_length: PositiveInt = 65536  # latents that are kept; beyond, the least important × read go
    dropout: NonNegativeFloat = 0.1
    retrieval_factor: NonNegativeFloat = 1.0  # what is read is multiplied by it
    segment_length: PositiveInt = 64  # tokens
    latents_per_segment: PositiveInt = 8
    retrieve_segments: PositiveInt = 64  # where more exist, the best are read
    layers: list[NonNegativeInt] | None = None  # transformer layers (from 0) that carry one; 1 in 8
    before_memory: bool = False  # where a layer carries both: which of them runs first
    carry_state: bool = False  # a row may read what the last micro-batch's row wrote; a segment cut by its end is lost


@dataclass(frozen=True)
class TreeConfig:
    """Tree of thoughts: search over reasoning steps at inference, and the value head's training signal."""

    __pydantic_config__ = _STRICT
    enabled: bool = False  # the model has a value head, training its loss; each evaluation searches over prompts
    beam_width: PositiveInt = 4  # nodes kept at each depth
    max_depth: PositiveInt = 3  # thoughts in a row
    temperature: PositiveFloat = 0.7
    pruning_threshold: NonNegativeFloat = 0.1  # share of the best sibling's score below which a node is cut
    branching: PositiveInt | None = None  # children of a node; beam_width
    max_thought_tokens: PositiveInt = 64  # longest thought; also how far ahead the value head looks in pretraining
    stop: str = "[STEP]"  # ends a thought: a token's spelling, or any text
    value_weight: NonNegativeFloat = 1.0  # of the value head in a node's score
    logprob_weight: NonNegativeFloat = 0.0  # of the probability per token of its path
    strategy: Literal["beam", "best-first", "dfs"] = "beam"
    seed: NonNegativeInt = 0
    value_loss_weight: NonNegativeFloat = 0.05  # per marked token, beside 1 per token of the language model's loss
    value_gradient: bool = False  # whether the value loss trains the layers below the head too
    value_signal: Literal["likelihood", "verdicts"] = "likelihood"  # of the text to come; of rollouts, in prepared rows
    step_token: NonNegativeInt | None = None  # id where values are learnt; `stop` in data.tokenizer
    prompts: str | None = None  # text file searched at each evaluation: a prompt a line, or prompt, tab, answer


@dataclass(frozen=True)
class NcclOptions:
    """Of the communicators of one kind of process group; None: as NCCL chooses."""

    __pydantic_config__ = _STRICT
    min_ctas: PositiveInt | None = None  # thread blocks that a collective takes at least
    max_ctas: PositiveInt | None = None  # and at most: fewer leave more of the GPU to what overlaps with it
    cga_cluster_size: NonNegativeInt | None = None  # thread blocks in a cluster, on Hopper and later
    is_high_priority_stream: bool = False  # its kernels go before those of computation


@dataclass(frozen=True)
class NcclConfig:
    """Options of communicators by megatron-core's names of process groups; None: all as NCCL chooses."""

    __pydantic_config__ = _STRICT
    tp: NcclOptions | None = None  # tensor parallel ranks
    cp: NcclOptions | None = None  # context parallel ranks
    pp: NcclOptions | None = None  # pipeline stages
    dp_cp: NcclOptions | None = None  # data and context parallel ranks, which sum gradients and gather parameters
    mp: NcclOptions | None = None  # tensor parallel ranks of all stages


@dataclass(frozen=True)
class ParallelConfig:
    """How the job is laid out. Data parallelism is what is left: world size / (tensor × pipeline × context)."""

    __pydantic_config__ = _STRICT
    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None  # model chunks per pipeline stage
    context_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True  # optimizer state sharded over data parallel ranks
    fully_sharded: bool = False  # FSDP: parameters and gradients as well, over data parallel ranks alone
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    reduce_grads_in: Literal["fp32", "bf16"] = "fp32"  # what gradients of bf16 and FP8 models are summed in
    fuse_grad_accumulation: bool = False  # Transformer Engine's products add to the sums of gradients themselves
    overlap_tensor_parallel: bool = False  # Transformer Engine's products run while their tokens are exchanged
    timeout_minutes: PositiveFloat = 30.0  # a collective that waits longer ends the job
    step_timeout_minutes: PositiveFloat | None = None  # in a process's steps after its first; timeout_minutes
    nccl: NcclConfig | None = None  # on GPUs; as NCCL chooses


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from: `.bin/.idx` prefixes (without the suffix), alone or as `[weight, prefix, …]`."""

    __pydantic_config__ = _STRICT
    source: Annotated[str, _extension("indexed")] = "indexed"  # or package.module:function(config, tokenizer)
    train: Blend = None
    valid: Blend = None  # None: a part of `train`, by `split`
    split: Split = "99,1,0"  # train, valid, test shares of `train`
    tokenizer: str | None = None  # SentencePiece .model, tokenizer.json, or a folder with one
    reset_position_ids: bool = False  # positions start anew in each packed document
    reset_attention_mask: bool = False  # packed documents do not see each other
    eod_mask_loss: bool = False  # no loss on the token after a document's end
    consecutive: bool = False  # not shuffled: a row's segment goes on in the same row of the next micro-batch
    prepared_rows: bool = False  # rows of tools/prepare_chat_data.py: loss on answers only, conversations kept apart
    cache_dir: str | None = None  # shuffle indices; None: `cache/` beside the data
    num_workers: NonNegativeInt = 0  # reader processes per rank
    prefetch_factor: PositiveInt | None = None  # micro-batches that each of these reads ahead; 2


@dataclass(frozen=True)
class OptimizerConfig:
    """Weight decay on matrices only."""

    __pydantic_config__ = _STRICT
    name: Annotated[str, _extension("adamw")] = "adamw"  # or package.module:Class, a torch.optim.Optimizer
    options: Options = field(default_factory=dict)  # keywords of yours; adamw has the keys below
    learning_rate: PositiveFloat = 3e-4
    min_learning_rate: NonNegativeFloat | None = None  # learning_rate / 10
    weight_decay: NonNegativeFloat = 0.1
    beta1: NonNegativeFloat = 0.9
    beta2: NonNegativeFloat = 0.95
    epsilon: PositiveFloat = 1e-8
    moments_in: Literal["fp32", "bf16"] = "fp32"  # what adamw keeps its two moments in; it computes in fp32
    moments_on_host: bool = False  # they lie in the host's memory and come to the GPU for each step
    clip_grad_norm: NonNegativeFloat = 1.0  # 0: never clip
    initial_loss_scale: PositiveFloat = 2.0**16  # fp16 only; halved at each overflow
    loss_scale_window: PositiveInt = 1000  # fp16 only: steps without overflow before the scale doubles


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then decay to `optimizer.min_learning_rate`."""

    __pydantic_config__ = _STRICT
    warmup_steps: NonNegativeInt = 0
    warmup_from_zero: bool = False  # the first step has rate 0, as Hugging Face's schedules do
    decay: Annotated[str, _extension("cosine", "linear", "constant", "wsd")] = "cosine"  # or package.module:function
    decay_steps: PositiveInt | None = None  # training.max_steps
    wsd_decay_steps: PositiveInt | None = None  # length of the final decay of `wsd`; decay_steps / 10


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how long a sequence, how many of them, how often what."""

    __pydantic_config__ = _STRICT
    sequence_length: PositiveInt = 512  # tokens
    micro_batch_size: PositiveInt = 1  # sequences per rank and pass
    global_batch_size: PositiveInt = 8  # sequences per step, over all ranks
    max_steps: PositiveInt = 100
    seed: NonNegativeInt = 1234
    deterministic: bool = False  # on GPUs too, a repeated run has the same bits; slower
    output_dir: str = "runs/default"
    exit_after_minutes: PositiveFloat | None = None  # save and exit 0
    recompute: Literal["none", "selective", "full"] = "none"  # selective: recompute_modules; full: whole layers
    recompute_layers: PositiveInt | None = None  # of full: the first so many of each stage's chunk; None: all
    recompute_modules: list[RecomputedModule] | None = None  # of selective; None: core attention alone
    offload_layers: PositiveInt | None = None  # of each stage's chunk, from the first: activations go to the host
    cuda_graphs: bool = False  # a layer's passes are launched as one each, from the second step on
    evaluate_every: PositiveInt | None = None  # steps
    evaluate_batches: PositiveInt = 8  # global batches per evaluation
    early_stopping_patience: PositiveInt | None = None  # evaluations in a row without a new lowest loss; then stop
    max_skipped_steps: NonNegativeInt = 10  # consecutive non-finite or spiking steps before giving up
    spike_factor: PositiveFloat | None = None  # skip a step whose loss exceeds this multiple of the running mean
    collect_garbage_every: PositiveInt | None = None  # steps; Python's collector on all ranks at once, not by chance
    threads: PositiveInt | None = None  # CPU threads per process; None: OMP_NUM_THREADS, else cores / processes
    compile: bool = False  # on CPUs: fuse what lies between matrix products by torch.compile; needs a C++ compiler
    loss: Annotated[str, _extension("cross_entropy")] = "cross_entropy"  # or package.module:function
    callbacks: list[Annotated[str, _extension()]] = field(default_factory=list)  # yours, each package.module:Class
    freeze: list[Part] = field(default_factory=list)  # not trained; base: all but components, embedding: both tables


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank · B A with W and all else of the plain model frozen."""

    __pydantic_config__ = _STRICT
    enabled: bool = False
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: NonNegativeFloat = 0.0  # on what A reads
    targets: list[LoraTarget] = field(default_factory=lambda: list(get_args(LoraTarget)))  # in every layer


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run, and what it starts from."""

    __pydantic_config__ = _STRICT
    save_every: PositiveInt | None = None  # steps; the last step is always saved
    keep_last: PositiveInt | None = None  # newest N; None: all
    keep_every: PositiveInt | None = None  # and every multiple of M steps for ever
    load_best: bool = False  # each new lowest validation loss is saved and kept, and the last loaded at the end
    async_save: bool = False
    export_hf_every: PositiveInt | None = None  # steps: to hf/ of the run, in the background; and the last step
    load: str | None = None  # start from this checkpoint, or a run folder's newest, when output_dir has none
    load_optimizer: bool = True  # False: weights only, step 0


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported, where."""

    __pydantic_config__ = _STRICT
    log_every: PositiveInt = 1  # steps; the first and the last step are always logged
    report_to: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    project: str = "vishwamai-mp"  # Weights & Biases project
    progress_bar: bool = True  # on a terminal; lines elsewhere. False: neither
    hardware_peak_tflops: PositiveFloat | None = None  # per device, for MFU; None: known GPUs, else measured
    profile_steps: list[PositiveInt] | None = None  # [first, last], from 1: traced by torch's profiler into profile/
    profile_ranks: list[NonNegativeInt] = field(default_factory=lambda: [0])
    stragglers_every: PositiveInt | None = 100  # steps between looks at which ranks are slow; null: never
    memory_snapshot: bool = False  # of these steps too: GPU memory's history; on CPUs what each operator allocated


@dataclass(frozen=True)
class Fp8Config:
    """Options of `precision: fp8_*` and `nvfp4`; one that the chosen recipe has no use for is refused."""

    __pydantic_config__ = _STRICT
    amax_history_length: PositiveInt | None = None  # fp8_delayed: passes that a scale follows from; 1024
    amax_algorithm: Literal["max", "most_recent"] | None = None  # fp8_delayed: which amax of them; max
    bf16_layers_at_start: NonNegativeInt = 0  # transformer layers that stay in bf16; not with fp8_delayed
    bf16_layers_at_end: NonNegativeInt = 0
    params: bool = False  # current, blockwise: weights stay in FP8 between steps, their fp32 copies in the optimizer
    report_every: PositiveInt | None = None  # steps between lines of `fp8.jsonl`: amax, scale, what was rounded away


@dataclass(frozen=True)
class WatchdogConfig:
    """Ends a job that hangs, and says which rank is at fault. On Linux, in jobs that a launcher started.

    A job hangs when the rank that others wait for has been in one phase for longer than it may. Shorter limits find
    hangs sooner; what is longer than `parallel.timeout_minutes` has no effect, for collectives then end the job first.
    """

    __pydantic_config__ = _STRICT
    enabled: bool = True
    step_factor: PositiveFloat = 10.0  # a step may take so many times the median of the last 64 ...
    step_seconds: PositiveFloat = 120.0  # ... and at least so long
    first_step_seconds: PositiveFloat = 1800.0  # of a process: kernels are chosen, connections made
    data_seconds: PositiveFloat = 600.0  # waiting for micro-batches
    evaluation_seconds: PositiveFloat = 1800.0
    save_seconds: PositiveFloat = 1800.0
    other_seconds: PositiveFloat = 900.0  # between steps, in callbacks; and loading before the first


@dataclass(frozen=True)
class PretrainConfig:
    """Everything one training run needs."""

    __pydantic_config__ = _STRICT
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision = "bf16"
    fp8: Fp8Config = field(default_factory=Fp8Config)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
