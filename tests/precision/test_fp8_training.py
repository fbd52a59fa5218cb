"""Training in emulated FP8 and NVFP4: layouts, recomputation, interruptions, other precisions' checkpoints, report."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.synthetic import tiny_corpus
from tests.training import layouts
from tests.training.runs import VOCAB, train
from vishwamai_mp.precision.formats import E2M1, E4M3
from vishwamai_mp.precision.fp8_linear import CurrentScaling
from vishwamai_mp.precision.scaling import scaled_operand
from vishwamai_mp.precision.statistics import OperandStatistics, named_fp8_linears
from vishwamai_mp.training.callbacks import Callback
from vishwamai_mp.training.loop import Trainer

_RECIPES = ["fp8_delayed", "fp8_current", "fp8_blockwise", "fp8_mx", "nvfp4"]
_SMALL = [
    "model.hidden_size=256",
    "model.num_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=256",
    "model.max_position_embeddings=128",
    "model.initializer_range=0.04",
    "training.sequence_length=128",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
]
_TENSOR = "parallel.tensor_model_parallel_size=2"
_SEQUENCE = "parallel.sequence_parallel=true"
_PIPELINE = "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "TP2": (2, [_TENSOR]),
    "TP2 SP": (2, [_TENSOR, _SEQUENCE]),
    "PP2": (2, [_PIPELINE]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
    "DP2": (2, ["parallel.use_distributed_optimizer=true", "training.micro_batch_size=1"]),
    "TP2 SP PP2 recomputing": (4, [_TENSOR, _SEQUENCE, _PIPELINE, "training.recompute=full"]),
}
_STEPS = 4
# How far losses may be from another layout's, and from bf16's. NVFP4 rounds at random: over eight seeds of its bits the
# standard deviation of a loss is up to 0.013, and their mean is 0.02 below bf16's, with AVX2 as with AVX-512.
_APART = dict.fromkeys(_RECIPES, (0.04, 0.03)) | {"nvfp4": (0.07, 0.08)}


@pytest.fixture(scope="module")
def one_process(workers):
    """Curves of one process, by settings, each computed once."""
    known: dict[tuple[str, ...], list[tuple[float, float]]] = {}

    def get(*overrides: str) -> list[tuple[float, float]]:
        if overrides not in known:
            known[overrides] = workers.run(layouts.train, 1, [*_SMALL, *overrides], _STEPS)[0]
        return known[overrides]

    return get


@pytest.mark.parametrize("precision", _RECIPES)
def test_each_recipe_trains_and_is_itself(one_process, precision):
    losses = {name: [loss for loss, _ in one_process(f"precision={name}")] for name in ("bf16", *_RECIPES)}
    assert all(losses[precision] != losses[other] for other in losses if other != precision)
    assert losses[precision] == pytest.approx(losses["bf16"], abs=_APART[precision][1])
    assert losses[precision][-1] < losses[precision][0] - 0.1


@pytest.mark.parametrize("precision", _RECIPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(workers, one_process, name, precision):
    """A pipeline computes the same numbers until clipping, whose norm it sums in another order. Other layouts split
    sums and round the parts, and what that moves over the middle between two FP8 numbers moves by a sixteenth.
    """
    processes, layout = LAYOUTS[name]
    ranks = workers.run(layouts.train, processes, [*_SMALL, f"precision={precision}", *layout], _STEPS)
    assert all(rank == ranks[0] for rank in ranks)
    first, theirs = ranks[0], one_process(f"precision={precision}")
    same = name == "PP2"
    apart = 2e-3 if same else _APART[precision][0]
    for (loss, norm), (other, other_norm) in zip(first, theirs, strict=True):
        assert loss == pytest.approx(other, abs=apart)
        assert norm == pytest.approx(other_norm, rel=0.02 if same else 0.15)
    # The first loss, before anything is amplified: a mean over a step's tokens, each of which rounding moved elsewhere.
    step = 2.0 ** -(E2M1 if precision == "nvfp4" else E4M3).mantissa_bits
    rounding = step / 128
    assert first[0][0] == pytest.approx(theirs[0][0], rel=1e-6 if same else rounding)


@pytest.mark.parametrize("precision", _RECIPES)
def test_recomputation_changes_nothing(workers, one_process, precision):
    again = workers.run(layouts.train, 1, [*_SMALL, f"precision={precision}", "training.recompute=full"], _STEPS)[0]
    assert again == one_process(f"precision={precision}")


def test_memory_cache_and_adapters_in_nvfp4(workers):
    """Their products too where widths are whole blocks; a pipeline draws the same random bits."""
    memory = ["memory.enabled=true", "memory.layers=[0]", "memory.memory_size=32", "memory.head_dim=32"]
    cache = ["cache.enabled=true", "cache.layers=[1]", "cache.num_heads=4", "cache.segment_length=32"]
    settings = [
        *_SMALL,
        *memory,
        *cache,
        "memory.dropout=0",
        "cache.dropout=0",
        "lora.enabled=true",
        "lora.targets=[linear_qkv,linear_fc2]",
    ]
    plain, rounded = (
        workers.run(layouts.train, 1, [*settings, f"precision={name}"], 2)[0] for name in ("bf16", "nvfp4")
    )
    assert rounded != plain
    assert [loss for loss, _ in rounded] == pytest.approx([loss for loss, _ in plain], abs=0.05)
    split = workers.run(layouts.train, 2, [*settings, "precision=nvfp4", _PIPELINE], 2)[0]
    assert split[0][0] == pytest.approx(rounded[0][0], rel=1e-6)
    assert split[1][0] == pytest.approx(rounded[1][0], abs=0.02)


_TRAINING = [*_SMALL, "checkpoint.save_every=2", "training.max_steps=5", "model.hidden_dropout=0.1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), VOCAB, 8000, seed=1)


def note_amaxes(trainer: Trainer, notes: list[Any]) -> None:
    """The largest amax in the history of each layer's input, weight and gradient, once training has ended."""

    class Look(Callback):
        def on_train_end(self, trainer: Trainer) -> None:
            linears = named_fp8_linears([chunk.module for chunk in trainer.chunks])
            notes.append({name: linear.fp8_amax_history.amax(0) for name, linear in linears})

    trainer.callbacks.append(Look())


@pytest.mark.parametrize("name", ["TP2", "TP2 SP", "CP2", "DP2"])
def test_amaxes_do_not_know_the_layout(workers, corpus, tmp_path, name):
    """The largest over tensor, context and data parallel ranks is the largest of the whole; on all of them."""
    processes, layout = LAYOUTS[name]
    settings = [*_SMALL, "precision=fp8_delayed", "fp8.amax_history_length=8", "training.max_steps=1"]
    whole = workers.run(train, 1, tmp_path / "whole", corpus, settings, prepare=note_amaxes)[0].notes[0]
    ranks = workers.run(train, processes, tmp_path, corpus, [*settings, *layout], prepare=note_amaxes)
    for layer, (amax_input, weight, gradient) in whole.items():
        assert min(amax_input, weight, gradient) > 0
        ours = ranks[0].notes[0][layer]
        assert all(torch.equal(rank.notes[0][layer], ours) for rank in ranks)
        assert ours[1] == weight
        # Up to the rounding of split sums, and what FP8 makes of it.
        assert ours[0] == pytest.approx(amax_input.item(), rel=0.05)
        assert ours[2] == pytest.approx(gradient.item(), rel=0.25)


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("fp8_delayed", "TP2 SP"),
        ("fp8_delayed", "DP2"),
        ("fp8_delayed", "PP2"),
        ("fp8_mx", "TP2 SP"),
        ("nvfp4", "TP2 SP"),
    ],
)
def test_a_resumed_run_is_bitwise_equal(workers, corpus, tmp_path, precision, name):
    processes, layout = LAYOUTS[name]
    settings = [*_TRAINING, *layout, f"precision={precision}"]
    whole = workers.run(train, processes, tmp_path / "whole", corpus, settings)
    workers.run(train, processes, tmp_path / "torn", corpus, settings, crash_after=3)
    resumed = workers.run(train, processes, tmp_path / "torn", corpus, settings)
    assert "resumed from step_00000002" in resumed[0].said
    for expected, after in zip(whole, resumed, strict=True):
        assert after.losses == expected.losses[2:]
        assert after.tensors == expected.tensors


def test_checkpoints_move_between_precisions(workers, corpus, tmp_path):
    """Scales that a checkpoint lacks, or has for another length of history, form anew."""

    def run(folder: str, *overrides: str, load: str | None = None) -> str:
        settings = [*_TRAINING, *overrides, *([f"checkpoint.load={tmp_path / load}"] if load else [])]
        return workers.run(train, 1, tmp_path / folder, corpus, settings)[0].said

    run("bf16", "precision=bf16")
    run("delayed", "precision=fp8_delayed", "fp8.amax_history_length=4")
    for load in ("bf16", "delayed"):
        for precision in ("bf16", "fp8_delayed", "fp8_current", "nvfp4"):
            said = run(f"{precision} from {load}", f"precision={precision}", load=f"{load}/checkpoints/step_00000002")
            assert "starts from" in said


def test_the_state_of_delayed_scaling_is_restored(workers, corpus, tmp_path):
    """Without it, the same weights and batches give another loss."""
    settings = [*_TRAINING, "precision=fp8_delayed", "training.max_steps=3"]
    [whole] = workers.run(train, 1, tmp_path / "whole", corpus, settings)
    load = [*settings, f"checkpoint.load={tmp_path / 'whole/checkpoints/step_00000002'}"]
    [kept] = workers.run(train, 1, tmp_path / "kept", corpus, load)
    [lost] = workers.run(train, 1, tmp_path / "lost", corpus, [*load, "fp8.amax_history_length=7"])
    assert kept.losses == whole.losses[2:]
    assert lost.losses != whole.losses[2:]


@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_mx"])
def test_the_report(workers, corpus, tmp_path, precision):
    settings = [*_SMALL, _PIPELINE, f"precision={precision}", "fp8.report_every=2", "training.max_steps=5"]
    reported = workers.run(train, 2, tmp_path, corpus, settings)
    lines = [json.loads(line) for line in (tmp_path / "fp8.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    layers = {key.split("/")[0] for key in lines[0] if key != "step"}
    assert len(layers) == 2 * 4  # of both stages
    amax = {key: value for key, value in lines[0].items() if key.endswith("/amax")}
    assert len(amax) == 8 * 3
    assert all(value > 0 for value in amax.values())
    plain = workers.run(train, 2, tmp_path / "plain", corpus, [x for x in settings if "report_every" not in x])
    assert reported[0].losses == plain[0].losses  # looking changes nothing
    shown = subprocess.run(
        [sys.executable, "tools/fp8_report.py", str(tmp_path), "--sort", "underflow"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    assert shown.startswith("step 4\n")
    assert "layers.1.mlp.linear_fc2" in shown


def test_shares_of_what_is_rounded_away():
    x = torch.full((16, 16), 448.0)
    x[:4] = 1e-4  # below half of the smallest number, 2^-9
    x[4] = 0.0
    statistics = OperandStatistics("layers.0.a", "input")
    statistics.add(x, CurrentScaling().quantize(x, "input", 1))
    statistics.add(x, scaled_operand(x, E4M3, torch.tensor(2.0)))  # a scale that has not followed yet
    found = statistics.numbers()
    assert found["underflow"] == 4 / 15
    assert found["overflow"] == 11 / 15 / 2
    assert (found["smallest_scale"], found["largest_scale"], found["amax"]) == (1.0, 2.0, 448.0)
