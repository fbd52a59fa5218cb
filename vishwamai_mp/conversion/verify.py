"""Are a checkpoint and a Hugging Face folder the same model? Both compute logits and greedy tokens, in fp32.

One model is held at a time. A folder's own Python code is never run: where its model has components, its code must be,
byte by byte, what this package exports, and the package's copy is run. Shapes: T tokens, V vocabulary.
"""

import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vishwamai_mp.checkpoint import CheckpointManager
from vishwamai_mp.config import ModelConfig, UserError, resolve
from vishwamai_mp.config.wording import counted, lacks
from vishwamai_mp.conversion import block_scaled, components, dtypes, model_config
from vishwamai_mp.conversion.dtypes import BF16, FP8, FP32, DType
from vishwamai_mp.conversion.families import Family, model_types
from vishwamai_mp.conversion.source import Source
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.model.rotary import frequency_length
from vishwamai_mp.runtime import distributed_session

_PROMPT_LENGTHS = (3, 17, 40)


@dataclass(frozen=True)
class Comparison:
    """What came of it.

    Attributes:
        difference: largest between two logits.
        largest_logit: in absolute value, of the checkpoint's model.
        tokens: chosen greedily on both sides.
        different_tokens: those that differ though their logits are not equal within the tolerance.
        tolerance: of a difference, times the largest logit where that exceeds 1.
        worst: the part whose own output differs most from the same part's on the other side, fed the same; told only
            if the comparison fails.
    """

    difference: float
    largest_logit: float
    tokens: int
    different_tokens: int
    tolerance: float
    worst: str | None = None

    @property
    def is_equal(self) -> bool:
        return self.difference <= self.limit and not self.different_tokens

    @property
    def limit(self) -> float:
        """What the difference may be."""
        return self.tolerance * max(1.0, self.largest_logit)

    def describe(self) -> str:
        text = (
            f"logits differ by {self.difference:.2e} at most (allowed: {self.limit:.2e}),"
            f" {self.different_tokens} of {self.tokens} greedy tokens differ"
        )
        return f"{text}; worst: {self.worst}" if self.worst else text


def compare(
    source: Source,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    tolerance: float = 1e-5,
    rounds: bool = True,
) -> Comparison:
    """Run both models on the prompts and on what they continue them with.

    The checkpoint's weights are rounded first as the folder's are, if the folder was exported from it. Its greedy
    tokens are read off one forward pass over the folder's model's: they are the same exactly if its choice at every
    place is.

    Args:
        source: the checkpoint.
        folder: the Hugging Face folder.
        prompts: token ids; none: some drawn at random.
        new_tokens: to generate for each.
        tolerance: of logits, see `Comparison`.
        rounds: False: the checkpoint has the folder's own numbers, of whatever type.

    Raises:
        UserError: a prompt that the model has no room for, or a folder with code that is not ours.
    """
    config = model_config.read_config(folder)
    family = source.family
    _refuse_foreign_code(folder, config, family)
    prompts = prompts or random_prompts(source, new_tokens)
    check_prompts(source, prompts, new_tokens)
    with _hugging_face(folder, config, family) as model:
        rows = [_greedy(model, prompt, new_tokens) for prompt in prompts]
        theirs = [model(row[None]).logits[0] for row in rows]
    rounding = FP32 if not rounds else FP8 if config.get("quantization_config") else _dtype_of(config)
    with _checkpoint(source, rounding) as ours_model:
        ours = [_logits(ours_model, row, source.config.model.vocab_size) for row in rows]
        result = _compare(ours, theirs, rows, [len(prompt) for prompt in prompts], tolerance)
        if result.is_equal:
            return result
        outputs = _layer_outputs(ours_model, rows[-1])
    with _hugging_face(folder, config, family) as model:
        return replace(result, worst=_worst(model, rows[-1], outputs, ours[-1]))


def random_prompts(source: Source, new_tokens: int) -> list[list[int]]:
    """A few short prompts, the same at every call."""
    model = source.config.model
    generator = torch.Generator().manual_seed(0)
    room = max(1, steady_length(model) - new_tokens)
    return [
        torch.randint(model.vocab_size, (min(length, room),), generator=generator).tolist()
        for length in _PROMPT_LENGTHS
    ]


def steady_length(model: ModelConfig) -> int:
    """The longest text, in tokens, whose rotary frequencies are those of its beginning; see `check_prompts`."""
    scaling, context = model.rope_scaling, model.max_position_embeddings
    if scaling and scaling.rope_type in ("dynamic", "longrope"):
        return min(context, scaling.original_max_position_embeddings)
    return context


def check_prompts(source: Source, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Refuse prompts that cannot be compared on.

    Raises:
        UserError: one is empty, or the model has no room for it and the new tokens.
    """
    model, cache = source.config.model, source.config.cache
    held = cache.max_cache_length // cache.latents_per_segment * cache.segment_length
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt is empty; give at least one token")
        if len(prompt) + new_tokens > model.max_position_embeddings:
            raise UserError(
                f"a prompt of {counted(len(prompt), 'token')} and {new_tokens} new ones exceed the model's context of"
                f" {model.max_position_embeddings}; shorten the prompt or lower --tokens"
            )
        lengths = (len(prompt), len(prompt) + new_tokens)
        if len({frequency_length(model, length) for length in lengths}) > 1:
            # One pass turns all tokens as the longest text's; the first new ones were chosen by a shorter one's.
            assert model.rope_scaling is not None
            raise UserError(
                f"a prompt of {counted(len(prompt), 'token')} and {new_tokens} new ones change their rotary frequencies"
                f" beyond {model.rope_scaling.original_max_position_embeddings} tokens; shorten the prompt or lower"
                " --tokens"
            )
        if cache.enabled and len(prompt) + new_tokens > held:
            # What generation has dropped by then, one pass over the whole text still reads.
            raise UserError(
                f"a prompt of {counted(len(prompt), 'token')} and {new_tokens} new ones exceed the {held} that the"
                " model's cache holds; shorten the prompt or lower --tokens"
            )


def _dtype_of(config: dict[str, Any]) -> DType:
    name = config.get("torch_dtype") or config.get("dtype") or "float32"
    return dtypes.of_manifest(name, "config.json")


def _compare(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], rows: Sequence[Tensor], starts: Sequence[int], tolerance: float
) -> Comparison:
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    largest = max(float(a.abs().max()) for a in ours)
    limit = tolerance * max(1.0, largest)
    different = count = 0
    for logits, row, start in zip(ours, rows, starts, strict=True):
        chosen = logits[start - 1 : -1]
        gaps = chosen.amax(-1) - chosen.gather(-1, row[start:, None])[:, 0]
        different += int((gaps > limit).sum())
        count += len(gaps)
    difference = float("inf") if difference != difference else difference  # NaN is never equal
    return Comparison(difference, largest, count, different, tolerance)


def require_transformers() -> None:
    """Refuse to begin what ends with a comparison where there is nothing to compare with.

    Raises:
        UserError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError(lacks("verifying", "transformers"))


@contextmanager
def _hugging_face(folder: Path, config: dict[str, Any], family: type[Family]) -> Iterator[Any]:
    has_components = _refuse_foreign_code(folder, config, family)
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    if has_components:
        from vishwamai_mp.conversion.remote_code.modeling_vishwamai import VishwamaiForCausalLM as loader  # noqa: N813
    options = {"dtype": torch.float32, "trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    model = loader.from_pretrained(folder, **options).float().eval()  # quantized ones come as bf16
    model.generation_config = transformers.GenerationConfig()  # a folder's own may penalize repetition, or sample
    with torch.no_grad():
        yield model
    del model
    gc.collect()


def _refuse_foreign_code(folder: Path, config: dict[str, Any], family: type[Family]) -> bool:
    """Whether the folder's model has components; it is of a known family, or of `family`, the checkpoint's.

    Raises:
        UserError: transformers would run or load something of the folder that this package did not write.
    """
    architecture = (config.get("architectures") or [None])[0]
    has_components = architecture == components.ARCHITECTURE
    known = {**model_types(), family.architecture: family.model_type}
    model_type, expected = config.get("model_type"), known.get(architecture)
    if model_type is None or model_type != expected:
        raise UserError(f"{folder}/config.json: model_type={model_type} of a {architecture}; expected {expected}")
    auto_map, expected_map = config.get("auto_map"), components.AUTO_MAP if has_components else None
    if auto_map != expected_map:
        raise UserError(f"{folder}/config.json: auto_map={auto_map} names foreign code, which is not run")
    code = {folder / name: content for name, content in components.code_files().items()} if has_components else {}
    for file in sorted({*code, *folder.rglob("*.py")}):
        if not file.is_file() or file.read_bytes() != code.get(file):
            raise UserError(f"{file} is not the code of this version of vishwamai_mp; it is not run")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} has adapters of PEFT beside its model (adapter_config.json); take them out")
    return has_components


@contextmanager
def _checkpoint(source: Source, rounding: DType) -> Iterator[VishwamAIModel]:
    config = resolve(replace(source.config, precision="fp32"), 1)
    with distributed_session(config) as runtime:
        (model,) = build_model(config, runtime, initialize=False)
        CheckpointManager(source.path.parent, config, runtime).load(source.path, [model])
        with torch.no_grad():
            _round(source, model, rounding)
            yield model.eval()


def _round(source: Source, model: nn.Module, dtype: DType) -> None:
    """Give the parameters the values that they have in a folder of this type."""
    table = {mapped.name: mapped for mapped in source.mapping}
    for name, parameter in model.named_parameters():
        parts = table[name].parts if name in table and dtype is FP8 else ()
        if not any(block_scaled.is_block_scaled(part) for part in parts):
            kind = BF16 if dtype is FP8 else dtype
            parameter.copy_(parameter.to(kind.torch))
        for part in parts:
            if block_scaled.is_block_scaled(part):
                rows = torch.cat([torch.arange(first, last) for first, last in part.rows])
                parameter[rows] = block_scaled.dequantized(*block_scaled.quantized(parameter[rows]))


def _greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> Tensor:
    """The prompt and its continuation, (T,), which does not stop at the end of a document."""
    ids = torch.tensor([list(prompt)])
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]


def _logits(model: VishwamAIModel, row: Tensor, vocab_size: int) -> Tensor:
    return model(row[None])[:, 0, :vocab_size].float()


def _layer_outputs(model: Any, row: Tensor) -> list[Tensor]:
    """What the first layer of the checkpoint's model is given, and what each layer puts out, (1, T, D) each."""
    outputs: list[Tensor] = []

    def record_input(module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        outputs.append(options["hidden_states"].transpose(0, 1))

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden.transpose(0, 1))

    layers = list(model.decoder.layers)
    handles = [layer.register_forward_hook(record) for layer in layers]
    with _hooks([layers[0].register_forward_pre_hook(record_input, with_kwargs=True), *handles]):
        model(row[None])
    return outputs


def _worst(model: Any, row: Tensor, outputs: Sequence[Tensor], logits: Tensor) -> str:
    """Feed each of the folder's layers what the checkpoint's layer was fed, and compare what they make of it."""
    own: list[Tensor] = []
    layers = list(model.model.layers)

    def feed(hidden: Tensor) -> Callable[..., Any]:
        return lambda module, inputs: (hidden, *inputs[1:])

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        own.append(output[0] if isinstance(output, tuple) else output)

    def record_input(module: nn.Module, inputs: Any) -> None:
        own.append(inputs[0])

    handles = [layer.register_forward_hook(record) for layer in layers]
    handles.append(layers[0].register_forward_pre_hook(record_input))  # before it is fed something else
    handles += [layer.register_forward_pre_hook(feed(x)) for layer, x in zip(layers, outputs, strict=False)]
    handles.append(model.model.norm.register_forward_pre_hook(feed(outputs[-1])))
    with _hooks(handles):
        own.append(model(row[None]).logits)
    names = ["embedding", *(f"layer {number}" for number in range(len(layers))), "final norm and output layer"]
    expected = [*outputs, logits[None]]
    relative = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(own, expected, strict=True)]
    worst = max(range(len(names)), key=relative.__getitem__)
    return f"{names[worst]} (relative difference {relative[worst]:.1e})"


@contextmanager
def _hooks(handles: Any) -> Iterator[None]:
    installed = list(handles)
    yield
    for handle in installed:
        handle.remove()
