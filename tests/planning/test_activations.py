"""The formulae of activations: by hand, and against the bytes that autograd keeps of a built model."""

from typing import Any

import pytest
import torch

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.planning.activations import layer_activations, stage_activations
from vishwamai_mp.runtime.products import cpu_multiplies

# Wide enough that what the formulae leave out (positions, masks, one number per token here and there) is little.
SETTINGS = [
    "model.hidden_size=128",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=2",
    "model.intermediate_size=384",
    "training.sequence_length=256",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "model.max_position_embeddings=4096",
]


def kept(layers: int, overrides: list[str]) -> int:
    """In a worker: bytes of all storages, parameters aside, that autograd keeps of a forward pass."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from tests.model.builds import build

    config, _, (model,) = build(*SETTINGS, *overrides, f"model.num_layers={layers}")
    training = config.training
    tokens = torch.randint(0, config.model.vocab_size, (training.micro_batch_size, training.sequence_length))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    model.train()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens, labels=tokens)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def kept_of_a_layer(workers: Any, processes: int, overrides: list[str]) -> list[int]:
    """On each rank: what three layers keep beyond what one does, halved."""
    less, more = (workers.run(kept, processes, layers, overrides) for layers in (1, 3))
    return [(many - one) // 2 for one, many in zip(less, more, strict=True)]


_TENSOR = "parallel.tensor_model_parallel_size=2"
_SEQUENCE = "parallel.sequence_parallel=true"
# Where it is not multiplied, attention computes in fp32 and keeps its weights so.
_NEEDS_BF16 = pytest.mark.skipif(not cpu_multiplies(torch.bfloat16), reason="the CPU multiplies no bf16")


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, []),
        pytest.param(1, ["precision=bf16"], marks=_NEEDS_BF16),
        (1, ["model.num_key_value_heads=8"]),
        (1, ["training.recompute=selective"]),
        (1, ["training.recompute=selective", "training.recompute_modules=[core_attn,mlp]"]),
        (1, ["training.recompute=full"]),
        (1, ["training.sequence_length=2304", "training.micro_batch_size=1"]),  # torch's fused attention
        (1, ["model.attention_dropout=0.1", "model.hidden_dropout=0.1"]),
        (1, ["model.attention_softcap=5", "model.activation=geglu", "model.residual_multiplier=0.2"]),
        (2, [_TENSOR]),
        (2, [_TENSOR, _SEQUENCE]),
        (2, ["parallel.context_parallel_size=2"]),
    ],
)
def test_a_layer_keeps_what_the_formula_says(workers, processes, overrides):
    """Within 4 %."""
    from tests.model.builds import small_config

    formula = layer_activations(small_config(*SETTINGS, *overrides), on_gpu=False).kept
    for measured in kept_of_a_layer(workers, processes, overrides):
        assert measured == pytest.approx(formula, rel=0.04)


@pytest.mark.parametrize("groups", [2, 8])
def test_layers_that_are_not_turned_keep_less(workers, groups):
    """By what the formula says, within 1 %."""
    from tests.model.builds import small_config

    every = ["training.recompute=selective", f"model.num_key_value_heads={groups}"]
    some = [*every, "model.rotary_pattern=RNN"]
    measured = [workers.run(kept, 1, 3, overrides)[0] for overrides in (every, some)]
    formula = [layer_activations(small_config(*SETTINGS, *o, "model.num_layers=3"), False).kept for o in (every, some)]
    angles = 2 * 4 * 256 * 16 * 4  # two layers' cosines and sines for queries and for keys: the formula leaves them out
    assert measured[0] - measured[1] == pytest.approx(3 * (formula[0] - formula[1]) + angles, rel=0.01)
    assert formula[0] > formula[1]


def test_a_stage_keeps_its_layers_and_the_head(workers):
    """Within 2 %, without the gradient of the logits, which forward passes do not make."""
    from tests.model.builds import small_config

    overrides = ["model.vocab_size=2000", "model.num_layers=3"]
    config = small_config(*SETTINGS, *overrides)
    logits = 2 * 256 * 2048 * 4
    formula = stage_activations(config, 0, micro_batches=1, on_gpu=False).total - logits
    assert workers.run(kept, 1, 3, overrides) == [pytest.approx(formula, rel=0.02)]


def flagship(*overrides: str) -> Any:
    parallel = ["parallel.virtual_pipeline_model_parallel_size=null", "training.global_batch_size=64"]
    return resolve(load_config("vishwamai-120l", ["training.recompute=none", *parallel, *overrides]), 64)


def test_the_flagships_layer_by_hand():
    """A row of 32k tokens in bf16, tensor 8 with sequence parallelism: widths 8192 and 22016, 64 heads."""
    token = 4 * 8192 + 3 * 22016 + 8192 + 3 * 8192  # norms, SwiGLU, attention's output and inputs
    assert layer_activations(flagship(), on_gpu=True).kept == 32768 / 8 * (2 * token + 4 * 64)


def test_the_first_stage_holds_as_much_as_all_layers():
    """Stage i of 8 has 8 − i micro-batches underway; interleaved 5 ways, the first has 8 + 7/5.

    Of each, 15 layers keep theirs, and each chunk what it sent on: hidden states of a tensor parallel rank's tokens.
    """
    config = flagship()
    stage = 15 * layer_activations(config, on_gpu=True).kept
    sent = 32768 // 8 * 8192 * 2
    assert stage_activations(config, 0, 64, on_gpu=True).kept == 8 * (stage + sent)
    assert stage_activations(config, 6, 64, on_gpu=True).kept == 2 * (stage + sent)
    assert stage_activations(config, 0, 3, on_gpu=True).kept == 3 * (stage + sent)
    interleaved = flagship("parallel.virtual_pipeline_model_parallel_size=5")
    expected = (8 + 7 / 5) * (stage + 5 * sent)
    assert stage_activations(interleaved, 0, 64, on_gpu=True).kept == pytest.approx(expected)
