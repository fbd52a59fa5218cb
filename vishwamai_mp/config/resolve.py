"""Derives what the user left unsaid and refuses what cannot work. Pure: a new configuration comes out."""

import math
from dataclasses import replace

from vishwamai_mp.config.check_cuda_graphs import check_cuda_graphs
from vishwamai_mp.config.check_fully_sharded import check_fully_sharded
from vishwamai_mp.config.check_gradients import check_gradients
from vishwamai_mp.config.check_offloading import check_offloading
from vishwamai_mp.config.check_recompute import check_recompute
from vishwamai_mp.config.check_tensor_overlap import check_tensor_overlap
from vishwamai_mp.config.checked_values import check_paths
from vishwamai_mp.config.errors import ConfigError, leave_out
from vishwamai_mp.config.extensions import check_combinations
from vishwamai_mp.config.finetuning import check_trained_parts, check_verdicts, resolve_rows
from vishwamai_mp.config.layer_windows import check_layer_pattern
from vishwamai_mp.config.logging import check_logging
from vishwamai_mp.config.resolve_cache import resolve_cache
from vishwamai_mp.config.resolve_fp8 import resolve_fp8
from vishwamai_mp.config.resolve_memory import resolve_memory
from vishwamai_mp.config.resolve_rotary import check_rotary, resolve_scaling, turns_alike
from vishwamai_mp.config.resolve_schedule import resolve_schedule
from vishwamai_mp.config.resolve_tree import resolve_tree
from vishwamai_mp.config.schema import ModelConfig, ParallelConfig, PretrainConfig
from vishwamai_mp.config.wording import counted


def resolve(config: PretrainConfig, world_size: int | None = None) -> PretrainConfig:
    """Fill in derived values and validate the whole.

    Args:
        config: as loaded; never changed.
        world_size: number of processes; None: leave the checks that need it to a later call.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    check_paths(config)
    minimum = _default(config.optimizer.min_learning_rate, config.optimizer.learning_rate / 10)
    config = replace(
        config,
        model=_resolve_model(config.model),
        optimizer=replace(config.optimizer, min_learning_rate=minimum),
        schedule=resolve_schedule(config.schedule, config.training.max_steps),
        tree=resolve_tree(config.tree),
        data=resolve_rows(config.data),
    )
    _check_layout(config)
    check_gradients(config)
    check_fully_sharded(config)
    check_tensor_overlap(config)
    config = replace(config, memory=resolve_memory(config), cache=resolve_cache(config))
    config = resolve_fp8(config)
    check_trained_parts(config)
    check_verdicts(config)
    check_cuda_graphs(config)
    _check_order(config)
    _check_training(config)
    check_logging(config, world_size)
    replicas = None
    if world_size is not None:
        replicas = data_parallel_size(config, world_size) * config.parallel.context_parallel_size
    check_combinations(config, replicas)
    if world_size is not None:
        micro_batches_per_step(config, world_size)
    return config


def padded_vocab_size(config: PretrainConfig) -> int:
    """Rows of the embedding: `vocab_size` rounded up to 128 × tensor parallel size. Never seen outside."""
    return _round_up(config.model.vocab_size, 128 * config.parallel.tensor_model_parallel_size)


def data_parallel_size(config: PretrainConfig, world_size: int) -> int:
    """Replicas of the model in `world_size` processes.

    Raises:
        ConfigError: the layout does not divide the world.
    """
    parallel = config.parallel
    ranks = model_parallel_ranks(parallel)
    if world_size % ranks:
        raise ConfigError(
            f"{counted(world_size, 'process')} cannot hold tensor {parallel.tensor_model_parallel_size}"
            f" × pipeline {parallel.pipeline_model_parallel_size} × context {parallel.context_parallel_size}"
            f" = {ranks} ranks per replica; start a multiple of {ranks} processes"
            " (torchrun --nproc-per-node) or change parallel.*"
        )
    return world_size // ranks


def model_parallel_ranks(parallel: ParallelConfig) -> int:
    """Processes that hold one replica: tensor × pipeline × context."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def parts_documents(config: PretrainConfig) -> bool:
    """Whether documents do not see each other, and context parallel ranks have parts of them."""
    return config.data.reset_attention_mask and config.parallel.context_parallel_size > 1


def micro_batches_per_step(config: PretrainConfig, world_size: int) -> int:
    """Forward-backward passes that each rank runs per optimizer step.

    Raises:
        ConfigError: the global batch does not divide.
    """
    training = config.training
    replicas = data_parallel_size(config, world_size)
    per_pass = training.micro_batch_size * replicas
    if training.global_batch_size % per_pass:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is not a multiple of micro_batch_size"
            f" {training.micro_batch_size} × data parallel size {replicas} = {per_pass};"
            f" use {_round_up(training.global_batch_size, per_pass)} or change training.micro_batch_size"
        )
    count = training.global_batch_size // per_pass
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.virtual_pipeline_model_parallel_size and count % stages:
        raise ConfigError(
            f"{count} micro-batches per step: the interleaved schedule needs a multiple of"
            f" parallel.pipeline_model_parallel_size={stages}; change training.global_batch_size"
        )
    return count


def _default(value, derived):
    return derived if value is None else value


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def _resolve_model(model: ModelConfig) -> ModelConfig:
    heads = model.num_attention_heads
    groups = _default(model.num_key_value_heads, heads)
    if model.head_dim is None and model.hidden_size % heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_attention_heads={heads};"
            " change one of them or set model.head_dim"
        )
    if heads % groups:
        raise ConfigError(
            f"model.num_attention_heads={heads} is not a multiple of model.num_key_value_heads={groups};"
            f" use a divisor of {heads}"
        )
    head_dim = _default(model.head_dim, model.hidden_size // heads)
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(model, name) >= 1:
            raise ConfigError(f"model.{name}={getattr(model, name)}: a probability; use a number from 0 to below 1")
    check_layer_pattern(model)
    check_rotary(model, head_dim)
    if model.attention_softcap and model.attention_dropout:
        raise ConfigError(
            f"model.attention_softcap={model.attention_softcap} with model.attention_dropout={model.attention_dropout}:"
            " attention with a soft cap has no dropout; set model.attention_dropout=0"
        )
    # What is so without it is left unsaid, so that a model that only says it differs from none.
    attention = model.attention_multiplier
    return replace(
        model,
        window_rope_theta=None if turns_alike(model) else model.window_rope_theta,
        embedding_multiplier=_unless_one(model.embedding_multiplier),
        residual_multiplier=_unless_one(model.residual_multiplier),
        logit_multiplier=_unless_one(model.logit_multiplier),
        attention_multiplier=None if attention and math.isclose(attention, 1 / math.sqrt(head_dim)) else attention,
        rope_scaling=model.rope_scaling and resolve_scaling(model.rope_scaling),
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=_default(model.intermediate_size, _round_up(8 * model.hidden_size // 3, 256)),
    )


def _unless_one(multiplier: float | None) -> float | None:
    return None if multiplier == 1 else multiplier


def _check_layout(config: PretrainConfig) -> None:
    model, parallel = config.model, config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(model, name)
        if value % tensor:
            raise ConfigError(
                f"model.{name}={value} is not divisible by parallel.tensor_model_parallel_size={tensor};"
                f" use a tensor parallel size that divides {value}"
            )
    if parallel.sequence_parallel and tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true has no effect at tensor_model_parallel_size=1; set it to false"
            " or raise the tensor parallel size"
        )
    share = context * (tensor if parallel.sequence_parallel else 1) * (2 if context > 1 else 1)
    if config.training.sequence_length % share:
        parts = f"2 × context_parallel_size {context}" if context > 1 else ""
        parts += f"{' × ' if parts else ''}tensor_model_parallel_size {tensor}" if parallel.sequence_parallel else ""
        raise ConfigError(
            f"training.sequence_length={config.training.sequence_length} is not a multiple of {parts} = {share};"
            f" use {_round_up(config.training.sequence_length, share)}"
        )
    check_offloading(config, layers_per_stage(config))
    check_recompute(config.training, layers_per_stage(config), parallel.virtual_pipeline_model_parallel_size)


def layers_per_stage(config: PretrainConfig) -> list[int]:
    """Layers on each pipeline stage, first to last (all its virtual chunks together).

    Raises:
        ConfigError: the layers do not divide over stages and chunks.
    """
    layers, parallel = config.model.num_layers, config.parallel
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if stages == 1:
        for name in (
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ):
            if getattr(parallel, name) is not None:
                raise ConfigError(
                    f"parallel.{name} has no effect at pipeline_model_parallel_size=1; {leave_out(f'parallel.{name}')}"
                )
        return [layers]
    if chunks == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size=1 has no effect; use 2 or more, or"
            f" {leave_out('parallel.virtual_pipeline_model_parallel_size')}"
        )
    middle = stages - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if rest < 0 or (middle and rest % middle) or (not middle and rest) or (middle and rest == 0):
        raise ConfigError(
            f"model.num_layers={layers} does not split over parallel.pipeline_model_parallel_size={stages}"
            + (f" with {first or 'even'} layers first and {last or 'even'} last" if first or last else "")
            + "; change the number of stages or set num_layers_in_first/last_pipeline_stage"
        )
    each = rest // middle if middle else 0
    counts = [
        *([first] if first is not None else []),
        *[each] * middle,
        *([last] if last is not None else []),
    ]
    for count in counts:
        if chunks and count % chunks:
            raise ConfigError(
                f"a pipeline stage of {counted(count, 'layer')} does not split into"
                f" parallel.virtual_pipeline_model_parallel_size={chunks} chunks; use a divisor of {count}"
            )
    return counts


def _check_order(config: PretrainConfig) -> None:
    """Refuse data in an order that carried state cannot follow."""
    data = config.data
    for section in ("memory", "cache"):
        options = getattr(config, section)
        if options.enabled and options.carry_state and not data.consecutive:
            raise ConfigError(
                f"{section}.carry_state=true with data.consecutive=false: shuffled rows do not go on where the last"
                f" ones ended; set data.consecutive=true, or {section}.carry_state=false"
            )
    if data.consecutive and not data.reset_attention_mask:
        raise ConfigError(
            "data.consecutive=true with data.reset_attention_mask=false: rows must know where a document begins;"
            " set data.reset_attention_mask=true"
        )


def _check_training(config: PretrainConfig) -> None:
    model, training, optimizer = config.model, config.training, config.optimizer
    if training.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"training.sequence_length={training.sequence_length} exceeds"
            f" model.max_position_embeddings={model.max_position_embeddings}; raise the latter or shorten sequences"
        )
    if optimizer.min_learning_rate is not None and optimizer.min_learning_rate > optimizer.learning_rate:
        raise ConfigError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} exceeds"
            f" optimizer.learning_rate={optimizer.learning_rate}; lower the former"
        )
    for key, asked in (
        ("training.early_stopping_patience", training.early_stopping_patience),
        ("checkpoint.load_best", config.checkpoint.load_best),
    ):
        if asked and training.evaluate_every is None:
            raise ConfigError(
                f"{key}={str(asked).lower()} without training.evaluate_every: no validation loss would be measured;"
                " set training.evaluate_every"
            )
    every, saved = config.checkpoint.export_hf_every, config.checkpoint.save_every
    if every and saved is None:
        raise ConfigError(
            f"checkpoint.export_hf_every={every} without checkpoint.save_every, and only what is saved can be exported;"
            f" set checkpoint.save_every={every}"
        )
    if every and saved and every % saved:
        raise ConfigError(
            f"checkpoint.export_hf_every={every} is no multiple of checkpoint.save_every={saved}, and only what is"
            f" saved can be exported; set checkpoint.export_hf_every={-(-every // saved) * saved}"
        )
    if config.data.prefetch_factor and not config.data.num_workers:
        raise ConfigError(
            f"data.prefetch_factor={config.data.prefetch_factor} has no effect at data.num_workers=0; raise"
            f" data.num_workers or {leave_out('data.prefetch_factor')}"
        )
    for name in ("beta1", "beta2"):
        if getattr(optimizer, name) >= 1:
            raise ConfigError(f"optimizer.{name}={getattr(optimizer, name)}: use a number from 0 to below 1")
