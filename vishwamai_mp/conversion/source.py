"""A checkpoint that is to be exported: what it holds, checked against the table of tensors."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vishwamai_mp.checkpoint.manifest import NAME, Manifest, check_files, is_optimizer, read_manifest
from vishwamai_mp.checkpoint.store import locate
from vishwamai_mp.config import LoraConfig, PretrainConfig, UserError, load_config, resolve
from vishwamai_mp.config.extensions import is_own
from vishwamai_mp.config.finetuning import ADAPTER_STATE
from vishwamai_mp.config.resolve_fp8 import SCALING_STATE
from vishwamai_mp.conversion import components
from vishwamai_mp.conversion.families import Family, family_holding
from vishwamai_mp.conversion.mapping import Mapped, nearest, plain_mapping


@dataclass(frozen=True)
class Source:
    """A whole checkpoint.

    Attributes:
        path: its folder.
        run: the run folder that it lies in.
        manifest: its.
        config: of its model, on one process; with its adapters, where it has any.
        family: of the folder that it becomes.
        value_head: whether it has one.
        mapping: its tensors, in the order of the export.
        skipped: newer checkpoints that are not whole.
        digest: names this checkpoint's content.
    """

    path: Path
    run: Path
    manifest: Manifest
    config: PretrainConfig
    family: type[Family]
    value_head: bool
    mapping: list[Mapped]
    skipped: list[str]
    digest: str


def open_source(load: Path, wanted: type[Family] | None = None) -> Source:
    """The checkpoint that `load` means: a run folder, its checkpoints folder, or one checkpoint.

    Args:
        load: that path.
        wanted: the family that the model is to be exported as; None: the first that holds it.

    Raises:
        UserError: none, not whole, its tensors are not those of its model, or no family holds the model.
    """
    found = locate(load.resolve())  # absolute, for the run folder is two levels up
    path = found.path
    assert path is not None
    manifest = read_manifest(path)
    problems = check_files(path, manifest.files, checksums=False)
    if problems:
        raise UserError(f"{path} is not whole: {problems[0]}")
    config = _config(path, manifest)
    tensors = {
        name: tuple(record.shape)
        for name, record in manifest.tensors.items()
        if not is_optimizer(name) and not name.endswith(SCALING_STATE)
    }
    value_head = components.has_value_head(tensors)
    has_components = config.memory.enabled or config.cache.enabled or value_head
    family = family_holding(config.model, wanted, has_components)
    table = [*plain_mapping(config.model, family.weights), *components.component_mapping(config, value_head)]
    _check(path, tensors, [*table, *_adapters(table, config.lora)])
    digest = hashlib.sha256((path / NAME).read_bytes()).hexdigest()
    return Source(path, path.parent.parent, manifest, config, family, value_head, table, found.skipped, digest)


def check_exportable(config: PretrainConfig) -> None:
    """Raise `UserError` where a checkpoint of this model could not be exported.

    Args:
        config: resolved.
    """
    _refuse_own_attention(config.model.attention, "the model")
    components_in = config.memory.enabled or config.cache.enabled or config.tree.enabled  # the last: the value head
    family_holding(config.model, None, components_in)


def _refuse_own_attention(attention: str, where: str) -> None:
    if is_own(attention):
        raise UserError(f"{where} has model.attention={attention}, which no other program has; it cannot be exported")


def adapter_names(mapped: Mapped, lora: LoraConfig) -> tuple[str, str] | None:
    """Names of A and B of the adapter that a tensor has; None: it has none."""
    layer = mapped.name.removesuffix(".weight")
    if not lora.enabled or not layer.endswith(tuple(lora.targets)):
        return None
    first, second = (layer + ending for ending in ADAPTER_STATE)
    return first, second


def _adapters(table: list[Mapped], lora: LoraConfig) -> list[Mapped]:
    """Tensors of adapters: of a checkpoint, but of no Hugging Face model."""
    found = []
    for mapped in table:
        if names := adapter_names(mapped, lora):
            outputs, inputs = mapped.shape
            found += [Mapped(names[0], (lora.rank, inputs), ()), Mapped(names[1], (outputs, lora.rank), ())]
    return found


def _config(path: Path, manifest: Manifest) -> PretrainConfig:
    """The run's sections that make up the model; the model itself from the checkpoint's manifest."""
    recipe = path.parent.parent / "config.yaml"
    _refuse_own_attention(manifest.model.get("attention", ""), str(path))
    sections: dict[str, Any] = {}
    adapted = any(name.endswith(ADAPTER_STATE) for name in manifest.tensors)
    if recipe.is_file():
        saved = load_config(recipe)
        # State that is carried from batch to batch is training's, and asks for a certain length of sequence.
        sections = {name: {**asdict(getattr(saved, name)), "carry_state": False} for name in ("memory", "cache")}
        sections["lora"] = {**asdict(saved.lora), "enabled": adapted}
    elif adapted or any(".memory." in name or ".cache." in name for name in manifest.tensors):
        raise UserError(f"{recipe} is missing; without it the components and adapters of {path} cannot be told")
    length = manifest.model["max_position_embeddings"]
    tree = {"model": manifest.model, "training": {"sequence_length": length}}
    precision = manifest.precision if manifest.precision in ("fp32", "fp16") else "bf16"
    return resolve(load_config({**tree, "precision": precision, **sections}))


def _check(path: Path, tensors: dict[str, tuple[int, ...]], table: list[Mapped]) -> None:
    expected = {mapped.name: mapped for mapped in table}
    for name, mapped in expected.items():
        if name not in tensors:
            raise UserError(f"{path} lacks {name}{nearest(name, tensors.keys() - expected.keys())}")
        shape = tensors[name]
        padded = mapped.is_vocabulary and shape[0] >= mapped.shape[0] and shape[1:] == mapped.shape[1:]
        if shape != mapped.shape and not padded:
            raise UserError(f"{path}: {name} has the shape {shape}, the model's is {mapped.shape}")
    # The state of FP8's delayed scaling is left behind: it forms anew.
    extra = sorted(name for name in tensors.keys() - expected.keys() if not name.endswith(SCALING_STATE))
    if extra:
        hint = nearest(extra[0], expected)
        raise UserError(f"{path} has {extra[0]}, which has no place in a Hugging Face model{hint}")
