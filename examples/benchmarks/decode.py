#!/usr/bin/env python3
"""Tokens per second of generation beside Hugging Face's `generate` with its cache, on the same plain model and CPU.

    python examples/benchmarks/decode.py [--hidden 512 --layers 8 --vocab 8192 --new-tokens 96 --rounds 3]

Both generate greedily from the same prompts, in turn; the tokens are compared (in bf16 some differ: scores that are all
but equal are rounded apart). Takes about four minutes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from turns import say_ratio

import vishwamai_mp.runtime  # noqa: F401  (before megatron.core)

# isort: split
from vishwamai_mp.config import PretrainConfig, load_config, resolve
from vishwamai_mp.inference import Generator, SamplingOptions
from vishwamai_mp.model import VishwamAIModel, build_model
from vishwamai_mp.runtime import distributed_session


def main() -> None:
    options = parse_arguments()
    for precision in options.precision:
        measure(precision, options)


def measure(precision: str, options: argparse.Namespace) -> None:
    """All batches in one precision."""
    config = resolve(
        load_config(
            {
                "precision": precision,
                "model": {
                    "hidden_size": options.hidden,
                    "num_layers": options.layers,
                    "num_attention_heads": options.hidden // 64,
                    "vocab_size": options.vocab,
                    "initializer_range": 0.05,
                },
            }
        ),
        1,
    )
    with distributed_session(config) as runtime:
        (model,) = build_model(config, runtime)
        ours, theirs = Generator(config, runtime, model), as_llama(config, model)
        for batch in options.batch:
            compare(ours, theirs, batch, precision, options)


def compare(ours: Generator, theirs: Any, batch: int, precision: str, options: argparse.Namespace) -> None:
    """Alternate the two and print medians of tokens per second."""
    random = torch.Generator().manual_seed(batch)
    prompts = torch.randint(0, options.vocab, (batch, options.prompt_tokens), generator=random)
    sampling = SamplingOptions(options.new_tokens)

    def run_ours() -> list[list[int]]:
        return [completion.tokens for completion in ours.generate(prompts.tolist(), sampling)]

    def run_theirs() -> list[list[int]]:
        with torch.inference_mode():
            text = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=options.new_tokens,
                use_cache=True,
            )
        return text[:, options.prompt_tokens :].tolist()

    arms: list[tuple[str, Callable[[], list[list[int]]]]] = [("ours", run_ours), ("hugging_face", run_theirs)]
    texts = {name: run() for name, run in arms}  # also warms up
    rates: dict[str, list[float]] = {name: [] for name, _ in arms}
    for round_number in range(options.rounds):
        for name, run in arms if round_number % 2 == 0 else arms[::-1]:
            start = time.perf_counter()
            run()
            rates[name].append(batch * options.new_tokens / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        json.dumps(
            {
                "batch": batch,
                "precision": precision,
                **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in medians.items()},
                "ratio": round(medians["ours"] / medians["hugging_face"], 2),
                "same_tokens": texts["ours"] == texts["hugging_face"],
                "threads": torch.get_num_threads(),
            }
        ),
        flush=True,
    )
    say_ratio(
        f"tokens/s of decoding in {precision}, batch {batch}, ours / transformers",
        medians["ours"] / medians["hugging_face"],
    )


@torch.no_grad()
def as_llama(config: PretrainConfig, model: VishwamAIModel) -> Any:
    """Hugging Face's Llama with the same weights; as many key-value heads as heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = config.model
    assert ours.intermediate_size is not None
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=ours.hidden_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_attention_heads,
            intermediate_size=ours.intermediate_size,
            vocab_size=ours.vocab_size,
            max_position_embeddings=ours.max_position_embeddings,
            rms_norm_eps=ours.rms_norm_eps,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    llama.model.embed_tokens.weight.copy_(model.embedding.word_embeddings.weight[: ours.vocab_size])
    llama.lm_head.weight.copy_(model.output_layer.weight[: ours.vocab_size])
    for theirs, layer in zip(llama.model.layers, model.decoder.layers, strict=True):
        fused = layer.self_attention.linear_qkv.weight.view(ours.num_attention_heads, 3, ours.head_dim, -1)
        for index, projection in enumerate((theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj)):
            projection.weight.copy_(fused[:, index].flatten(0, 1))
        theirs.self_attn.o_proj.weight.copy_(layer.self_attention.linear_proj.weight)
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        theirs.mlp.gate_proj.weight.copy_(gate)
        theirs.mlp.up_proj.weight.copy_(up)
        theirs.mlp.down_proj.weight.copy_(layer.mlp.linear_fc2.weight)
    return llama.to(model.embedding.word_embeddings.weight.dtype).eval()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width, a multiple of 64 (default: 512)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192, help="tokens (default: 8192)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="prompts at once (default: 1 4 16)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
