"""Published runs as configurations, so that what is predicted can be held against what was measured.

A table has the columns `source, model, params_b, layers, hidden, heads, kv_heads, ffn, seq, vocab, gpu, n_gpus, tp, pp,
cp, vpp, mbs, gbs, precision, recompute, tokens_per_s_gpu, tflops_per_gpu, mfu`; any may be blank. What a row leaves
open is filled from the model's name, then by what trains fastest of what fits.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from vishwamai_mp.config import (
    ConfigError,
    ModelConfig,
    ParallelConfig,
    PretrainConfig,
    TrainingConfig,
    UserError,
    data_parallel_size,
    micro_batches_per_step,
)
from vishwamai_mp.config.schema import LoraConfig
from vishwamai_mp.planning.footprint_advice import rank_memory
from vishwamai_mp.planning.hardware import find_gpu
from vishwamai_mp.planning.stacks import find_stack
from vishwamai_mp.planning.step_time import Machine, StepTime, step_time, tokens_per_second_per_gpu

# Layers, width, heads, heads of keys, width of the MLP (negative: without a gate), vocabulary, tied tables.
# Sources: the models' configurations. Nanotron's follow from their parameters: Llama's shapes with as many heads of
# keys as of queries and 131072 tokens have 1.34, 3.57, 8.86 and 80.0 B.
_MODELS = {
    "llama3-8b": (32, 4096, 32, 8, 14336, 128256, False),
    "llama3-70b": (80, 8192, 64, 8, 28672, 128256, False),
    "llama3-405b": (126, 16384, 128, 8, 53248, 128256, False),
    "llama3-1b": (16, 2048, 32, 8, 8192, 128256, True),
    "llama3-3b": (28, 3072, 24, 8, 8192, 128256, True),
    "llama2-7b": (32, 4096, 32, 32, 11008, 32000, False),
    "llama2-13b": (40, 5120, 40, 40, 13824, 32000, False),
    "llama2-70b": (80, 8192, 64, 8, 28672, 32000, False),
    "mistral-7b": (32, 4096, 32, 8, 14336, 32000, False),
    "gpt3-5b": (24, 4096, 32, 32, -16384, 51200, True),
    "gpt3-20b": (44, 6144, 48, 48, -24576, 51200, True),
    "gpt3-175b": (96, 12288, 96, 96, -49152, 51200, True),
    "nemotron-8b": (32, 4096, 32, 32, -16384, 256000, False),
    "nemotron-15b": (32, 6144, 48, 8, -24576, 256000, False),
    "nemotron-22b": (40, 6144, 48, 48, -24576, 256000, False),
    "nemotron-340b": (96, 18432, 96, 8, -73728, 256000, False),
    "nanotron-1.34b": (16, 2048, 32, 32, 8192, 131072, True),
    "nanotron-3.57b": (28, 3072, 24, 24, 8192, 131072, True),
    "nanotron-8.86b": (32, 4096, 32, 32, 14336, 131072, False),
    "nanotron-80.0b": (80, 8192, 64, 64, 28672, 131072, False),
    "qwen3-8b": (36, 4096, 32, 8, 12288, 151936, False),
    "qwen3-14b": (40, 5120, 40, 8, 17408, 151936, False),
    "qwen3-32b": (64, 5120, 64, 8, 25600, 151936, False),
}


@dataclass(frozen=True)
class PublishedRun:
    """A row of a table.

    Attributes:
        measured: tokens/s and GPU, from the row's FLOP/s where it does not say.
        memory: bytes at the peak; None: not in the row.
        assumed: what the row left open and was filled in.
    """

    number: int
    source: str
    config: PretrainConfig
    world_size: int
    machine: Machine
    measured: float | None
    memory: float | None
    assumed: tuple[str, ...]
    label: str
    model: str

    @property
    def predicted(self) -> StepTime:
        return step_time(self.config, self.world_size, self.machine)

    @property
    def predicted_rate(self) -> float:
        """Tokens/s and GPU."""
        return tokens_per_second_per_gpu(self.config, self.world_size, self.predicted)


def read_published(path: Path) -> tuple[list[PublishedRun], list[str]]:
    """The runs of a table, and a line for each row that does not describe one.

    Raises:
        UserError: the file cannot be read, or is not such a table.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--check {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    rows = list(csv.DictReader(text.splitlines()))
    if not rows or not {"model", "gpu", "n_gpus"} <= set(rows[0]):
        raise UserError(f"--check {path}: not a table with the columns model, gpu, n_gpus, …")
    runs, notes = [], []
    for number, row in enumerate(rows, start=1):
        try:
            runs.append(read_run({key: (value or "").strip() for key, value in row.items() if key}, number))
        except (UserError, ValueError) as error:
            notes.append(f"row {number}: {error}")
    return runs, notes


def read_run(row: Mapping[str, str], number: int = 1) -> PublishedRun:
    """One row.

    Raises:
        UserError: what it lacks cannot be filled in, or it cannot be laid out.
    """
    assumed: list[str] = []
    model = _model(row, assumed)
    world_size, source = int(_number(row, "n_gpus") or 1), row.get("source", "")
    machine = _machine(row, source)
    mistakes, best = "", None
    for config in _layouts(row, model, world_size, source, assumed):
        try:
            micro_batches_per_step(config, world_size)
        except ConfigError as error:
            mistakes = str(error)
            continue
        rate = tokens_per_second_per_gpu(config, world_size, step_time(config, world_size, machine))
        fits = rank_memory(config, world_size, on_gpu=True).total < machine.gpu.memory
        if best is None or (fits, rate) > best[:2]:
            best = (fits, rate, config)
    if best is None:
        raise UserError(mistakes or "no layout fits the row")
    config = best[2]
    gib = _number(row, "peak_mem_gib")
    return PublishedRun(
        number,
        source,
        config,
        world_size,
        machine,
        _measured(row, config, machine, source),
        gib and gib * 2**30,
        tuple(dict.fromkeys(assumed)),
        _label(row, config, world_size, machine),
        row["model"],
    )


def _number(row: Mapping[str, str], key: str) -> float | None:
    text = row.get(key, "").replace(",", "")
    try:
        return float(text) if text else None
    except ValueError:
        raise UserError(f"{key}={text}: not a number") from None


def _model(row: Mapping[str, str], assumed: list[str]) -> ModelConfig:
    name = row["model"].lower().replace("llama3.1", "llama3").replace("llama3.2", "llama3").replace(" ", "-")
    name = re.sub(r"llama-(\d)", r"llama\1", name).replace("nemotron4", "nemotron").replace("nemotron-4", "nemotron")
    known = _MODELS.get(name)
    columns = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab")
    given = [_number(row, key) for key in columns]
    if known is None and None in given[:2]:
        known = _of_size(_number(row, "params_b") or _size_in(name))
        assumed.append("shape from the number of parameters")
    elif None in given:
        assumed.append("shape from the model's name")
    values = [int(known[i] if value is None and known else value or 0) for i, value in enumerate(given)]
    layers, hidden, heads, groups, ffn, vocab = values
    heads = heads or hidden // 128
    groups = groups or heads
    # The GPT papers' MLP has two matrices. One with a gate and two thirds of the width has as many weights.
    plain = ffn < 0 or (abs(ffn) == 4 * hidden and name.startswith(("gpt", "nemotron")))
    ffn = abs(ffn) or 8 * hidden // 3
    return ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        intermediate_size=round(2 * ffn / 3) if plain else ffn,
        vocab_size=vocab or 128256,
        tie_word_embeddings=known[6] if known else name.startswith("gpt"),
        max_position_embeddings=1 << 20,
    )


def _size_in(name: str) -> float:
    found = re.search(r"([\d.]+)\s*b\b", name)
    if not found:
        raise UserError(f"model={name}: neither its shape nor its number of parameters is known")
    return float(found[1])


def _of_size(billions: float) -> tuple[int, int, int, int, int, int, bool]:
    """A Llama of about that many parameters: 12 · layers · width², and a layer for each 110 of width."""
    hidden = max(256, round((billions * 1e9 * 110 / 12) ** (1 / 3) / 256) * 256)
    layers = max(1, round(billions * 1e9 / (12 * hidden * hidden)))
    return layers, hidden, max(hidden // 128, 1), max(hidden // 128, 1), 8 * hidden // 3, 128256, False


def _machine(row: Mapping[str, str], source: str) -> Machine:
    gpu, text, words = find_gpu(row["gpu"], "gpu"), row.get("precision", "").lower(), source.lower()
    kind = "16"
    if "nvfp4" in text or "fp4" in text:
        kind = "nvfp4"
    elif "mx" in text or "finer" in text:
        kind = "mxfp8"
    elif "fp8" in text or "float8" in text:
        kind = "fp8_rowwise" if "rowwise" in text else "fp8"
    if "torchtitan" in words:
        h200 = "h200" in words
        stack = find_stack("torchtitan" if h200 or "compile" in words or "Table 4" in source else "torchtitan-eager")
        if "asynctp" in words.replace(" ", ""):
            stack = replace(stack, tensor_overlap=stack.tensor_overlap_asynchronous)
    elif "nanotron" in words:
        stack = find_stack("nanotron")
    elif "nemo 24" in words or "24.0" in words:
        stack = find_stack("nemo-2024")
    elif "deepspeed)" in words:
        stack = find_stack("deepspeed")
    elif gpu.name.startswith(("a100", "v100")):
        stack = find_stack("megatron-2021")
    else:
        stack = find_stack("megatron")
    return Machine(gpu, stack, kind)


def _layouts(
    row: Mapping[str, str], model: ModelConfig, world_size: int, source: str, assumed: list[str]
) -> Iterator[PretrainConfig]:
    """What the row may mean: one layout, or several where it leaves sizes open."""
    given = {key: int(value) for key in ("tp", "pp", "cp", "vpp", "mbs", "gbs", "seq") if (value := _number(row, key))}
    assumed += [key for key in ("tp", "pp", "mbs", "gbs", "seq") if key not in given]
    text = source.lower()
    interleaves = "interleaved schedule" in text or "nemo" in text
    ranks = re.search(r"model-parallel size (\d+)", source)
    pairs = [
        (tensor, stages)
        for tensor in ([given["tp"]] if "tp" in given else [1, 2, 4, 8])
        for stages in ([given["pp"]] if "pp" in given else [1, 2, 4, 8, 12, 16, 24, 32, 64])
        if not ranks or tensor * stages == int(ranks[1])
    ]
    recompute = row.get("recompute", "").lower()
    text = source.lower()
    micros = [given["mbs"]] if "mbs" in given else [1, 2, 4, 8, 16]
    # torchtitan tells what a replica takes in a step, and cuts it into as many micro-batches as there are stages.
    if (local := re.search(r"local batch (\d+)", source)) and "mbs" not in given and given.get("pp", 1) > 1:
        micros = [max(1, int(local[1]) // given["pp"])]
    each = 1 if local else 4
    # Only these sources interleave chunks without saying how many.
    open_chunks = [1, 2, 5] if interleaves and "vpp" not in given else [given.get("vpp", 1)]
    for (tensor, stages), micro, chunks in product(pairs, micros, open_chunks):
        if chunks > 1 and stages == 1:
            if chunks != open_chunks[0]:
                continue
            chunks = 1
        parallel = ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=given.get("cp", 1),
            sequence_parallel=tensor > 1 and "no sp" not in recompute and "2104.04473" not in text,
            use_distributed_optimizer="2104.04473" not in text and "zero-0" not in text,
            fully_sharded="fsdp" in text or "zero-3" in text,
        )
        config = PretrainConfig(model=model, parallel=parallel, lora=LoraConfig(enabled="lora" in text))
        if world_size % (tensor * stages * given.get("cp", 1)):
            continue
        replicas = data_parallel_size(config, world_size)
        yield replace(
            config,
            training=TrainingConfig(
                sequence_length=given.get("seq", 4096),
                micro_batch_size=micro,
                global_batch_size=given.get("gbs", micro * replicas * (each * stages if stages > 1 else 1)),
                recompute="full" if "full" in recompute else "selective" if "selective" in recompute else "none",
            ),
        )


def _measured(row: Mapping[str, str], config: PretrainConfig, machine: Machine, source: str) -> float | None:
    """Tokens/s and GPU. Sources that tell FLOP/s count all pairs of tokens; the GPT papers' count recomputation too."""
    if rate := _number(row, "tokens_per_s_gpu"):
        return rate
    model, length = config.model, config.training.sequence_length
    tera = _number(row, "tflops_per_gpu")
    if tera and ("HFU" in source or "hardware" in source):
        extra = length / (6 * model.hidden_size) + model.vocab_size / (16 * model.num_layers * model.hidden_size)
        return tera * 1e12 / (96 * model.num_layers * model.hidden_size**2 * (1 + extra))
    flops = tera * 1e12 if tera else (_number(row, "mfu") or 0) * machine.gpu.peak["16"]
    from vishwamai_mp.planning.flops import forward_flops_per_token

    assert model.head_dim is not None
    all_pairs = model.num_layers * 2 * (length - 1) * model.num_attention_heads * model.head_dim
    return flops / (3 * (forward_flops_per_token(model, length) + all_pairs)) or None


def _label(row: Mapping[str, str], config: PretrainConfig, world_size: int, machine: Machine) -> str:
    parallel, training = config.parallel, config.training
    return (
        f"{row['model']} {world_size}×{row['gpu']} t{parallel.tensor_model_parallel_size}"
        f" p{parallel.pipeline_model_parallel_size} v{parallel.virtual_pipeline_model_parallel_size or 1}"
        f" c{parallel.context_parallel_size} b{training.micro_batch_size} s{training.sequence_length}"
        f"{' sharded' if parallel.fully_sharded else ''} {machine.format}"
        f"{' async' if machine.stack.tensor_overlap == machine.stack.tensor_overlap_asynchronous else ''}"
        f" {training.recompute}"
    )
