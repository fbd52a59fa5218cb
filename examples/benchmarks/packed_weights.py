#!/usr/bin/env python3
"""Decoding with weights in int8 and int4 beside the same model in bf16: tokens per second, and what it costs.

    python examples/benchmarks/packed_weights.py --output examples/benchmarks/results

Speed is that of a fresh model, the ways in turn. Perplexity is that of a small model that reads bytes, trained here on
the Python installation's own sources and scored on sources that it was not trained on. Takes some minutes.
"""

import argparse
import json
import math
import sysconfig
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from turns import alternate, say_ratio

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.inference import Generator, SamplingOptions
from vishwamai_mp.inference.packed_weights import Kind, pack_weights
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.runtime import Runtime, distributed_session

_PACKED: tuple[Kind, ...] = ("int8", "int4")
_WAYS = ("bf16", *_PACKED)


def main() -> None:
    options = parse_arguments()
    with distributed_session(described(options.hidden, options.layers, 8192, "bf16")) as runtime:
        found = {"perplexity": perplexities(options, runtime), "speed": speeds(options, runtime)}
    found["machine"] = {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    print(json.dumps(found, indent=1))
    if options.output:
        (options.output / "packed_weights.json").write_text(json.dumps(found, indent=1) + "\n")


def described(hidden: int, layers: int, vocabulary: int, precision: str) -> PretrainConfig:
    model = {"hidden_size": hidden, "num_layers": layers, "num_attention_heads": hidden // 64, "vocab_size": vocabulary}
    return resolve(load_config({"precision": precision, "model": {**model, "max_position_embeddings": 1024}}), 1)


def generators(config: PretrainConfig, runtime: Runtime, state: dict[str, torch.Tensor] | None) -> dict[str, Generator]:
    """One in each way, of the same weights; fresh ones begin alike."""
    models = {}
    for way in _WAYS:
        (models[way],) = build_model(config, runtime)
        if state is not None:
            models[way].load_state_dict(state, strict=False)
    for kind in _PACKED:
        pack_weights(models[kind], config, runtime, kind)
    return {way: Generator(config, runtime, model) for way, model in models.items()}


def speeds(options: argparse.Namespace, runtime: Runtime) -> dict[str, dict[str, float]]:
    """Seconds of bf16 / seconds of each way, by batch."""
    config = described(options.hidden, options.layers, 8192, "bf16")
    ways = generators(config, runtime, None)
    found: dict[str, dict[str, float]] = {}
    for batch in options.batch:
        prompts = torch.randint(0, 8192, (batch, 16), generator=torch.Generator().manual_seed(batch)).tolist()
        sampling = SamplingOptions(options.new_tokens)
        arms = {way: partial(ways[way].generate, prompts, sampling) for way in _WAYS}
        seconds = alternate(arms, options.rounds)
        found[str(batch)] = {way: round(seconds["bf16"] / seconds[way], 2) for way in _PACKED}
        for way in _PACKED:
            say_ratio(f"tokens/s of decoding, batch {batch}, {way} / bf16", seconds["bf16"] / seconds[way])
    return found


def perplexities(options: argparse.Namespace, runtime: Runtime) -> dict[str, float]:
    """Per byte, of what was not trained on."""
    trained, texts = sources()
    held_out = [text[1000:1256].tolist() for text in texts if len(text) >= 1256][:20]
    exact = described(128, 4, 256, "fp32")
    (model,) = build_model(exact, runtime)
    train(model, trained, options.steps)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    found = {"fp32": perplexity(Generator(exact, runtime, model), held_out)}
    for way, generator in generators(described(128, 4, 256, "bf16"), runtime, state).items():
        found[way] = perplexity(generator, held_out)
    for way in _PACKED:
        say_ratio(f"perplexity of a small model, {way} / bf16", found[way] / found["bf16"])
    return {way: round(value, 4) for way, value in found.items()}


def sources() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Bytes of the Python installation's own sources: to train on, in one, and every eighth file, which is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long() for path in files]
    return torch.cat([text for number, text in enumerate(texts) if number % 8]), texts[::8]


def train(model: VishwamAIModel, text: torch.Tensor, steps: int) -> None:
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for step in range(steps):
        starts = torch.randint(0, len(text) - 129, (16,), generator=random)
        rows = torch.stack([text[start : start + 129] for start in starts.tolist()])
        logits = model(rows[:, :-1])  # (T, B, V)
        loss = F.cross_entropy(logits.transpose(0, 1).flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, 1 - step / steps)
        optimizer.step()


def perplexity(generator: Generator, texts: list[list[int]]) -> float:
    scores = [score for text in generator.score(texts) for score in text]
    return math.exp(-sum(scores) / len(scores))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width, a multiple of 64 (default: 1024)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="prompts at once (default: 1 4 16)")
    parser.add_argument("--steps", type=int, default=600, help="of training before perplexity is measured")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="packed_weights.json goes here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
