#!/usr/bin/env python3
"""What holds of every model family: tiny random models of transformers' own classes, imported, trained, exported.

    python examples/conversion/families.py                # all: minutes; writes families.json and docs/families.md
    python examples/conversion/families.py --only Qwen3   # one family; the figures of the others stay
    python examples/conversion/families.py --simulate     # the simulated steps alone; the other figures stay

Each family has two variants or more, which differ in what their `config.json` can say: embeddings tied or not, grouped
queries, heads of another width, biases, windows, rotary rules, weights in one file or several. A family that
`vishwamai_mp/conversion/families/` knows and this file has no variants of fails. The checks are those of
`tools/verify_family.py`, with training at every layout, and a step of Transformer Engine's layers on the simulated
accelerator, as `tools/dry_run.py` makes it. Needs the `hf` extra, and Transformer Engine's Python where that tool has
it.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.conversion.components import ARCHITECTURE as WITH_COMPONENTS
from vishwamai_mp.conversion.families import model_types

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs/families.md", Path(__file__).with_name("families.json")
BEGIN, END = "<!-- table: examples/conversion/families.py writes it -->", "<!-- end of the table -->"
SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 301,  # odd: padded inside
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED, _TIED = {"num_key_value_heads": 2}, {"tie_word_embeddings": True}
_SCALED = {"head_dim": 32, "query_pre_attn_scalar": 32}
_PATTERN = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 9}


@dataclass(frozen=True)
class Variant:
    """One model: settings of transformers' configuration, and whether its weights are in several files."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sharded: bool = False


# By architecture.
VARIANTS: Mapping[str, tuple[Variant, ...]] = {
    "LlamaForCausalLM": (
        Variant("untied, several files", sharded=True),
        Variant("tied, grouped queries", {**_TIED, **_GROUPED}),
        Variant(
            "rope of Llama 3.1, head_dim 32",
            {
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
    ),
    "MistralForCausalLM": (
        Variant("window, grouped queries", {"sliding_window": 20, **_GROUPED}),
        Variant("no window, head_dim 32, tied", {"sliding_window": None, "head_dim": 32, **_TIED}),
    ),
    "Qwen2ForCausalLM": (
        Variant("untied, grouped queries, several files", _GROUPED, sharded=True),
        Variant("tied, yarn", {**_TIED, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    ),
    "Qwen3ForCausalLM": (
        Variant("untied, grouped queries, head_dim 24", {**_GROUPED, "head_dim": 24}),
        Variant("tied, several files", {**_TIED, "head_dim": 16}, sharded=True),
    ),
    "Phi3ForCausalLM": (
        Variant("untied, grouped queries", _GROUPED),
        Variant(
            "tied, longrope, three quarters of a head turned, window",
            {
                **_TIED,
                "original_max_position_embeddings": 96,
                "sliding_window": 20,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "partial_rotary_factor": 0.75,
                    "short_factor": [1.0, 1.2, 1.5, 1.8, 2.0, 2.2],
                    "long_factor": [1.0, 2.0, 3.0, 5.0, 9.0, 27.0],
                },
            },
        ),
    ),
    "Olmo2ForCausalLM": (
        Variant("untied, grouped queries", _GROUPED),
        Variant("tied, several files", _TIED, sharded=True),
    ),
    "Olmo3ForCausalLM": (
        Variant("untied, grouped queries, the family's windows", {**_GROUPED, "sliding_window": 20}),
        Variant("tied, windows of every other layer", {**_TIED, **_PATTERN}),
    ),
    "Gemma2ForCausalLM": (
        Variant("tied, grouped queries, head_dim 32", {**_GROUPED, **_SCALED, "sliding_window": 20}),
        Variant(
            "untied, no soft caps, several files",
            {
                "tie_word_embeddings": False,
                "head_dim": 16,
                "sliding_window": 9,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
            sharded=True,
        ),
    ),
    "Gemma3ForCausalLM": (
        Variant(
            "tied, grouped queries, head_dim 32, the family's windows",
            {**_GROUPED, **_SCALED, "sliding_window": 20, "num_hidden_layers": 6},
        ),
        Variant(
            "untied, logits capped, windows of every other layer, rope stretched",
            {
                **_PATTERN,
                "tie_word_embeddings": False,
                "head_dim": 16,
                "final_logit_softcapping": 5.0,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                },
            },
        ),
    ),
    "SmolLM3ForCausalLM": (
        Variant("tied, grouped queries, one of four layers not turned", {**_TIED, **_GROUPED}),
        Variant(
            "untied, every other layer not turned, several files",
            {"tie_word_embeddings": False, "no_rope_layers": [1, 0, 1, 0]},
            sharded=True,
        ),
    ),
    "GraniteForCausalLM": (
        Variant(
            "untied, grouped queries, multipliers",
            {
                **_GROUPED,
                "embedding_multiplier": 6.0,
                "residual_multiplier": 0.4,
                "attention_multiplier": 0.125,
                "logits_scaling": 2.0,
            },
        ),
        Variant("tied, several files", {**_TIED, "attention_multiplier": 0.25}, sharded=True),
    ),
}
COLUMNS = (
    *("logits", "greedy tokens", "export: tensors", "export: config"),
    *("training: TP2", "training: TP2 SP", "training: PP2", "training: CP2"),
    *("decoding", "LoRA", "TE step"),
)
_SIMULATED = [
    *("precision=bf16", "training.sequence_length=64", "training.micro_batch_size=2", "training.global_batch_size=2"),
    *("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a family, by its architecture or the beginning of it (default: all)")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens to compare per prompt (default: 64)")
    parser.add_argument("--simulate", action="store_true", help="make the step of Transformer Engine's layers alone")
    options = parser.parse_args()
    chosen = variants(options.only)
    keeps = options.only or options.simulate
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if keeps and RESULTS.is_file() else []
    found = {report["variant"]: report for report in kept}
    if not options.simulate:
        from vishwamai_mp.verification.gloo_ranks import GlooRanks
        from vishwamai_mp.verification.short_training import LAYOUTS

        with GlooRanks() as run_ranks:
            found |= {report["variant"]: report for report in check(chosen, run_ranks, list(LAYOUTS), options.tokens)}
    for variant, step in simulate(chosen).items():
        if report := found.get(variant):
            report["findings"] = [old for old in report["findings"] if old["check"] != step["check"]] + [step]
            report["holds"] = all(finding["status"] != "fails" for finding in report["findings"])
    reports = [found[title(*variant)] for variant in variants() if title(*variant) in found]
    failed = [report["variant"] for report in reports if not report["holds"]]
    RESULTS.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    write_section(PAGE, BEGIN, END, table(reports))
    print(f"{len(chosen) - len(failed)} of {len(chosen)} variants hold", *failed, sep="\n")
    return 1 if failed else 0


def title(architecture: str, variant: Variant) -> str:
    """Of a variant's row."""
    return f"{architecture.removesuffix('ForCausalLM')}: {variant.title}"


def variants(only: str | None = None) -> list[tuple[str, Variant]]:
    """Of every family that is known, each with its architecture.

    Raises:
        UserError: a family has fewer than two, or there is no such family.
    """
    found = []
    for architecture in model_types():
        own = VARIANTS.get(architecture, ())
        if architecture == WITH_COMPONENTS or (only and not architecture.startswith(only)):
            continue
        if len(own) < 2:
            raise UserError(f"{architecture} has {len(own)} variants in {Path(__file__).name}; write two or more")
        found += [(architecture, variant) for variant in own]
    if not found:
        raise UserError(f"--only {only}: use the beginning of one of {', '.join(VARIANTS)}")
    return found


def check(
    chosen: Sequence[tuple[str, Variant]], run_ranks: Callable[..., list[Any]], layouts: Sequence[str], tokens: int
) -> list[dict[str, Any]]:
    """What was found of each; `run_ranks`, `layouts` and `tokens` as `family_checks.verify` has them."""
    from vishwamai_mp.verification.family_checks import verify

    reports = []
    for architecture, variant in chosen:
        with tempfile.TemporaryDirectory() as place:
            folder, work = Path(place, "hf"), Path(place, "work")
            work.mkdir()
            write_model(architecture, variant, folder)
            report = verify(folder, work, run_ranks, layouts=layouts, tokens=tokens)
        name = title(architecture, variant)
        print(f"{name}: {'holds' if report.holds else report.render()}", file=sys.stderr)
        found = {key: value for key, value in report.to_dict().items() if key not in ("folder", "notes")}
        reports.append({"variant": name, **found})
    return reports


def simulate(chosen: Sequence[tuple[str, Variant]]) -> dict[str, dict[str, Any]]:
    """What a step of Transformer Engine's layers found of each, in a process of its own: it can only simulate."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_simulated, chosen).result()


def _simulated(chosen: Sequence[tuple[str, Variant]]) -> dict[str, dict[str, Any]]:
    from vishwamai_mp.runtime.simulated import transformer_engine_double

    transformer_engine_double.install()
    from vishwamai_mp.config import load_config, resolve, to_yaml
    from vishwamai_mp.conversion.folder import open_folder
    from vishwamai_mp.training.dry_run import dry_run
    from vishwamai_mp.verification.findings import FAILS, HOLDS, LEFT_OUT, Finding

    found = {}
    for architecture, variant in chosen:
        with tempfile.TemporaryDirectory() as place:
            write_model(architecture, variant, Path(place, "hf"))
            recipe = Path(place, "recipe.yaml")
            recipe.write_text(to_yaml(open_folder(Path(place, "hf")).config), encoding="utf-8")
            try:
                step = dry_run(resolve(load_config(recipe, _SIMULATED), 2), 2, 0)
            except UserError as error:
                finding = Finding(COLUMNS[-1], LEFT_OUT, f"refused: {error}")
            else:
                planned = step.updated and step.flops == step.predicted_flops
                counts = f"{step.layers}, {step.flops:,} FLOPs, planned {step.predicted_flops:,}"
                figures = {"steps": float(planned), "of": 1.0}
                finding = Finding(COLUMNS[-1], HOLDS if planned else FAILS, counts, figures)
        name = title(architecture, variant)
        print(f"{name}: {finding.seen}", file=sys.stderr)
        found[name] = asdict(finding)
    return found


def write_model(architecture: str, variant: Variant, folder: Path) -> None:
    """Random weights, norms and biases too: fresh ones are all alike, and would not tell if they were mixed up."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**{**SIZES, **variant.settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder, max_shard_size="100KB" if variant.sharded else "1GB")


def table(reports: list[dict[str, Any]]) -> str:
    """Figures of each variant; a check that was left out has a number, and its reason below."""
    reasons: list[str] = []
    rows = [["family", *(column.removeprefix("training: ") for column in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    for report in reports:
        found = {finding["check"]: finding for finding in report["findings"]}
        rows.append([report["variant"], *(cell(found.get(column), reasons) for column in COLUMNS)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"{number}. left out: {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def cell(finding: dict[str, Any] | None, reasons: list[str]) -> str:
    """One check of one variant."""
    if finding is None:
        return "not made"
    if finding["status"] == "left out":
        if finding["seen"] not in reasons:
            reasons.append(finding["seen"])
        return f"({reasons.index(finding['seen']) + 1})"
    figures = finding["figures"]
    if "relative" in figures:
        text = f"{figures['relative']:.0e}"
    elif figures:
        text = "{}/{}".format(*(int(value) for value in figures.values()))
    else:
        text = "equal"
    return text if finding["status"] == "holds" else f"**fails**: {text}"


def write_section(page: Path, begin: str, end: str, content: str) -> None:
    """Put what a script found between its marks on a page."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (mark and closed):
        raise UserError(f"{page} has no marks {begin} and {end}")
    page.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
