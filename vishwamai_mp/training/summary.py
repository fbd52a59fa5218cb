"""What a run says of itself when it starts and when it ends, as lines of a label and a text."""

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from vishwamai_mp.config import PretrainConfig, micro_batches_per_step
from vishwamai_mp.config.job_environment import hardware_queues
from vishwamai_mp.config.wording import count_text, counted
from vishwamai_mp.observability.goodput_ledger import Ledger
from vishwamai_mp.planning import total_parameters, training_flops_per_token
from vishwamai_mp.planning.cache_costs import cache_forward_flops_per_token, cache_parameters
from vishwamai_mp.planning.footprint_advice import rank_memory, size_text
from vishwamai_mp.planning.hardware import known_gpu
from vishwamai_mp.planning.neural_memory_costs import memory_forward_flops_per_token, memory_parameters
from vishwamai_mp.planning.stacks import find_stack
from vishwamai_mp.planning.step_time import Machine, step_time, tokens_per_second_per_gpu
from vishwamai_mp.precision import PrecisionPolicy, lacking_hardware, use_transformer_engine
from vishwamai_mp.runtime import Runtime, is_accelerator
from vishwamai_mp.runtime.device import cpu_threads, machine_memory, peak_flops

_LARGE = 2**30  # bytes of a process that are made within a few seconds


def building_line(config: PretrainConfig, runtime: Runtime) -> str:
    """What is being made, where that takes long enough for a silent program to seem hung; otherwise empty.

    Args:
        config: resolved.
        runtime: of the job.
    """
    states = rank_memory(config, runtime.world_size, runtime.device.type == "cuda").states
    if states < _LARGE:
        return ""
    return (
        f"making a model of {count_text(total_parameters(config))} parameters: {size_text(states)} per process for"
        " weights, gradients and optimizer state"
    )


def opening_lines(config: PretrainConfig, runtime: Runtime, step: int) -> str:
    """Model, components, layout, batch, predicted footprint and output of a run that begins.

    Args:
        config: resolved.
        runtime: of the job.
        step: finished steps; above 0 where the run continues.
    """
    lines = {"model": _model(config), **_components(config), "layout": _layout(config, runtime)}
    lines["compute"] = _compute(config, runtime)
    if is_accelerator(runtime.device) and (queues := hardware_queues(config.parallel)):
        lines["queues"] = queues
    lines["batch"] = _batch(config, runtime)
    lines["footprint"] = _footprint(config, runtime)
    steps = config.training.max_steps
    begins = f"continues after step {step} of {steps}" if step else f"a new run of {counted(steps, 'step')}"
    lines["output"] = f"{config.training.output_dir}, {begins}"
    return _table(lines)


def closing_lines(
    config: PretrainConfig,
    step: int,
    seconds: float,
    record: Mapping[str, float],
    best: tuple[int, float] | None,
    ledger: Ledger,
    planned: str = "",
) -> str:
    """How far a run came, where its checkpoint is, and what to do with it.

    Args:
        config: resolved.
        step: the last one.
        seconds: that this part of the run took.
        record: of the last step.
        best: step and value of the lowest validation loss.
        ledger: of the whole run.
        planned: what was predicted beside what came, as `planned_text` has it.
    """
    training = config.training
    losses = {name: loss_text(value) for name, value in losses_of(record).items()}
    if best is not None and best[0] != step:
        losses[f"lowest validation loss, at step {best[0]},"] = loss_text(best[1])
    told = "  ".join(f"{name} {value}" for name, value in losses.items())
    lines = {"done": f"step {step} of {training.max_steps} in {duration(seconds)}: {told}"}
    if ledger.attempts:
        lines["goodput"] = _goodput(ledger)
    if planned:
        lines["planned"] = planned
    checkpoint = Path(training.output_dir) / "checkpoints" / f"step_{step:08d}"
    if checkpoint.is_dir():
        lines["checkpoint"] = str(checkpoint)
        if step == training.max_steps:
            lines["next"] = "\n".join(_next_commands(config))
    return _table(lines)


def _goodput(ledger: Ledger) -> str:
    """The share of useful steps, and what took the rest, largest first."""
    shares = {part: seconds / ledger.wall for part, seconds in ledger.seconds.items() if part != "useful"}
    rest = [f"{part} {share:.1%}" for part, share in sorted(shares.items(), key=lambda x: -x[1]) if share >= 0.001]
    attempts = f", {len(ledger.attempts)} attempts" if len(ledger.attempts) > 1 else ""
    return f"{ledger.goodput:.1%} of {duration(ledger.wall)}{attempts} in useful steps" + (
        f"; {', '.join(rest)}" if rest else ""
    )


def losses_of(record: Mapping[str, float]) -> dict[str, float]:
    """The losses that a step was trained with, by name, and its validation loss if it has one.

    The language model's loss is left out where no token had one, as in rows that only carry verdicts.
    """
    own = {
        name.replace("_", " "): value
        for name, value in record.items()
        if name.endswith("_loss") and name not in ("lm_loss", "validation_loss")
    }
    losses = {"loss": record["lm_loss"]} if record["lm_loss"] != 0 or not own else {}
    validation = {"validation loss": record["validation_loss"]} if "validation_loss" in record else {}
    return losses | own | validation


def loss_text(loss: float) -> str:
    """Four decimals; three digits of what is small, as a weighted auxiliary loss may be."""
    return f"{loss:.3g}" if 0 < loss < 0.1 else f"{loss:.4f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _table(lines: Mapping[str, str]) -> str:
    width = max(len(label) for label in lines) + 2
    indented = {label: text.replace("\n", "\n" + " " * width) for label, text in lines.items()}
    return "\n".join(f"{label:{width}}{text}" for label, text in indented.items())


def _model(config: PretrainConfig) -> str:
    model = config.model
    heads = counted(model.num_attention_heads, "head")
    if model.num_key_value_heads != model.num_attention_heads:
        heads += f" ({model.num_key_value_heads} of keys and values)"
    whole = total_parameters(config) + (model.hidden_size + 1 if config.tree.enabled else 0)
    return (
        f"{count_text(whole)} parameters: {counted(model.num_layers, 'layer')} × {model.hidden_size}, {heads},"
        f" vocabulary {model.vocab_size:,}"
    )


def _components(config: PretrainConfig) -> dict[str, str]:
    """What each component costs, with its sizes: they may be derived."""
    memory, cache, lines = config.memory, config.cache, {}
    whole, length = training_flops_per_token(config), config.training.sequence_length
    if memory.enabled:
        share = 3 * memory_forward_flops_per_token(memory) / whole
        lines["memory"] = (
            f"{count_text(memory_parameters(memory))} parameters, {share:.1%} of FLOPs: layers {memory.layers},"
            f" memory_size {memory.memory_size}, head_dim {memory.head_dim}"
        )
    if cache.enabled:
        share = 3 * cache_forward_flops_per_token(cache, length) / whole
        lines["cache"] = (
            f"{count_text(cache_parameters(cache))} parameters, {share:.1%} of FLOPs: layers {cache.layers},"
            f" num_heads {cache.num_heads}, a segment is {cache.segment_length} tokens"
        )
    if config.tree.enabled:
        lines["tree"] = f"a value head of {config.model.hidden_size + 1:,} parameters"
    return lines


def _layout(config: PretrainConfig, runtime: Runtime) -> str:
    parallel, chunks = config.parallel, config.parallel.virtual_pipeline_model_parallel_size
    extras = [
        name
        for name, on in (
            ("sequence parallel", parallel.sequence_parallel),
            ("fully sharded", parallel.fully_sharded),
            (f"{chunks} chunks per stage", chunks is not None),
        )
        if on
    ]
    return (
        f"{counted(runtime.world_size, 'process')}: tensor"
        f" {parallel.tensor_model_parallel_size} × pipeline {parallel.pipeline_model_parallel_size} × context"
        f" {parallel.context_parallel_size} × data {runtime.data_parallel_size}" + "".join(f", {x}" for x in extras)
    )


def _compute(config: PretrainConfig, runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name()
        known = config.logging.hardware_peak_tflops or not math.isnan(peak_flops(torch.bfloat16))
        hint = "" if known else "; its peak is not known, so there is no MFU: set logging.hardware_peak_tflops"
        policy = PrecisionPolicy.of_run(config)
        lacking = lacking_hardware(policy)
        how = f", emulated by torch's operators and slower than bf16 ({lacking})" if lacking else ""
        if config.precision == "fp32" and use_transformer_engine(policy):
            how = ", linear layers' products in TF32, as Transformer Engine has them"
        return f"{config.precision} on {name}{how}{hint}"
    threads, why = cpu_threads(config.training.threads)
    fused = ", compiled" if config.training.compile else ""
    return f"{config.precision} on CPU, {counted(threads, 'thread')} per process ({why}){fused}"


def _batch(config: PretrainConfig, runtime: Runtime) -> str:
    training = config.training
    tokens = training.global_batch_size * training.sequence_length
    passes = micro_batches_per_step(config, runtime.world_size)
    return (
        f"{counted(training.global_batch_size, 'sequence')} × {training.sequence_length} = {tokens:,} tokens a step, in"
        f" {counted(passes, 'pass')} of {training.micro_batch_size} per replica;"
        f" {count_text(tokens * training.max_steps)} tokens in all"
    )


def _footprint(config: PretrainConfig, runtime: Runtime) -> str:
    need = rank_memory(config, runtime.world_size, runtime.device.type == "cuda")
    return (
        f"about {size_text(need.total)} per process: {size_text(need.states)} for weights, gradients and optimizer"
        f" state, {size_text(need.activations)} for activations"
        + f"; {size_text(_device_bytes(runtime))} {_whose(runtime)}"
    )


def planned_text(config: PretrainConfig, runtime: Runtime, record: Mapping[str, float]) -> str:
    """What was predicted beside what the last step measured: bytes, and speed where the planner knows the GPU.

    Empty where the last step was not a logged one, and so measured no bytes.
    """
    if "memory_gib" not in record:
        return ""
    on_gpu = runtime.device.type == "cuda"
    need = size_text(rank_memory(config, runtime.world_size, on_gpu).total)
    measured = size_text(record["memory_gib"] * 2**30)
    text = f"{need} per process, measured {measured}" + ("" if on_gpu else " with the program's libraries")
    gpu = known_gpu(torch.cuda.get_device_name()) if on_gpu else None
    if gpu is None:
        return text
    time = step_time(config, runtime.world_size, Machine(gpu, find_stack("megatron")))
    rate = tokens_per_second_per_gpu(config, runtime.world_size, time) * runtime.world_size
    return f"{rate:,.0f} tokens/s, measured {record['tokens_per_second']:,.0f}; {text}"


def _device_bytes(runtime: Runtime) -> float:
    """Of the GPU; of the machine's memory the share of one process."""
    if runtime.device.type == "cuda":
        return float(torch.cuda.get_device_properties(runtime.device).total_memory)
    return machine_memory()


def _whose(runtime: Runtime) -> str:
    return "on the device" if runtime.device.type == "cuda" else "of this machine's memory and swap for each process"


def _next_commands(config: PretrainConfig) -> list[str]:
    run = shlex.quote(config.training.output_dir)
    text = [f'python tools/generate.py --load {run} --prompt "Once upon a time"'] if config.data.tokenizer else []
    export = shlex.quote(f"{config.training.output_dir.rstrip(os.sep)}-hf")
    return [
        *text,
        f"python tools/report.py {run} --output report.html",
        f"python tools/convert_checkpoint.py to-hf --load {run} --output {export}",
    ]
