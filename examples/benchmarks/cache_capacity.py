#!/usr/bin/env python3
"""How far back does a full cache reach, what does it forget, and what memory does it take?

    OMP_NUM_THREADS=1 python examples/benchmarks/cache_capacity.py [--latents 65536] [--tokens 589824]

Tokens are streamed through one cache of small width, as in decoding, until it has run over. Most are noise. A few are
notes: a random content behind a mark. Weights are set by hand, not trained: pooling and importance follow the mark,
keys and queries the content. At the end each note is asked for by its content, and the answer is looked up among all
notes. Notes come in pairs, of which the second bears no mark: it is as old and as often asked for, but unimportant.
"""

import argparse
import resource
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vishwamai_mp.config import load_config, resolve
from vishwamai_mp.planning.cache_costs import cache_state_bytes
from vishwamai_mp.runtime import Runtime, distributed_session

# isort: split
from vishwamai_mp.cache_augmentation import DifferentiableCacheAugmentation
from vishwamai_mp.cache_augmentation.cache_state import CacheState
from vishwamai_mp.model import build_model

WIDTH, HEADS = 64, 2
_PIECE = 4096  # tokens given to the module at a time
_MARK = 8.0  # on the first channel, which is 0 elsewhere


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        marked, unmarked: share of notes whose answer is right.
        age: least number of tokens between a note and its question.
        kept: of the segments with a marked note, the share that the cache still holds.
        segments: held at the end.
        state_bytes, formula_bytes: what the state takes, and what `planning` says.
        seconds: of streaming.
    """

    marked: float
    unmarked: float
    age: int
    kept: float
    segments: int
    state_bytes: int
    formula_bytes: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=65536, help="capacity (default: 65536)")
    parser.add_argument("--tokens", type=int, default=589824, help="streamed (default: 589824, nine eighths of it)")
    parser.add_argument("--notes", type=int, default=64, help="pairs of notes (default: 64)")
    options = parser.parse_args()
    settings = configuration(options.latents)
    with distributed_session(settings) as runtime:
        report = stream(settings, runtime, options.tokens, options.notes)
    print(f"{options.tokens} tokens through {options.latents} latents, width {WIDTH}: {report.seconds:.0f} s")
    print(f"  {report.segments} segments held; segments with a marked note still held: {report.kept:.3f}")
    print(f"  right answers, notes {report.age} tokens old and older:", end=" ")
    print(f"marked {report.marked:.3f}, not {report.unmarked:.3f}")
    print(f"  state {report.state_bytes / 2**20:.2f} MiB, by formula {report.formula_bytes / 2**20:.2f} MiB;", end=" ")
    print(f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


def configuration(latents: int):
    cache = {"enabled": True, "num_heads": HEADS, "max_cache_length": latents, "dropout": 0.0}
    model = {"hidden_size": WIDTH, "num_layers": 1, "num_attention_heads": 2}
    return resolve(load_config({"model": model, "cache": cache, "precision": "fp32", "training": {"threads": 1}}), 1)


@torch.no_grad()
def stream(config, runtime: Runtime, tokens: int, notes: int, seed: int = 0) -> Report:
    """Stream, ask, compare."""
    module = by_hand(build_model(config, runtime)[0].decoder.layers[0].cache.eval())
    generator = torch.Generator().manual_seed(seed)
    contents = _noise(2 * notes, generator)
    places = _places(tokens, notes, module.cache_config.segment_length, generator)
    state = None
    start = time.perf_counter()
    for first in range(0, tokens, _PIECE):
        hidden = _noise(min(_PIECE, tokens - first), generator)
        for note, place in enumerate(places):
            if first <= place < first + len(hidden):
                hidden[place - first] = contents[note]
                if note % 2 == 0:
                    hidden[place - first, 0] = _MARK
        _, state = module(hidden[:, None], None, state)
    seconds = time.perf_counter() - start
    assert state is not None
    _, state = module(_noise(1, generator)[:, None], None, state)  # questions then stand inside a segment
    hits = torch.tensor([_answer(module, state, contents, note) == note for note in range(2 * notes)])
    kept = [_holds(module, state, contents[note]) for note in range(0, 2 * notes, 2)]
    held = [*state.written.tensors, state.access, state.content, state.scores]
    return Report(
        marked=hits[::2].double().mean().item(),
        unmarked=hits[1::2].double().mean().item(),
        age=tokens - max(places),
        kept=sum(kept) / len(kept),
        segments=state.segments,
        state_bytes=sum(x.numel() * x.element_size() for x in held),
        formula_bytes=cache_state_bytes(module.cache_config, tokens + 1, 4),
        seconds=seconds,
    )


def _noise(count: int, generator: torch.Generator) -> Tensor:
    hidden = torch.randn(count, WIDTH, generator=generator)
    hidden[:, 0] = 0
    return hidden


def _places(tokens: int, notes: int, segment: int, generator: torch.Generator) -> list[int]:
    """Each note in a segment of its own, all in the first tenth."""
    segments = torch.randperm(tokens // 10 // segment, generator=generator)[: 2 * notes]
    assert len(segments) == 2 * notes, "more notes than segments in a tenth of the stream"
    return (segments * segment + torch.randint(0, segment, segments.shape, generator=generator)).tolist()


def by_hand(module: DifferentiableCacheAugmentation) -> DifferentiableCacheAugmentation:
    """Set weights: query, key and value are contents, pooling and importance follow the mark."""
    widths = module.widths
    turns = torch.linalg.qr(torch.randn(WIDTH - 1, WIDTH - 1, generator=torch.Generator().manual_seed(7)))[0]
    weight = torch.zeros(HEADS, widths.total, WIDTH)
    for head in range(HEADS):
        part = torch.cat((torch.zeros(widths.head, 1), turns[head * (widths.head - 1) :][: widths.head]), 1)
        query, key, value, importance, pooling = weight[head].split(
            (widths.head, widths.head, widths.head, widths.importance, widths.latents)
        )
        query.copy_(4 * part)
        key.copy_(part)
        value.copy_(part)
        importance[:, 0], pooling[:, 0] = 2.0, 2.0
    with torch.no_grad():
        module.projection.weight.copy_(weight.flatten(0, 1))
        module.output.weight.copy_(torch.eye(WIDTH))
        module.position_bias.zero_()
        module.importance_bias.fill_(-8.0)
    return module


def _contents(module: DifferentiableCacheAugmentation, hidden: Tensor) -> Tensor:
    """Keys (which are the values) of tokens (n, D) as if each were pooled alone: (n, H, K)."""
    projected = module.projection(module.norm(hidden))[0].unflatten(-1, (HEADS, module.widths.total))
    return projected[..., module.widths.head : 2 * module.widths.head]


def _answer(module: DifferentiableCacheAugmentation, state: CacheState, contents: Tensor, note: int) -> int:
    """Which note the cache's answer to a note's content resembles most."""
    question = contents[note][None, None]
    read = (module(question, None, state)[0] - question).flatten()
    candidates = _contents(module, contents).flatten(1)
    return int(torch.nn.functional.cosine_similarity(candidates, read[None]).argmax())


def _holds(module: DifferentiableCacheAugmentation, state: CacheState, content: Tensor) -> bool:
    """Whether all heads still have a latent that resembles a marked note's key."""
    marked = content.clone()
    marked[0] = _MARK
    wanted = _contents(module, marked[None])[0]
    near = torch.nn.functional.cosine_similarity(state.latents.keys.flatten(1, 2), wanted[:, None], dim=-1) > 0.95
    return bool(near.any(1).all())


if __name__ == "__main__":
    main()
