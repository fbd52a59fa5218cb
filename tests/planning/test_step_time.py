"""Predicted step times: against published runs, and as they must move when one thing changes."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from vishwamai_mp.config import UserError, load_config, resolve
from vishwamai_mp.planning.check import check_rows, summary
from vishwamai_mp.planning.hardware import find_gpu, known_gpu
from vishwamai_mp.planning.published import read_published
from vishwamai_mp.planning.stacks import find_stack
from vishwamai_mp.planning.step_time import Machine, step_time

_COLUMNS = "source,model,seq,gpu,n_gpus,tp,pp,cp,vpp,mbs,gbs,precision,recompute,tokens_per_s_gpu,tflops_per_gpu"
# From the tables named in the first column, one row of each program and GPU.
_ROWS = [
    "arXiv:2205.05198 Table 5,GPT3-175B,2048,A100-80GB,64,8,8,1,3,1,64,mixed,selective + SP,148.9,",
    "arXiv:2104.04473 (hardware; interleaved schedule),GPT-76.1B,2048,A100-80GB,1024,8,4,1,,,1792,mixed,full,,140",
    "torchtitan Llama 3; FSDP+torch.compile,Llama3-8B,8192,H100-96GB-HBM2e-500W,8,1,1,1,,2,16,BF16,selective,6667,",
    "NeMo 24.07,LLAMA2-7B,4096,H100,8,1,1,1,1,1,128,FP8,,16634,",
    "NeMo 24.07,Llama3-8B,8192,H100,8,1,1,2,1,1,128,FP8,,11883,",
    "NeMo Megatron-Bridge 26.04,Llama3-70B,8192,H100,64,4,8,1,5,1,256,FP8,,1633,",
    "NeMo Megatron-Bridge 26.04,Llama3.1-405B,8192,H100,1024,8,8,2,8,1,1536,FP8,,328,",
    "NeMo Megatron-Bridge 26.04,Llama3-70B,8192,GB200,64,2,4,1,5,1,256,MXFP8,,3828,",
    "NeMo Megatron-Bridge 26.04,Llama3.1-405B,8192,GB300,256,4,8,1,4,1,1536,NVFP4,,1424,",
]

_PEAKS = [  # of the two programs that tell theirs
    "torchtitan Table 2; FSDP=1 + CP + torch.compile,Llama3-8B,262144,H100-96GB-HBM2e-500W,8,1,1,8,1,,FP8,full,84.5",
    "torchtitan Table 1; FSDP=8,Llama3-8B,8192,H100-96GB-HBM2e-500W,8,1,1,1,2,16,BF16,selective,82.4",
    "torchtitan; FSDP=8; AsyncTP; local batch 8,Llama3.1-405B,32768,H100-96GB-HBM2e-500W,512,8,8,1,,,FP8,full,75.3",
    "nanotron; ZeRO-1,nanotron-3.57B,4096,H100,32,1,2,1,2,256,BF16,,53.33",
    "nanotron; ZeRO-0,nanotron-80.0B,4096,H100,32,8,4,1,1,256,BF16,,65.97",
    "nanotron; ZeRO-0,nanotron-1.34B,4096,H100,256,4,1,1,4,256,BF16,,19.57",
]

# Of a step, not of a micro-batch.
_ONCE = {"pipeline bubble", "data parallel traffic", "optimizer", "host", "waiting for the slowest"}


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "published.csv"
    path.write_text("\n".join([_COLUMNS, *_ROWS]))
    return path


def machine(gpu: str = "h100", stack: str = "megatron") -> Machine:
    return Machine(find_gpu(gpu), find_stack(stack))


def flagship(*overrides: str):
    return resolve(load_config("vishwamai-120l", overrides), 1024)


def test_published_runs_are_met(table):
    runs, notes = read_published(table)
    rows = check_rows(runs)
    assert notes == []
    assert len(rows) == len(_ROWS)
    assert summary(rows)["median"] < 0.08
    assert max(abs(row["error"]) for row in rows) < 0.15


def test_published_peaks_are_met(tmp_path):
    path = tmp_path / "peaks.csv"
    path.write_text(
        "\n".join(["source,model,seq,gpu,n_gpus,tp,pp,cp,mbs,gbs,precision,recompute,peak_mem_gib", *_PEAKS])
    )
    rows = check_rows(read_published(path)[0])
    assert [row["unit"] for row in rows] == ["bytes"] * len(_PEAKS)
    assert max(abs(row["error"]) for row in rows) < 0.06


def test_the_parts_of_a_table_may_be_blank_and_what_is_wrong_is_a_note(table):
    rows = list(csv.DictReader(table.read_text().splitlines()))
    for row in rows[3:]:
        row |= {"vpp": "", "mbs": "", "gbs": "", "seq": "", "cp": ""}
    rows[0]["gpu"] = "H1000"
    rows[1]["n_gpus"] = "many"
    rows[2] |= {"model": "somebody's 7B", "pp": "", "tp": ""}
    with table.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    runs, notes = read_published(table)
    assert len(runs) == len(rows) - 2
    assert [note.split(":")[0] for note in notes] == ["row 1", "row 2"]
    assert "did you mean h100" in notes[0]
    assert {"mbs", "seq"} <= set(runs[-1].assumed)
    assert all(0.4 < run.predicted_rate / run.measured < 2.5 for run in runs if run.measured)


def test_what_must_be_slower_is_slower():
    config = flagship()
    base = step_time(config, 1024, machine()).total
    slower = {
        "less network": (config, replace(machine(), gpu=replace(find_gpu("h100"), network=5e9))),
        "a longer bubble": (flagship("parallel.virtual_pipeline_model_parallel_size=null"), machine()),
        "an older GPU": (config, machine("a100-80")),
    }
    assert all(step_time(*case[:1], 1024, case[1]).total > base for case in slower.values())
    assert step_time(flagship("training.recompute=none"), 1024, machine()).total < base
    assert step_time(flagship("precision=fp8_current"), 1024, machine()).total < base
    with_memory = flagship("memory.enabled=true", "cache.enabled=true")
    assert 1.01 < step_time(with_memory, 1024, machine()).total / base < 1.15


@pytest.mark.parametrize("gpu", ["b200", "b300", "gb200", "gb300"])
def test_fewer_bits_are_faster_where_the_hardware_has_them(gpu):
    times = [step_time(flagship(f"precision={name}"), 1024, machine(gpu)).total for name in ("bf16", "fp8_mx", "nvfp4")]
    assert times == sorted(times, reverse=True)
    assert find_gpu(gpu).peak["4"] >= 2 * find_gpu(gpu).peak["8"]


def test_the_bubble_is_that_of_the_paper():
    """(p − 1) / v micro-batches of a stage's mean (arXiv 2104.04473, section 2.2)."""
    time = step_time(flagship("training.global_batch_size=128"), 1024, machine())
    assert time.micro_batches == 8
    steady = sum(seconds for name, seconds in time.parts.items() if name not in _ONCE)
    assert time.parts["pipeline bubble"] == pytest.approx(7 / 5 / 8 * steady, rel=0.1)


def test_a_gpu_that_is_not_known_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean gb200"):
        find_gpu("GB-200")
    names = (
        *("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe", "NVIDIA GB200", "Quadro"),
        *("NVIDIA H100 NVL", "NVIDIA B300 SXM6 AC", "NVIDIA GeForce RTX 5090", "AMD Instinct MI300X"),
        "Tesla V100-SXM2-32GB",
    )
    assert [gpu and gpu.name for gpu in map(known_gpu, names)] == [
        *("h100", "a100-40", "h100-pcie", "gb200", None),
        *("h100-nvl", "b300", "rtx5090", "mi300x", "v100-32"),
    ]
    assert find_gpu("NVIDIA A100-80GB").memory < 80 * 2**30


def test_what_is_exchanged_beside_products_is_hidden_more():
    tensor = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true", "precision=bf16"]
    plain, overlapped = (
        step_time(resolve(load_config("7b", [*tensor, *more]), 8), 8, machine()).parts["tensor parallel traffic"]
        for more in ([], ["parallel.overlap_tensor_parallel=true"])
    )
    stack = find_stack("megatron")
    assert overlapped / plain == pytest.approx((1 - stack.tensor_overlap_asynchronous) / (1 - stack.tensor_overlap))


def test_keys_that_are_gathered_for_parts_of_documents_are_not_hidden():
    """In a ring a fifth is not, in three passes of keys and values; gathered and scattered, all of two."""
    context = ["parallel.context_parallel_size=4", "precision=bf16", "training.recompute=none"]
    ring, gathered = (
        step_time(resolve(load_config("7b", [*context, *more]), 64), 64, machine()).parts["context parallel traffic"]
        for more in ([], ["data.reset_attention_mask=true"])
    )
    stack = find_stack("megatron")
    assert gathered / ring == pytest.approx(2 / 3 / (1 - stack.context_overlap), rel=0.2)
