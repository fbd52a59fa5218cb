#!/usr/bin/env python3
"""What does the cache cost, and how does the cost grow with length?

    python examples/benchmarks/cache_augmentation.py [--part cost growth]

`cost`: forward and backward of the cache module at 16,384 tokens beside full attention of the same width (norm, query,
key, value and output projections included in all), taking turns. Full attention comes twice: torch's fused kernel
(`scaled_dot_product_attention`), which keeps no score, and the same written out, which keeps them all. Activations are
the bytes that autograd keeps between forward and backward.
Needs 12 GiB.
`growth`: the module from 1,024 to 65,536 tokens, with a plot beside this file.
Seconds are of the CPU, over all threads: other work on the machine changes them little.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import say_ratio

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.runtime import Runtime, distributed_session

# isort: split
from vishwamai_mp.cache_augmentation import DifferentiableCacheAugmentation
from vishwamai_mp.model import build_model

HEADS = 8
LENGTHS = [2**power for power in range(10, 17)]
PLOT = Path(__file__).with_suffix(".png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["cost", "growth"], choices=["cost", "growth"])
    parser.add_argument("--width", type=int, default=256, help="hidden size (default: 256)")
    parser.add_argument("--tokens", type=int, default=16384, help="of `cost` (default: 16384)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of `cost` (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    config = resolve(
        load_config(
            {
                "model": {"hidden_size": options.width, "num_layers": 1, "num_attention_heads": HEADS},
                "cache": {"enabled": True, "num_heads": HEADS, "dropout": 0.0},
                "precision": "fp32",
                "training": {"threads": options.threads},
            }
        ),
        1,
    )
    with distributed_session(config) as runtime:
        module = cache_module(config, runtime)
        print(f"width {options.width}, {HEADS} heads, fp32, {options.threads} threads")
        if "cost" in options.part:
            cost(module, options.width, options.tokens, options.rounds)
        if "growth" in options.part:
            growth(module, options.width)


def cache_module(config, runtime: Runtime) -> DifferentiableCacheAugmentation:
    module = build_model(config, runtime)[0].decoder.layers[0].cache.train()
    nn.init.normal_(module.output.weight, std=0.02)  # as after some training: zeros would spare the backward pass
    return module


class FullAttention(nn.Module):
    """x + W_o attention(norm(x)), causal, over all tokens."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.norm, self.fused = nn.RMSNorm(width), fused
        self.qkv, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, hidden_TBD: Tensor) -> tuple[Tensor, None]:
        tokens, rows, _ = hidden_TBD.shape
        qkv = self.qkv(self.norm(hidden_TBD)).view(tokens, rows, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 1, 3, 0, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # head by head: what has to be kept is as much, what is in flight fits into memory
            heads = zip(*(x.unbind(1) for x in (q, k, v)), strict=True)
            out = torch.stack([_written_out(*parts) for parts in heads], 1)
        return hidden_TBD + self.output(out.permute(2, 0, 1, 3).flatten(2)), None


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.masked_fill_(future, -torch.inf).softmax(-1) @ v


def forward_backward(module: nn.Module, hidden: Tensor) -> tuple[float, float]:
    """CPU seconds, and bytes kept between the passes."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = hidden.detach().requires_grad_()
    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(hidden)[0]
    out.backward(torch.ones_like(out))
    seconds = time.process_time() - start
    return seconds, sum(kept.values())


def cost(module: nn.Module, width: int, tokens: int, rounds: int) -> None:
    arms = {"cache": module, "fused": FullAttention(width, True), "written out": FullAttention(width, False)}
    hidden = torch.randn(tokens, 1, width)
    for arm in arms.values():
        forward_backward(arm, hidden[:1024])  # not measured
    passes = {name: partial(forward_backward, arm, hidden) for name, arm in arms.items()}
    seconds, kept = alternate(passes, rounds)
    print(f"{tokens} tokens, forward and backward, median of {rounds} rounds in turn")
    for name in arms:
        against = f"{seconds[name] / seconds['cache']:6.1f} × time {kept[name] / kept['cache']:6.1f} × activations"
        print(f"  {name:12} {seconds[name]:7.2f} s {kept[name] / 2**20:9.1f} MiB   {against}")
    for name in list(arms)[1:]:
        say_ratio(f"CPU time at {tokens} tokens, {name} attention / cache", seconds[name] / seconds["cache"])


def alternate(arms: Mapping[str, Callable[[], tuple[float, float]]], rounds: int) -> list[dict[str, float]]:
    """Median seconds and bytes of each arm. Who comes after whom changes every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 else reversed(list(arms)):
            found[name].append(arms[name]())
    return [{name: statistics.median(x[i] for x in results) for name, results in found.items()} for i in range(2)]


def growth(module: nn.Module, width: int) -> None:
    seconds: dict[int, float] = {}
    for tokens in LENGTHS:
        hidden = torch.randn(tokens, 1, width)
        seconds[tokens] = statistics.median(forward_backward(module, hidden)[0] for _ in range(3))
        print(f"  {tokens:6} tokens {seconds[tokens]:7.3f} s  {1e6 * seconds[tokens] / tokens:6.1f} µs/token")
    slope = math.log2(seconds[LENGTHS[-1]] / seconds[LENGTHS[-4]]) / 3
    print(f"  from {LENGTHS[-4]} to {LENGTHS[-1]} tokens time grows as their power {slope:.2f}")
    say_ratio("power of the tokens that the cache's time grows as", slope)
    plot(seconds, width)


def plot(seconds: dict[int, float], width: int) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    axis.loglog(list(seconds), list(seconds.values()), marker="o", label="cache, forward and backward")
    first, last = LENGTHS[0], LENGTHS[-1]
    for power, style in ((1, ":"), (2, "--")):
        line = [seconds[last] * (tokens / last) ** power for tokens in (first, last)]
        axis.loglog([first, last], line, style, color="grey", label=f"power {power}")
    axis.set_xlabel("tokens")
    axis.set_ylabel("CPU seconds")
    axis.set_title(f"width {width}, {HEADS} heads, one row of one document")
    axis.legend()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
