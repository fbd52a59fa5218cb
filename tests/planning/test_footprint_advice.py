"""What a rank needs and what is advised when it is not there."""

import re

import pytest

from vishwamai_mp.config import load_config, padded_vocab_size, resolve
from vishwamai_mp.planning import total_parameters
from vishwamai_mp.planning.activations import stage_activations
from vishwamai_mp.planning.component_activations import component_activations
from vishwamai_mp.planning.flops import stage_flops
from vishwamai_mp.planning.footprint_advice import advice, rank_memory, stage_memory
from vishwamai_mp.planning.states import stage_parameters, stage_states

_UNITS = {"MiB": 2**20, "GiB": 2**30}


def configure(preset: str, world_size: int, *overrides: str):
    return resolve(load_config(preset, overrides), world_size)


def told(config, world_size: int, on_gpu: bool = True) -> tuple[float, dict[str, float]]:
    """Bytes that are said to be needed, and those that each setting is said to save."""
    first, *lines = advice(config, world_size, on_gpu).splitlines()
    need = re.match(r"this run needs about ([\d.]+) (.iB) per process: ", first)
    steps = [re.fullmatch(r"  (\S+(?: on \d+ processes)?) +saves about ([\d.]+) (.iB)", line) for line in lines]
    assert need
    assert all(steps)
    return float(need[1]) * _UNITS[need[2]], {step[1]: float(step[2]) * _UNITS[step[3]] for step in steps if step}


def test_bytes_per_parameter_by_hand():
    """bf16: weights 2, gradients 4, main weights 4, moments 8; fp32: 4, 4, none, 8."""
    one = configure("125m", 1, "training.global_batch_size=8", "training.micro_batch_size=1")
    parameters = stage_parameters(one, 0)
    for world_size, overrides, expected in [
        (1, [], 18),
        (4, [], 2 + 4 + 12 / 4),
        (4, ["parallel.use_distributed_optimizer=false"], 18),
        (4, ["parallel.fully_sharded=true"], 16 / 4),
        (1, ["precision=fp32"], 16),
        (2, ["precision=fp32"], 8 + 8 / 2),
    ]:
        sizes = ["training.global_batch_size=8", "training.micro_batch_size=1"]
        config = configure("125m", world_size, *sizes, *overrides)
        assert stage_states(config, 0, world_size) == parameters * expected


def test_stages_have_all_parameters_between_them():
    """Norms, which every tensor parallel rank has whole, are too few to show."""
    config = configure("vishwamai-120l", 64)
    held = sum(stage_parameters(config, stage) for stage in range(8)) * 8
    assert held == pytest.approx(total_parameters(config, padded_vocab_size(config)), rel=1e-5)
    assert stage_parameters(config, 0) > stage_parameters(config, 1) < stage_parameters(config, 7)


def test_savings_are_those_of_the_formulae_and_suppose_the_lines_before():
    """Following all of them leaves what the lines leave."""
    settings = ["training.micro_batch_size=4", "training.global_batch_size=64", "training.recompute=none"]
    config = configure("1b", 2, *settings, "parallel.sequence_parallel=false", "parallel.tensor_model_parallel_size=2")
    need, steps = told(config, 2)
    assert need == pytest.approx(rank_memory(config, 2, True).total, rel=0.01)
    assert list(steps) == [
        "parallel.sequence_parallel=true",
        "training.micro_batch_size=2",
        "training.micro_batch_size=1",
        "training.recompute=full",
        "optimizer.moments_in=bf16",
        "optimizer.moments_on_host=true",
        "parallel.tensor_model_parallel_size=4 on 4 processes",
        "parallel.pipeline_model_parallel_size=2 on 8 processes",
    ]
    followed = [step.split(" on ")[0] for step in steps]
    after = configure("1b", 8, *settings, "parallel.tensor_model_parallel_size=2", *followed)
    assert need - sum(steps.values()) == pytest.approx(rank_memory(after, 8, True).total, abs=0.01 * need)


@pytest.mark.parametrize(
    ("overrides", "world_size", "on_gpu", "named", "unnamed"),
    [
        ([], 1, False, {"training.recompute=selective"}, {"parallel.sequence_parallel=true"}),
        (["precision=bf16"], 1, True, set(), {"training.recompute=selective"}),  # its attention keeps no weights
        (["precision=fp32"], 1, True, {"training.recompute=selective"}, set()),
        (["training.recompute=full"], 1, False, set(), {"training.recompute=selective", "training.recompute=full"}),
        (
            ["model.num_layers=24"],
            4,
            False,
            {"parallel.fully_sharded=true"},
            {"parallel.use_distributed_optimizer=true"},
        ),
        # Its tables, which every rank gathers with their gradients, are most of it.
        (["model.vocab_size=64000", "training.sequence_length=64"], 2, False, set(), {"parallel.fully_sharded=true"}),
        (["parallel.use_distributed_optimizer=false"], 2, False, {"parallel.use_distributed_optimizer=true"}, set()),
        ([], 1, False, set(), {"parallel.fully_sharded=true", "parallel.use_distributed_optimizer=true"}),
        (["precision=fp8_current"], 2, False, set(), {"parallel.fully_sharded=true"}),  # does not go together
    ],
)
def test_only_what_applies_is_named(overrides, world_size, on_gpu, named, unnamed):
    config = configure("tiny", world_size, "training.micro_batch_size=1", "training.global_batch_size=8", *overrides)
    _, steps = told(config, world_size, on_gpu)
    assert named <= set(steps)
    assert not unnamed & set(steps)


def test_graphs_go_before_what_cannot_be_had_with_them():
    config = configure("tiny", 1, "training.micro_batch_size=1", _GRAPHS)
    _, steps = told(config, 1)
    named = list(steps)
    assert named[0] == "training.cuda_graphs=false"
    assert "training.recompute=full" in named


def test_where_nothing_is_left_the_model_is_too_large():
    """One head and one layer do not split."""
    alone = ["model.num_attention_heads=1", "model.num_key_value_heads=1", "model.num_layers=1", "model.head_dim=32"]
    sizes = ["training.micro_batch_size=1", "training.recompute=full", _NARROW, _HOST]
    config = configure("tiny", 1, *alone, *sizes)
    assert advice(config, 1, on_gpu=True).endswith("make the model or training.sequence_length smaller")


def test_components_count_where_they_stand():
    """At 120 layers in 8 stages: one layer in eight carries a component, and a stage has 15 layers."""
    chunks = "parallel.virtual_pipeline_model_parallel_size=null"
    plain, both = (
        configure("vishwamai-120l", 64, "training.recompute=none", chunks, *components)
        for components in ([], ["memory.enabled=true", "cache.enabled=true"])
    )
    totals = [[stage_activations(config, i, 64, True).total for i in range(8)] for config in (plain, both)]
    extra = [more - less for less, more in zip(*totals, strict=True)]
    expected = [0.0] * 8
    for section, layers in (("memory", both.memory.layers), ("cache", both.cache.layers)):
        assert len(layers) == 15
        for layer in layers:
            stage = layer // 15
            expected[stage] += (8 - stage) * 32768 * component_activations(both, section, on_gpu=True)
    assert extra == pytest.approx(expected)


_BOTH = ["memory.enabled=true", "cache.enabled=true"]
_GRAPHS = "training.cuda_graphs=true"
_LORA = "lora.enabled=true"
_FULL = "training.recompute=full"
_FUSED, _BF16 = "parallel.fuse_grad_accumulation=true", "parallel.reduce_grads_in=bf16"
_NARROW, _HOST = "optimizer.moments_in=bf16", "optimizer.moments_on_host=true"
_IN_FP8 = ["precision=fp8_current", "fp8.params=true"]
_IN_BLOCKS = ["precision=fp8_blockwise", "fp8.params=true"]
_OVERLAP = ["parallel.sequence_parallel=true", "parallel.overlap_tensor_parallel=true"]
_MLP = ["training.recompute=selective", "training.recompute_modules=[mlp]"]
_PARTS = ["parallel.context_parallel_size=2", "data.reset_attention_mask=true"]
_LONG = ["training.sequence_length=8192", "model.max_position_embeddings=8192"]
# Long rows of a narrow model, whose peak is at the gradient of the logits.
_LOGITS = ["model.hidden_size=512", "training.sequence_length=4096", "model.max_position_embeddings=4096"]


def _split(tensor: int = 1, pipeline: int = 1, chunks: int = 1) -> list[str]:
    chunked = [f"parallel.virtual_pipeline_model_parallel_size={chunks}"] if chunks > 1 else []
    sizes = {"tensor": tensor, "pipeline": pipeline}
    return chunked + [f"parallel.{name}_model_parallel_size={size}" for name, size in sizes.items()]


def _offloaded(layers: int) -> str:
    return f"training.offload_layers={layers}"


@pytest.mark.parametrize(
    ("ranks", "stage", "batch", "overrides", "measured"),
    [  # by tools/dry_run.py with Transformer Engine's layers, MiB
        (1, 0, 1, _BOTH, 4440),
        (1, 0, 1, [*_BOTH, _FULL], 3910),
        (2, 0, 1, [*_BOTH, *_split(2), "parallel.sequence_parallel=true"], 2239),
        (2, 0, 1, [*_BOTH, "parallel.context_parallel_size=2"], 2873),
        (2, 0, 2, _BOTH, 3181),
        (4, 0, 8, [*_BOTH, *_split(1, 4)], 1640),
        (4, 3, 8, [*_BOTH, *_split(1, 4)], 1270),
        (4, 0, 8, [*_BOTH, *_split(1, 4, 2), _FULL], 1116),
        (2, 1, 8, [*_BOTH, *_split(1, 2), _FULL, "training.micro_batch_size=2"], 2094),
        (8, 0, 8, [*_BOTH, *_split(2, 2), "parallel.sequence_parallel=true", _FULL], 715),
        (8, 1, 8, [*_BOTH, *_split(2, 2, 4), "parallel.sequence_parallel=true"], 957),
        (4, 1, 8, [_BOTH[0], *_split(2, 2), "parallel.sequence_parallel=true"], 1109),
        (4, 0, 8, [_BOTH[1], *_split(2, 2)], 1299),
        (8, 0, 8, ["parallel.fully_sharded=true"], 958),
        (8, 0, 16, ["parallel.fully_sharded=true"], 1050),
        (8, 0, 8, ["parallel.fully_sharded=true", _FULL], 607),
        (8, 0, 16, ["parallel.fully_sharded=true", _FULL], 653),
        (16, 0, 16, ["parallel.fully_sharded=true", _FULL, "model.num_layers=32"], 601),
        (8, 0, 8, [*_BOTH, "parallel.fully_sharded=true", _FULL], 669),
        (4, 0, 4, ["parallel.fully_sharded=true", _FULL, *_LOGITS], 551),
        (1, 0, 1, _MLP, 3822),
        (2, 0, 1, [*_BOTH, *_split(2), "parallel.sequence_parallel=true", *_MLP], 2091),
        (8, 0, 8, ["parallel.fully_sharded=true", *_MLP], 701),
        (1, 0, 2, [*_MLP, "precision=fp8_delayed"], 4185),
        (1, 0, 1, [_FULL, "training.recompute_layers=4"], 4004),
        (2, 0, 1, [*_BOTH, *_split(2), "parallel.sequence_parallel=true", _FULL, "training.recompute_layers=6"], 2135),
        (4, 0, 8, [*_BOTH, *_split(1, 4), _FULL, "training.recompute_layers=2"], 1411),
        (4, 0, 8, [*_BOTH, *_split(1, 4, 2), _FULL, "training.recompute_layers=1"], 1402),
        (8, 0, 8, ["parallel.fully_sharded=true", _FULL, "training.recompute_layers=8"], 730),
        (8, 0, 8, ["parallel.fully_sharded=true", _FULL, "training.recompute_layers=14"], 607),
        (8, 0, 16, [*_BOTH, "parallel.fully_sharded=true", _FULL, "training.recompute_layers=4"], 1017),
        (1, 0, 2, [_FULL, "training.recompute_layers=8", "precision=fp8_current"], 4212),
        (1, 0, 2, [_FUSED], 4140),
        (2, 0, 2, [_BF16], 2550),
        (1, 0, 2, [_BF16, _FUSED, _FULL, "training.recompute_layers=14"], 3975),
        (8, 0, 16, ["parallel.fully_sharded=true", _BF16], 1036),
        (1, 0, 1, [_offloaded(15)], 3660),
        (1, 0, 1, [_offloaded(8)], 3874),
        (2, 0, 1, [*_BOTH, *_split(2), "parallel.sequence_parallel=true", _offloaded(12)], 2028),
        (4, 0, 8, [*_BOTH, *_split(1, 4), _offloaded(3)], 1290),
        (1, 0, 1, [_NARROW], 3334),
        (1, 0, 1, [_HOST], 2550),
        (2, 0, 2, [_NARROW, _HOST], 2157),
        (1, 0, 1, [_HOST, _FULL, _BF16], 2448),
        (4, 3, 8, [*_BOTH, *_split(1, 4), _NARROW, _HOST], 812),
        (2, 0, 1, [*_BOTH, *_split(2), "parallel.sequence_parallel=true", _NARROW], 1819),
        (8, 0, 8, ["parallel.fully_sharded=true", _NARROW, _FULL], 509),
        (8, 0, 16, ["parallel.fully_sharded=true", _HOST, _FULL], 457),
        (2, 0, 1, [*_split(2), *_OVERLAP], 2175),
        (2, 0, 1, [*_split(2), *_OVERLAP, "precision=fp8_delayed"], 2325),
        (2, 0, 1, [*_BOTH, *_split(2), *_OVERLAP, _FULL], 2095),
        (8, 0, 8, [*_BOTH, *_split(2, 2), *_OVERLAP], 1080),
        (2, 0, 2, [*_split(2), *_OVERLAP, *_MLP, _FUSED, "training.micro_batch_size=2"], 2206),
        (2, 0, 2, [*_IN_FP8], 2866),
        (4, 0, 8, [*_IN_FP8, _FULL, *_split(2), *_OVERLAP], 1413),
        (2, 0, 2, [*_IN_BLOCKS], 2868),
        (4, 0, 8, [*_IN_BLOCKS, _FULL, *_split(2), "parallel.sequence_parallel=true"], 1301),
        (1, 0, 1, [_FULL, *_LOGITS], 1370),
        (1, 0, 1, [_FULL, *_LOGITS, "model.vocab_size=65536"], 3401),
        (1, 0, 1, [_LORA], 1137),
        (1, 0, 1, [_LORA, "lora.targets=[linear_proj]"], 826),
        (1, 0, 1, [_LORA, _FULL], 557),
        (2, 0, 1, [_LORA, *_split(2), "parallel.sequence_parallel=true"], 589),
        (2, 1, 4, [_LORA, *_BOTH, *_split(1, 2)], 784),
        (1, 0, 2, ["training.freeze=[embedding]"], 3860),
        (2, 0, 2, ["training.recompute=selective"], 2989),
        (1, 0, 2, [_PARTS[1], "training.micro_batch_size=2"], 4738),
        (8, 0, 4, [_PARTS[1], "parallel.context_parallel_size=4", *_split(1, 2), "training.micro_batch_size=2"], 1245),
        (2, 0, 1, [*_PARTS], 2687),
        (4, 0, 1, [*_PARTS, "parallel.context_parallel_size=4", *_LONG], 3135),
        (2, 0, 1, [*_PARTS, *_LONG, "training.recompute=selective"], 4803),
        (2, 0, 1, [*_PARTS, *_LONG, _FULL], 2787),
        (4, 0, 4, [*_BOTH, *_PARTS, *_split(1, 2)], 1617),
        (2, 0, 1, [*_BOTH, *_PARTS, "model.sliding_window=256", "precision=fp8_current"], 3234),
        (2, 0, 1, [_LORA, *_PARTS], 810),
        (1, 0, 1, [_GRAPHS], 4147),
        (1, 0, 1, [*_BOTH, _GRAPHS], 4468),
        (2, 0, 1, [*_split(2), "parallel.sequence_parallel=true", _GRAPHS], 2092),
        (4, 3, 8, [*_split(1, 4), _GRAPHS], 1210),
        (4, 1, 8, [*_BOTH, *_split(1, 4, 2), _GRAPHS], 2191),
        (2, 0, 2, [_BF16, _GRAPHS], 2905),
    ],
)
def test_the_simulated_peak_with_components(ranks, stage, batch, overrides, measured):
    """16 layers × 1024, rows of 1024 tokens, memory and cache in two layers each: within 3 %."""
    shape = ["hidden_size=1024", "num_layers=16", "num_attention_heads=8", "num_key_value_heads=4", "vocab_size=8192"]
    sizes = ["training.sequence_length=1024", "training.micro_batch_size=1", f"training.global_batch_size={batch}"]
    config = configure("125m", ranks, *(f"model.{key}" for key in shape), *sizes, *overrides)
    assert stage_memory(config, ranks, stage, on_gpu=True).total / 2**20 == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("precision", "peaks"),
    [  # by tools/dry_run.py --all-stages with Transformer Engine's layers, MiB
        ("bf16", [22358, 24209, 21966, 23279, 23188, 21278, 23169, 21155]),
        ("fp8_delayed", [24795, 27046, 24403, 25659, 25948, 23692, 25918, 23584]),
    ],
)
def test_the_flagships_stages(precision, peaks):
    """As its preset lays it out on 4096 GPUs, with memory and cache: peaks within 2.5 %, FLOPs within 0.1 %."""
    config = configure("vishwamai-120l", 4096, *_BOTH, f"precision={precision}")
    predicted = [stage_memory(config, 4096, stage, on_gpu=True).total / 2**20 for stage in range(8)]
    assert predicted == [pytest.approx(peak, rel=0.025) for peak in peaks]
    petaflop = [5.558031, 6.179981, 5.558031, 5.811273, 5.926739, 5.558031, 6.179981, 5.661935]
    assert [stage_flops(config, 4096, stage) / 1e15 for stage in range(8)] == pytest.approx(petaflop, rel=0.001)


def test_a_stage_of_the_flagship_in_nvfp4():
    """The fourth, by tools/dry_run.py: 24422 MiB."""
    config = configure("vishwamai-120l", 4096, *_BOTH, "precision=nvfp4")
    assert stage_memory(config, 4096, 3, on_gpu=True).total / 2**20 == pytest.approx(24422, rel=0.025)
