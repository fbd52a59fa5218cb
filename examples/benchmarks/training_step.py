#!/usr/bin/env python3
"""How fast is a training step, beside a bare loop over the same model and beside Hugging Face's Llama?

    python examples/benchmarks/training_step.py [--precision fp32 bf16] [--rounds 8]

Arms take turns, one step each, so that a busy machine slows all alike; figures are medians over rounds.
`ours` is the whole step of the trainer: reading the batch, forward, backward, optimizer, loss guard, metrics record;
`compiled` the same with training.compile=true, where a C++ compiler is found. `bare` is forward, backward and
megatron-core's optimizer on the same model, nothing else. `transformers` is LlamaForCausalLM of the same size with
torch's AdamW, under bf16 autocast for bf16, in a process of its own: ours sets how memory is allocated in its process.
On a CPU without hardware for bf16 that takes minutes a step, so bf16 is measured there only where --precision says so.
Needs the `hf` extra.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from turns import alternate, say_ratio

from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.planning import flops_per_token
from vishwamai_mp.runtime import distributed_session, multiplies_natively
from vishwamai_mp.runtime.device import peak_flops
from vishwamai_mp.runtime.fusion import set_fusion
from vishwamai_mp.runtime.products import cpu_multiplies

# isort: split
from vishwamai_mp.data.batches import BatchStream, train_stream
from vishwamai_mp.data.datasets import build_datasets
from vishwamai_mp.training.loop import Trainer
from vishwamai_mp.training.optimizer import build_optimizer, wrap_data_parallel

SIZE = {
    "hidden_size": 512,
    "num_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 1536,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
BATCH, LENGTH = 4, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["fp32", *(["bf16"] if cpu_multiplies(torch.bfloat16) else [])]
    parser.add_argument(
        "--precision", nargs="+", default=default, choices=["fp32", "bf16"], help=f"(default: {' '.join(default)})"
    )
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each arm (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    for precision in options.precision:
        with tempfile.TemporaryDirectory() as folder:
            compare(precision, options.rounds, options.threads, Path(folder))


def compare(precision: str, rounds: int, threads: int, folder: Path) -> None:
    """Time the three arms in turn and print tokens per second and ratios."""
    config = resolve(configuration(precision, threads, folder), 1)
    with transformers_elsewhere(precision, threads) as transformers_step, distributed_session(config) as runtime:
        datasets = build_datasets(config)
        trainer = Trainer(config, runtime, datasets, callbacks=[])
        stream = train_stream(config, datasets, runtime)
        arms: dict[str, Callable[[], object]] = {
            "ours": lambda: trainer._step(stream),
            "bare": bare_arm(config, runtime, datasets),
            "transformers": transformers_step,
        }
        if shutil.which(os.environ.get("CXX", "g++")):
            arms["compiled"] = lambda: compiled(arms["ours"])
        seconds = alternate(arms, rounds)
        print(f"{precision}: {threads} threads, {BATCH} sequences of {LENGTH} tokens, median of {rounds} rounds")
        for name, median in seconds.items():
            print(f"  {name:13} {1e3 * median:8.1f} ms/step {BATCH * LENGTH / median:8,.0f} tokens/s")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        peak, flops = peak_flops(dtype), flops_per_token(config.model, LENGTH) * BATCH * LENGTH
        note = "" if multiplies_natively(dtype) else " (of fp32: this CPU has no bf16 matrix product)"
        print(f"  matmul peak {peak / 1e9:.0f} GFLOP/s{note}")
        say_ratio(f"speed of a {precision} step, ours / transformers", seconds["transformers"] / seconds["ours"])
        say_ratio(f"time of a {precision} step, ours / bare", seconds["ours"] / seconds["bare"])
        if "compiled" in seconds:
            faster = seconds["transformers"] / seconds["compiled"]
            say_ratio(f"speed of a {precision} step, compiled / transformers", faster)
            say_ratio(f"model FLOPs of a compiled {precision} step / matmul peak", flops / seconds["compiled"] / peak)
        say_ratio(f"model FLOPs of a {precision} step / matmul peak", flops / seconds["ours"] / peak)


def compiled(step: Callable[[], object]) -> None:
    set_fusion(True)
    step()
    set_fusion(False)


def configuration(precision: str, threads: int, folder: Path) -> PretrainConfig:
    return load_config(
        {
            "model": SIZE,
            "precision": precision,
            "data": {"train": write_corpus(folder), "split": "100,0,0"},
            "training": {
                "sequence_length": LENGTH,
                "micro_batch_size": BATCH,
                "global_batch_size": BATCH,
                "threads": threads,
                "output_dir": str(folder / "run"),
            },
            "logging": {"report_to": [], "progress_bar": False},
        }
    )


def write_corpus(folder: Path) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(str(folder / "random.bin"))
    tokens = torch.randint(0, SIZE["vocab_size"], (200_000,), generator=generator)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "random.idx"))
    return str(folder / "random")


def bare_arm(config: PretrainConfig, runtime, datasets) -> Callable[[], object]:
    """Forward, backward, megatron-core's optimizer; no schedule, no guard, no record."""
    from megatron.core.distributed import finalize_model_grads

    from vishwamai_mp.model import build_model

    chunks = wrap_data_parallel(config, runtime, build_model(config, runtime))
    optimizer = build_optimizer(config, runtime, chunks)
    stream: BatchStream = train_stream(config, datasets, runtime)

    def step() -> None:
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        batch = next(stream)
        loss = chunks[0](batch.tokens, labels=batch.labels).mean()
        loss.backward()
        finalize_model_grads(chunks, pg_collection=runtime.groups)
        optimizer.step()

    return step


@contextmanager
def transformers_elsewhere(precision: str, threads: int) -> Iterator[Callable[[], object]]:
    """`transformers_arm` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=take_steps, args=(theirs, precision, threads), daemon=True)
    process.start()
    ours.recv()  # once it is built: what is measured meanwhile would be measured beside it

    def step() -> None:
        ours.send(None)
        ours.recv()

    yield step
    process.terminate()


def take_steps(connection: Connection, precision: str, threads: int) -> None:
    """Until this process is ended: a message when ready, then one step for each message."""
    torch.set_num_threads(threads)
    step = transformers_arm(precision)
    while True:
        connection.send(None)
        connection.recv()
        step()


def transformers_arm(precision: str) -> Callable[[], object]:
    """The same size in transformers, trained as its documentation does without a Trainer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=SIZE["hidden_size"],
        intermediate_size=SIZE["intermediate_size"],
        num_attention_heads=SIZE["num_attention_heads"],
        num_hidden_layers=SIZE["num_layers"],
        vocab_size=SIZE["vocab_size"],
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        tokens = torch.randint(0, SIZE["vocab_size"], (BATCH, LENGTH), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
