"""Generation computes what the training modules compute: with every setting, with adapters, at every layout."""

import contextlib
import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.inference.test_generation import gathered, generator
from vishwamai_mp.config import CacheConfig, LoraConfig, MemoryConfig, ModelConfig, UserError
from vishwamai_mp.inference import Generator, SamplingOptions
from vishwamai_mp.inference.blocks import KvSequence
from vishwamai_mp.inference.direct_layer import DirectHead, DirectLayer
from vishwamai_mp.inference.speculation import RepeatedText
from vishwamai_mp.model.lora import Adapter
from vishwamai_mp.runtime import shutdown
from vishwamai_mp.tree_of_thoughts import TreeOfThoughts

_MEMORY = ["memory.enabled=true", "memory.memory_size=32", "memory.head_dim=8", "memory.layers=[0,2]"]
_CACHE = [
    *("cache.enabled=true", "cache.num_heads=4", "cache.segment_length=4", "cache.latents_per_segment=2"),
    *("cache.layers=[1,2]", "cache.retrieve_segments=2"),
]
_ATTENTION = "model.attention=examples.extensions.cosine_attention:CosineAttention"
_LORA = ["lora.enabled=true", "lora.rank=4"]
_MANY_KEYS = [
    *("model.norm_position=sandwich", "model.norm_zero_centered=true", "model.activation=geglu", "model.qk_norm=head"),
    *("model.embedding_multiplier=2", "model.attention_multiplier=1", "model.attention_softcap=2"),
    *("model.residual_multiplier=0.5", "model.logit_multiplier=2", "model.logit_softcap=3"),
    *("model.sliding_window=5", "model.layer_pattern=SF", "model.window_rope_theta=100", "model.rotary_pattern=RRN"),
]
_LAYOUTS = {
    "one process": (1, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "TP2 SP": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
}
_TEXT = torch.randint(1, 250, (24,), generator=torch.Generator().manual_seed(3)).tolist()

# Every setting of the sections that say what a model computes: overrides that change it, or why it changes nothing.
_SETTINGS: dict[str, list[str] | str] = {
    "model.hidden_size": ["model.hidden_size=64"],
    "model.num_layers": ["model.num_layers=3"],
    "model.num_attention_heads": ["model.num_attention_heads=4", "model.num_key_value_heads=2"],
    "model.num_key_value_heads": ["model.num_key_value_heads=2"],
    "model.head_dim": ["model.head_dim=8"],
    "model.intermediate_size": ["model.intermediate_size=64"],
    "model.activation": ["model.activation=geglu"],
    "model.vocab_size": "the tests' rows are 250 wide; exports and choices test the padding",
    "model.max_position_embeddings": ["model.max_position_embeddings=48"],
    "model.tie_word_embeddings": ["model.tie_word_embeddings=true"],
    "model.embedding_multiplier": ["model.embedding_multiplier=3"],
    "model.residual_multiplier": ["model.residual_multiplier=0.3"],
    "model.rms_norm_eps": ["model.rms_norm_eps=0.1"],
    "model.norm_zero_centered": ["model.norm_zero_centered=true"],
    "model.rope_theta": ["model.rope_theta=100"],
    "model.rope_scaling": ["model.rope_scaling={rope_type: linear, factor: 4}"],
    "model.rotary_fraction": ["model.rotary_fraction=0.5"],
    "model.rotary_pattern": ["model.rotary_pattern=RNN"],
    "model.sliding_window": ["model.sliding_window=5"],
    "model.layer_pattern": ["model.sliding_window=5", "model.layer_pattern=SSF"],
    "model.window_rope_theta": ["model.sliding_window=5", "model.layer_pattern=SSF", "model.window_rope_theta=100"],
    "model.attention_multiplier": ["model.attention_multiplier=3"],
    "model.attention_softcap": ["model.attention_softcap=0.5"],
    "model.logit_multiplier": ["model.logit_multiplier=7"],
    "model.logit_softcap": ["model.logit_softcap=0.5"],
    "model.attention_dropout": ["model.attention_dropout=0.5"],
    "model.hidden_dropout": ["model.hidden_dropout=0.5"],
    "model.initializer_range": ["model.initializer_range=0.2"],
    "model.attention": [_ATTENTION],
    "model.attention_bias": ["model.attention_bias=true"],
    "model.qk_norm": ["model.qk_norm=full"],
    "model.norm_position": ["model.norm_position=sandwich"],
    "memory.enabled": _MEMORY,
    "memory.hidden_size": "the model's, checked by resolve",
    "memory.memory_size": [*_MEMORY, "memory.memory_size=64"],
    "memory.num_memory_layers": [*_MEMORY, "memory.num_memory_layers=2"],
    "memory.dropout": [*_MEMORY, "memory.dropout=0.5"],
    "memory.head_dim": [*_MEMORY, "memory.head_dim=16"],
    "memory.chunk_size": [*_MEMORY, "memory.chunk_size=8"],
    "memory.momentum": [*_MEMORY, "memory.momentum=false"],
    "memory.layers": [*_MEMORY, "memory.layers=[3]"],
    "memory.carry_state": "training's: what a row begins with",
    "memory.loss_weight": "training's",
    "cache.enabled": _CACHE,
    "cache.hidden_size": "the model's, checked by resolve",
    "cache.num_heads": [*_CACHE, "cache.num_heads=2"],
    "cache.max_cache_length": "more latents than a text of these tests has",
    "cache.dropout": [*_CACHE, "cache.dropout=0.5"],
    "cache.retrieval_factor": [*_CACHE, "cache.retrieval_factor=0.5"],
    "cache.segment_length": [*_CACHE, "cache.segment_length=8"],
    "cache.latents_per_segment": [*_CACHE, "cache.latents_per_segment=4"],
    "cache.retrieve_segments": [*_CACHE, "cache.retrieve_segments=1"],
    "cache.layers": [*_CACHE, "cache.layers=[0]"],
    "cache.before_memory": [*_MEMORY, *_CACHE, "cache.before_memory=true"],
    "cache.carry_state": "training's: what a row begins with",
    "lora.enabled": _LORA,
    "lora.rank": [*_LORA, "lora.rank=2"],
    "lora.alpha": [*_LORA, "lora.alpha=3"],
    "lora.dropout": [*_LORA, "lora.dropout=0.5"],
    "lora.targets": [*_LORA, "lora.targets=[linear_proj]"],
}
_SECTIONS = {"model": ModelConfig, "memory": MemoryConfig, "cache": CacheConfig, "lora": LoraConfig}
_MODULES_ALONE = (
    *("lora.enabled", "lora.rank", "lora.alpha", "lora.dropout", "lora.targets"),
    *("model.attention", "model.attention_bias", "model.qk_norm", "model.norm_position"),
    "model.norm_zero_centered",
)
_TWICE = "factor: 2, original_max_position_embeddings"
_DYNAMIC = f"model.rope_scaling={{rope_type: dynamic, {_TWICE}: 9}}"
_LONGROPE = "model.rope_scaling={rope_type: longrope, short_factor: [1, 2], long_factor: [3, 4], %s: %d}"
_CASES = {name: case for name, case in _SETTINGS.items() if isinstance(case, list)} | {
    "dynamic": [f"model.rope_scaling={{rope_type: dynamic, {_TWICE}: 64}}"],
    "longrope": [_LONGROPE % (_TWICE, 8)],
    "some layers of each window turned": [
        *("model.sliding_window=5", "model.layer_pattern=SF", "model.window_rope_theta=100"),
        *("model.rotary_pattern=RRNN", f"model.rope_scaling={{rope_type: dynamic, {_TWICE}: 64}}"),
    ],
    "scaled in layers without the window": [
        *("model.sliding_window=5", "model.layer_pattern=SSF", "model.window_rope_theta=100"),
        f"model.rope_scaling={{rope_type: yarn, {_TWICE}: 8}}",
    ],
    "yarn": [f"model.rope_scaling={{rope_type: yarn, {_TWICE}: 8}}", "model.rotary_fraction=0.5"],
}


def adapted(*overrides: str, **options: Any) -> Generator:
    """Runs in a worker: a generator whose adapters, if it has any, add something; the same at every layout."""
    ours = generator(*overrides, **options)
    rank, size = ours.engine.runtime.tensor_rank, ours.engine.runtime.groups.tp.size()
    for layer in ours.engine.model.decoder.layers:
        if (bias := layer.self_attention.linear_qkv.bias) is not None:  # fresh, it adds nothing
            bias.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(layer.layer_number))
        for name, part in layer.named_modules():
            if isinstance(part, Adapter):
                seed = 31 * layer.layer_number + sum(map(ord, name))
                rows = len(part.b) * (1 if part.is_row else size)
                whole = torch.randn(rows, part.b.shape[1], generator=torch.Generator().manual_seed(seed)) / 16
                # A rank's share of the gated projection is its gates, then its ups.
                halves = whole.chunk(2) if part.is_gated else [whole]
                own = [whole] if part.is_row else [half.chunk(size)[rank] for half in halves]
                part.b.data.copy_(torch.cat(own))
    return ours


@torch.no_grad()
def full_pass(ours: Generator, text: list[int]) -> Tensor:
    """Logits of the model's own forward pass, (T, 250), on all ranks of a layout."""
    runtime, model = ours.engine.runtime, ours.engine.model
    groups = runtime.groups
    tokens = torch.tensor([text])
    if not runtime.is_first_stage:
        hidden = torch.empty(len(text) // (groups.tp.size() if model.config.sequence_parallel else 1), 1, 32)
        dist.recv(hidden, dist.get_global_rank(groups.pp, 0), group=groups.pp)
        model.set_input_tensor([hidden])
    out = model(tokens)
    whole = torch.empty(len(text), 256)
    if runtime.is_last_stage:
        parts = [torch.empty_like(out[:, 0]) for _ in range(groups.tp.size())]
        dist.all_gather(parts, out[:, 0].contiguous(), group=groups.tp)
        whole = torch.cat(parts, 1)[:, :256].contiguous()
    else:
        dist.send(out.contiguous(), dist.get_global_rank(groups.pp, 1), group=groups.pp)
    dist.broadcast(whole, dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
    return whole[:, :250]


def both(overrides: list[str], shortcut: bool = True) -> tuple[Tensor, Tensor, int]:
    """Runs in a worker: logits of a text read in pieces, those of the full pass, and how many shortcuts were there."""
    with contextlib.ExitStack() as stack:
        for kind in () if shortcut else (DirectLayer, DirectHead):
            stack.enter_context(patch.object(kind, "supports", lambda part: False))
        ours = adapted(*overrides)
    sequence, rows, start = KvSequence(), [], 0
    for count in (9, 1, 1, 4, 1, 8):
        rows.append(gathered(ours, [(sequence, _TEXT[start : start + count])]))
        start += count
    direct = sum(layer is not None for layer in ours.engine.stage.direct)
    ours.engine.model.eval()
    return torch.cat(rows), full_pass(ours, _TEXT), direct


def every_case(shortcut: bool) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Runs in a worker: `both` of each case."""
    found = {}
    for name, case in _CASES.items():
        found[name] = both(case, shortcut)
        shutdown(keep_world=True)
    return found


def close(ours: Tensor, full: Tensor, name: str) -> None:
    """Within 1e-5 of the largest logit: sums of fp32 numbers err in proportion to the largest."""
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-5 * float(full.abs().max()), msg=lambda m: f"{name}: {m}")


def test_every_setting_has_a_case():
    fields = {f"{name}.{field.name}" for name, kind in _SECTIONS.items() for field in dataclasses.fields(kind)}
    assert fields == set(_SETTINGS)


@pytest.mark.parametrize("shortcut", [True, False], ids=["shortcut", "modules"])
def test_every_setting_computes_what_training_computes(workers, shortcut):
    for name, (ours, full, direct) in workers.run(every_case, 1, shortcut)[0].items():
        close(ours, full, name)
        assert (direct > 0) == (shortcut and name not in _MODULES_ALONE), name


def outgrown(override: str) -> None:
    """Runs in a worker: a text that is read again when its frequencies change, and one that cannot be."""
    ours = generator(override)
    ours.engine.model.eval()
    tokens = ours.generate([_TEXT[:7]], SamplingOptions(8))[0].tokens
    for i, token in enumerate(tokens):
        assert int(full_pass(ours, _TEXT[:7] + tokens[:i])[-1].argmax()) == token
    sequence = KvSequence()
    gathered(ours, [(sequence, _TEXT[:9])])
    with pytest.raises(UserError, match="a text outgrows the 9 tokens"):
        gathered(ours, [(sequence, _TEXT[9:10])])


@pytest.mark.parametrize("override", [_DYNAMIC, _LONGROPE % (_TWICE, 9)], ids=["dynamic", "longrope"])
def test_a_text_that_outgrows_its_frequencies_is_read_again(workers, override):
    workers.run(outgrown, 1, override)


@pytest.mark.parametrize("layout", list(_LAYOUTS))
@pytest.mark.parametrize(
    "more",
    [[], [*_MEMORY, *_CACHE], [*_MEMORY, *_CACHE, *_MANY_KEYS]],
    ids=["plain", "memory and cache", "memory and cache in a model with many keys"],
)
def test_adapters_and_components_at_every_layout(workers, layout, more):
    processes, overrides = _LAYOUTS[layout]
    for ours, full, _ in workers.run(both, processes, [*overrides, *_LORA, *more]):
        close(ours, full, layout)
    without = workers.run(both, processes, [*overrides, *more])[0][0]
    assert (ours - without).abs().max() > 0.1  # the adapters do something


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
def test_attention_of_the_users_own_at_every_layout(workers, layout):
    processes, overrides = _LAYOUTS[layout]
    for ours, full, direct in workers.run(both, processes, [*overrides, _ATTENTION]):
        close(ours, full, layout)
        assert not direct


@torch.no_grad()
def merged(overrides: list[str]) -> list[tuple[Tensor, list[int]]]:
    """Runs in a worker: logits and a greedy text, with adapters beside the weights, then added to them."""
    ours = adapted(*overrides)
    found = []
    for _ in range(2):
        tokens = ours.generate([_TEXT[:7]], SamplingOptions(8))[0].tokens
        found.append((gathered(ours, [(KvSequence(), _TEXT)]), tokens))
        for layer in ours.engine.model.decoder.layers:
            for parent in (layer.self_attention, layer.mlp):
                for name, part in parent.named_children():
                    if isinstance(part, Adapter):
                        weight = getattr(parent, name.removesuffix("_adapter")).weight
                        weight += part.scale * part.b @ part.a  # each rank's shard from its shards
                        part.b.zero_()
    return found


@pytest.mark.parametrize(
    ("layout", "more"), [("one process", []), ("TP2", []), ("PP2", []), ("TP2", _MANY_KEYS)], ids=str
)
def test_merged_adapters_generate_what_they_did_beside_the_weights(workers, layout, more):
    processes, overrides = _LAYOUTS[layout]
    for beside, within in workers.run(merged, processes, [*overrides, *_LORA, *_MEMORY, *_CACHE, *more]):
        close(within[0], beside[0], layout)
        assert within[1] == beside[1]


def used(overrides: list[str]) -> dict[str, Any]:
    """Runs in a worker: what greedy generation, scoring and a search say, and what full passes say of the same."""
    ours = adapted(*overrides, "tree.enabled=true")
    tokens = ours.generate([_TEXT[:7]], SamplingOptions(8))[0].tokens
    scores = ours.score([_TEXT])[0]
    tree = dataclasses.replace(ours.engine.config.tree, value_weight=0, logprob_weight=1, max_thought_tokens=5)
    (result,) = TreeOfThoughts(ours.engine, tree, stop_tokens=(3, 5)).search([_TEXT[:7]])
    text = _TEXT[:7]
    for _ in tokens:
        padded = text + [0] * (len(text) % 2)
        text = [*text, int(full_pass(ours, padded)[len(text) - 1].argmax())]
    log_probs = full_pass(ours, _TEXT).log_softmax(-1)
    paths = []
    for node in result.nodes[1:]:
        whole = _TEXT[:7] + result.answer_to(node.id)
        padded = whole + [0] * (len(whole) % 2)
        rows = full_pass(ours, padded).log_softmax(-1)
        paths.append((node.path_log_prob, sum(float(rows[i - 1, whole[i]]) for i in range(7, len(whole)))))
    return {
        "greedy": (tokens, text[7:]),
        "scores": (scores, [float(log_probs[i, token]) for i, token in enumerate(_TEXT[1:])]),
        "paths": paths,
    }


@pytest.mark.parametrize(
    ("layout", "more"), [("one process", []), ("TP2", []), ("PP2", []), ("TP2", _MANY_KEYS)], ids=str
)
def test_texts_scores_and_searches_follow_the_adapters(workers, layout, more):
    processes, overrides = _LAYOUTS[layout]
    for found in workers.run(used, processes, [*overrides, *_LORA, *_MEMORY, *_CACHE, *more]):
        assert found["greedy"][0] == found["greedy"][1]
        torch.testing.assert_close(*map(torch.tensor, found["scores"]), rtol=0, atol=1e-5)
        ours, full = zip(*found["paths"], strict=True)
        assert len(ours) > 3
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(full), rtol=0, atol=5e-5)


def hooked() -> tuple[int, float]:
    """Runs in a worker: how often a hook on a linear layer was called, and what it changed."""
    ours = generator()
    before = gathered(ours, [(KvSequence(), _TEXT)])
    calls = []

    def double(linear: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        calls.append(linear)
        return output[0] * 2, output[1]

    ours.engine.model.decoder.layers[1].mlp.linear_fc2.register_forward_hook(double)
    after = gathered(ours, [(KvSequence(), _TEXT)])
    full = full_pass(ours, _TEXT)
    torch.testing.assert_close(after, full, rtol=0, atol=1e-5)
    return len(calls), float((after - before).abs().max())


def test_a_hook_that_comes_later_is_called(workers):
    calls, change = workers.run(hooked, 1)[0]
    assert calls == 2  # by generation and by the full pass
    assert change > 0.01


def in_fp8(precision: str) -> tuple[Tensor, bool]:
    """Runs in a worker: logits, and whether the model emulates FP8 afterwards as before."""
    ours = generator(f"precision={precision}", "model.hidden_size=128", "model.num_attention_heads=8")
    logits = gathered(ours, [(KvSequence(), _TEXT)])
    emulates = [part.emulates_fp8 for part in ours.engine.model.modules() if hasattr(part, "emulates_fp8")]
    return logits, bool(emulates) and all(emulates)


@pytest.mark.parametrize("precision", ["fp8_current", "fp8_delayed", "nvfp4"])
def test_fp8_models_generate_in_bf16(workers, precision):
    """So a text does not depend on what else is in its batch, whose scales it would share."""
    plain, _ = workers.run(in_fp8, 1, "bf16")[0]
    ours, emulates = workers.run(in_fp8, 1, precision)[0]
    assert torch.equal(ours, plain)
    assert emulates


def with_guesses(overrides: list[str]) -> list[tuple[list[int], int]]:
    """Runs in a worker: a text without guesses, then with three right ones a pass; and how many were accepted."""
    ours = adapted(*overrides)
    found: list[Any] = []

    def guess(_: RepeatedText, text: list[int], count: int) -> list[int]:
        return found[0].text[len(text) : len(text) + count]

    with patch.object(RepeatedText, "guess", guess):
        for ours.speculate in (0, 3):
            found.append(ours.submit(_TEXT, SamplingOptions(12)))
            while ours.busy:
                ours.step()
    return [(one.tokens, one.accepted) for one in found]


@pytest.mark.parametrize("layout", ["one process", "TP2"])
def test_guesses_are_judged_with_adapters(workers, layout):
    processes, overrides = _LAYOUTS[layout]
    (plain, _), (ours, accepted) = workers.run(with_guesses, processes, [*overrides, *_LORA])[0]
    assert ours == plain
    assert accepted >= 6
    assert plain != workers.run(with_guesses, processes, overrides)[0][0][0]
