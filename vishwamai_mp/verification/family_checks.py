"""One check after another of a Hugging Face folder, each of what a user would do with it.

Nothing in the folder is run or changed; what is written lies in a folder of the caller's, who removes it. One model is
held in memory at a time, except that training needs its gradients and the optimizer's state besides.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
import torch
from torch import Tensor

from vishwamai_mp.checkpoint import CheckpointManager
from vishwamai_mp.config import ConfigError, PretrainConfig, UserError, load_config, resolve
from vishwamai_mp.config.errors import one_line
from vishwamai_mp.config.wording import counted
from vishwamai_mp.conversion import components, model_config, safetensors_files
from vishwamai_mp.conversion.dtypes import FP32
from vishwamai_mp.conversion.families import Family, family_of
from vishwamai_mp.conversion.folder import Folder, open_folder
from vishwamai_mp.conversion.from_hf import import_folder
from vishwamai_mp.conversion.journal import check_space
from vishwamai_mp.conversion.rows import Piece, RowReader
from vishwamai_mp.conversion.source import open_source
from vishwamai_mp.conversion.to_hf import ExportOptions, export_folder
from vishwamai_mp.conversion.verify import Comparison, compare, require_transformers, steady_length
from vishwamai_mp.inference import Engine
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.planning.parameters import parameter_count
from vishwamai_mp.runtime import Runtime, distributed_session
from vishwamai_mp.verification.cut_folder import write_first_layers
from vishwamai_mp.verification.findings import FAILS, HOLDS, LEFT_OUT, Finding, Report
from vishwamai_mp.verification.gloo_ranks import release_memory
from vishwamai_mp.verification.short_training import LAYOUTS, train, training_config

RunRanks = Callable[..., list[Any]]
_LOGITS_TOLERANCE = 1e-4  # of the largest logit
_OWN_TOLERANCE = 1e-5  # of the largest logit, between two ways of this package's, at least
_ROUNDINGS = 2  # times what moving each weight by its last bit changes
_LOSS_TOLERANCE = 1e-6  # of the loss
_TRAINING_BYTES = 18  # per parameter in fp32: weight, gradient, two moments, and copies in passing
_PROCESS_BYTES = 1 << 30  # the stack itself, and what a short text needs
_TEXT, _PIECES = 40, (17, 1, 1, 4, 1, 8, 1, 7)  # tokens; read in these pieces
_LORA = ["lora.enabled=true", "lora.rank=4"]
_LORA_LEARNING_RATE = 3e-2  # so that two steps change something
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Work:
    """What checks share: the folder, and where they write."""

    folder: Folder
    family: type[Family]
    place: Path

    @property
    def run(self) -> Path:
        return self.place / "run"

    @property
    def exported(self) -> Path:
        return self.place / "exported"

    @cached_property
    def own_tolerance(self) -> float:
        """How far logits of two ways of this package's may be apart, of the largest logit.

        Each way rounds elsewhere, and how far that reaches differs from model to model. It is measured: each weight is
        moved by its last bit.
        """
        with _loaded(self) as (config, _, model, text):
            vocab_size, random = config.model.vocab_size, torch.Generator().manual_seed(2)
            whole = _logits(model, text, vocab_size)
            for weight in model.parameters():
                weight.data *= 1 + (2 * torch.randint(2, weight.shape, generator=random) - 1) * 2**-23
            moved = float((_logits(model, text, vocab_size) - whole).abs().max() / whole.abs().max())
        return max(_OWN_TOLERANCE, _ROUNDINGS * moved)

    @property
    def is_quantized(self) -> bool:
        return any(entry.scales for entry in self.folder.entries.values())


def verify(
    folder: Path,
    place: Path,
    run_ranks: RunRanks,
    *,
    layers: int | None = None,
    layouts: Sequence[str] | None = None,
    tokens: int = 64,
    say: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Make all checks.

    Args:
        folder: the Hugging Face folder.
        place: an empty folder to write to.
        run_ranks: runs a function as the ranks of a job, as `GlooRanks` does.
        layers: verify the first so many alone; None: all.
        layouts: names of `LAYOUTS`, the first of which the others are compared with; None: TP1 and the first other
            that the model can be laid out at.
        tokens: greedy tokens to compare per prompt.
        say: is told each finding as it is made.

    Raises:
        UserError: not a folder that can be imported, no transformers, or not enough memory or disk.
    """
    require_transformers()
    described = model_config.read_config(folder)
    family = family_of(described, folder / "config.json")
    opened = open_folder(folder)
    all_layers = opened.config.model.num_layers
    if layers is not None and not 0 < layers < all_layers:
        raise UserError(f"--layers {layers}: the model has {all_layers}; name fewer, from 1, or leave it out for all")
    _check_room(opened, layers or all_layers, place)
    if layers is not None:
        write_first_layers(folder, family, layers, place / "first-layers")
        opened = open_folder(place / "first-layers")
    work = _Work(opened, family, place)
    model = opened.config.model
    report = Report(
        str(folder), family.architecture, parameter_count(model), model.num_layers, all_layers, notes=[*opened.notes]
    )
    for name, check in (
        ("import", lambda: _import(work)),
        ("logits, greedy tokens", lambda: _compare(work, tokens)),
        ("export", lambda: _export(work)),
        ("training", lambda: _train(work, layouts, run_ranks)),
        ("decoding", lambda: _decode(work)),
        ("LoRA", lambda: _adapters(work, run_ranks)),
    ):
        for finding in _made(name, check):
            report.findings.append(finding)
            say(finding)
    return report


def _made(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; an error is a finding too, for the others may still hold."""
    release_memory()
    try:
        return check()
    except MemoryError:
        raise UserError(f"memory ran out ({name}); verify the first layers alone, with --layers N") from None
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return [Finding(name, FAILS, f"{kind}{one_line(error)}")]


def _check_room(folder: Folder, layers: int, place: Path) -> None:
    """Refuse what this machine has not the memory or the disk for."""
    model = folder.config.model

    def needed(count: int) -> int:
        return parameter_count(replace(model, num_layers=count)) * _TRAINING_BYTES + 2 * _PROCESS_BYTES

    free = _free_memory()
    if needed(layers) > free:
        fits = max((count for count in range(1, layers) if needed(count) <= free), default=0)
        mend = f"verify the first layers alone, with --layers {fits}" if fits else "not even one layer fits"
        raise UserError(
            f"{folder.path}: training {counted(layers, 'layer')} needs {needed(layers) / 1e9:.1f} GB of memory"
            f" ({_TRAINING_BYTES} bytes a parameter), {free / 1e9:.1f} GB are free; {mend}"
        )
    parameters = parameter_count(replace(model, num_layers=layers))
    # The import, the checkpoint with adapters and its export, each in fp32 at most; and the first layers' own folder.
    copies = 4 if layers < model.num_layers else 3
    check_space(place, copies * FP32.size * parameters, f"--work-dir {place.parent}")


def _free_memory() -> int:
    """Bytes, of the machine and of the control group that this process may be in."""
    free = [psutil.virtual_memory().available]
    try:
        most, used = ((_CGROUP / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        free.append(int(most) - int(used))  # "max" where there is no limit
    except (OSError, ValueError):
        pass
    return min(free)


def _import(work: _Work) -> list[Finding]:
    # Numbers in blocks times their scales have more digits than bf16: transformers' in fp32 are these.
    import_folder(work.folder, work.run, FP32 if work.is_quantized else None)
    files = {entry.path for entry in work.folder.entries.values()}
    return [Finding("import", HOLDS, f"{counted(len(work.folder.entries), 'tensor')} of {counted(len(files), 'file')}")]


def _compare(work: _Work, tokens: int) -> list[Finding]:
    room = steady_length(work.folder.config.model)
    found = compare(
        open_source(work.run, work.family), work.folder.path, [], min(tokens, room - 1), _LOGITS_TOLERANCE, rounds=False
    )
    relative = found.difference / found.largest_logit if found.largest_logit else math.inf
    greedy = found.tokens - found.different_tokens
    seen = _difference(found, relative, _LOGITS_TOLERANCE)
    return [
        _finding("logits", relative <= _LOGITS_TOLERANCE, f"beside transformers' in fp32, {seen}", relative=relative),
        _finding(
            "greedy tokens",
            not found.different_tokens,
            f"{greedy} of {found.tokens} are transformers'",
            equal=greedy,
            tokens=found.tokens,
        ),
    ]


def _difference(found: Comparison, relative: float, tolerance: float) -> str:
    worst = f"; worst: {found.worst}" if found.worst else ""
    return f"{relative:.1e} of the largest apart (allowed: {tolerance:.0e}){worst}"


def _finding(check: str, holds: bool, seen: str, **figures: float) -> Finding:
    return Finding(check, HOLDS if holds else FAILS, seen, figures)


def _export(work: _Work) -> list[Finding]:
    export_folder(open_source(work.run, work.family), work.exported, ExportOptions())
    with _removed(work.exported):
        ours, theirs = safetensors_files.read_folder(work.exported), work.folder.entries
        names = sorted(ours.keys() | theirs.keys())
        different = [
            name
            for name in names
            if name not in ours or name not in theirs or not safetensors_files.are_equal(ours[name], theirs[name])
        ]
        keys = _different_keys(work)
    said = f"config.json differs in {', '.join(keys)}" if keys else "config.json says the same"
    of_config = _finding("export: config", not keys, said)
    if work.is_quantized:
        return [
            Finding("export: tensors", LEFT_OUT, "the folder's matrices are FP8 in blocks, the export's are not"),
            of_config,
        ]
    some = f", {different[0]} among them" if different else ""
    return [
        _finding(
            "export: tensors",
            not different,
            f"{len(names) - len(different)} of {len(names)} tensors are the folder's, bit by bit{some}",
            equal=len(names) - len(different),
            tensors=len(names),
        ),
        of_config,
    ]


def _different_keys(work: _Work) -> list[str]:
    """Keys of `config.json` that say something else after the round trip, to this package or to transformers."""
    paths = work.folder.path, work.exported
    configs = [model_config.read_config(path) for path in paths]
    ours = [
        model_config.from_hf(config, path / "config.json", work.family).model
        for config, path in zip(configs, paths, strict=True)
    ]
    different = {f"model.{key}" for key in vars(ours[0]) if getattr(ours[0], key) != getattr(ours[1], key)}
    if work.family.architecture != components.ARCHITECTURE:  # whose configuration is code
        from transformers import AutoConfig

        read = [
            AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True).to_dict() for path in paths
        ]
        for one in read:  # a base of kinds of layers that the model has not says nothing
            unused = {"full_attention", "sliding_attention"} - set(one.get("layer_types") or ())
            rope = one.get("rope_parameters") or {}
            one["rope_parameters"] = {key: value for key, value in rope.items() if key not in unused}
        different |= {
            key
            for key in read[0].keys() | read[1].keys()
            if not model_config.is_neutral(key)
            and _contradict(read[0].get(key), read[1].get(key), model_config.is_read(key, work.family))
        }
    return sorted(different)


def _contradict(one: Any, other: Any, read: bool) -> bool:
    """Whether two values of a key of `config.json` differ.

    Of a key that this package reads, what only one of them says may be the default, and its own reading decides.
    """
    if read and isinstance(one, dict) and isinstance(other, dict):
        return any(_contradict(one[key], other[key], read) for key in one.keys() & other.keys())
    return one != other and not (read and (one is None or other is None))


def _train(work: _Work, layouts: Sequence[str] | None, run_ranks: RunRanks) -> list[Finding]:
    """Two steps at each layout. Where none is asked for, the second is the first that the model can be laid out at."""
    names = list(layouts or LAYOUTS)
    refused: dict[str, str] = {}
    losses: dict[str, list[float]] = {}
    for name in names:
        processes, settings = LAYOUTS[name]
        try:
            training_config(work.run, settings, processes)
        except ConfigError as error:
            refused[name] = one_line(error)
            continue
        losses[name] = run_ranks(train, processes, work.run, settings, 2)[0]
        release_memory()  # of this process, where it is the job
        if layouts is None and len(losses) == 2:
            break
    found = [Finding(f"training: {name}", LEFT_OUT, why) for name, why in refused.items()]
    if len(losses) < 2:
        return [*found, Finding("training", LEFT_OUT, "the model can be laid out at one layout only")]
    first, *others = losses
    start = losses[first]
    said = ", ".join(f"{loss:.6f}" for loss in start)
    for name in others:
        apart = max(abs(a - b) / abs(a) for a, b in zip(start, losses[name], strict=True))
        seen = f"two losses as at {first} ({said}), {apart:.1e} apart (allowed: {_LOSS_TOLERANCE:.0e})"
        is_equal = apart <= _LOSS_TOLERANCE and start[0] != start[1]
        found.append(_finding(f"training: {name}", is_equal, seen, relative=apart))
    return found


def _decode(work: _Work) -> list[Finding]:
    """Logits of a text read in pieces, from keys and values in blocks, beside those of one pass over it."""
    allowed = work.own_tolerance
    with _loaded(work) as (config, runtime, ours, text):
        engine, sequence, rows = Engine(config, runtime, ours, kv_tokens=256), KvSequence(), []
        for piece in _pieces(text):
            output = engine.run([(sequence, piece)], every_token=True)
            assert output.logits is not None
            rows.append(output.logits.values[:, : config.model.vocab_size])
        whole = _logits(ours, text, config.model.vocab_size)
        relative = float((torch.cat(rows) - whole).abs().max() / whole.abs().max())
    pieces = counted(len(rows), "piece")
    seen = f"{len(text)} tokens in {pieces}, logits {relative:.1e} of the largest apart from one pass over all"
    return [_finding("decoding", relative <= allowed, f"{seen} (allowed: {allowed:.0e})", relative=relative)]


@contextmanager
def _loaded(work: _Work) -> Iterator[tuple[PretrainConfig, Runtime, VishwamAIModel, list[int]]]:
    """The imported model in this process, ready to answer, and a text for it."""
    model = work.folder.config.model
    count = min(_TEXT, steady_length(model) - 1)
    text = torch.randint(model.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = ["precision=fp32", f"training.sequence_length={model.max_position_embeddings}"]
    config = resolve(load_config(work.run / "config.yaml", settings), 1)
    checkpoint = work.run / "checkpoints/step_00000000"
    with distributed_session(config) as runtime:
        (ours,) = build_model(config, runtime, initialize=False)
        CheckpointManager(checkpoint.parent, config, runtime).load(checkpoint, [ours])
        yield config, runtime, ours.eval(), text


@torch.inference_mode()
def _logits(model: VishwamAIModel, text: list[int], vocab_size: int) -> Tensor:
    """Of one pass over the text, (T, V)."""
    return model(torch.tensor([text]))[:, 0, :vocab_size].float()


def _pieces(text: list[int]) -> Iterator[list[int]]:
    start = 0
    for count in _PIECES:
        if start < len(text):
            yield text[start : start + count]
        start += count


def _adapters(work: _Work, run_ranks: RunRanks) -> list[Finding]:
    """Train adapters for two steps; the checkpoint, adapters beside, and its export, adapters merged, are compared."""
    adapted, merged = work.place / "adapted", work.place / "merged"
    try:
        training_config(work.run, _LORA, 1)
    except ConfigError as error:
        return [Finding("LoRA", LEFT_OUT, one_line(error))]
    run_ranks(train, 1, work.run, _LORA, 2, _LORA_LEARNING_RATE, adapted)
    release_memory()
    source = open_source(adapted, work.family)
    export_folder(source, merged, ExportOptions(dtype=FP32))
    with _removed(adapted, merged):
        found = compare(source, merged, [], min(16, steady_length(work.folder.config.model) - 1), work.own_tolerance)
        change = _change(work, merged)
    relative = found.difference / found.largest_logit if found.largest_logit else math.inf
    seen = _difference(found, relative, work.own_tolerance)
    holds = relative <= work.own_tolerance and not found.different_tokens and change > 0
    return [
        _finding(
            "LoRA",
            holds,
            f"merged into the weights (by {change:.1e} of the largest weight), logits are {seen}",
            relative=relative,
        )
    ]


def _change(work: _Work, merged: Path) -> float:
    """What merging changed of the first layer's output projection, relative to its largest weight."""
    tensors = []
    for folder in (work.folder, open_folder(merged, own=work.family)):
        mapped = next(one for one in folder.mapping if one.name == "decoder.layers.0.self_attention.linear_proj.weight")
        reader = RowReader(folder)
        tensors.append(reader.read(Piece(mapped, FP32, 0, mapped.shape[0])))
        reader.close()
    return float((tensors[1] - tensors[0]).abs().max() / tensors[0].abs().max())


@contextmanager
def _removed(*folders: Path) -> Iterator[None]:
    """Remove them afterwards."""
    yield
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
