"""The exported folder's README.md: what the model is and how it was trained, from the run folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vishwamai_mp import __version__
from vishwamai_mp.config import UserError
from vishwamai_mp.config.json_text import parse_json
from vishwamai_mp.config.wording import counted
from vishwamai_mp.conversion.dtypes import DType
from vishwamai_mp.conversion.source import Source
from vishwamai_mp.data.lines import json_records


def model_card(source: Source, config: Mapping[str, Any], dtype: DType, added: str) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        source: the checkpoint.
        config: what goes into `config.json`.
        dtype: of the exported weights.
        added: the tokens that its tokenizer was given besides its own, or nothing.
    """
    model, lora, manifest = source.config.model, source.config.lora, source.manifest
    facts = {
        "Architecture": f"{config['architectures'][0]}, {model.num_layers} layers × {model.hidden_size}",
        "Parameters": f"{sum(math.prod(mapped.shape) for mapped in source.mapping):,}",
        "Weights": f"{dtype.name}, exported from a checkpoint trained in {manifest.precision}",
        **({"Adapters": f"of rank {lora.rank}, merged into the weights"} if lora.enabled else {}),
        "Vocabulary": f"{model.vocab_size:,} tokens",
        **({"Added tokens": added.replace("|", r"\|")} if added else {}),
        "Context": f"{model.max_position_embeddings:,} tokens",
        **_training_facts(source.run, manifest.step),
        "Versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["vishwamai"]}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).strip(),
            "---",
            f"# {source.run.name}",
            "",
            f"Converted from `{source.path.name}` by vishwamai_mp {__version__}.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _training_facts(run: Path, step: int) -> dict[str, str]:
    facts = {"Trained for": counted(step, "step", ",")}
    record = _last_record(run / "metrics.jsonl", step)
    if "consumed_tokens" in record:
        facts["Trained for"] += f", {record['consumed_tokens']:,.0f} tokens"
    if "lm_loss" in record:
        facts["Training loss"] = f"{record['lm_loss']:.4f} nats per token at the last step logged"
    environment = _json(run / "environment.json")
    if environment.get("git_revision"):
        facts["Source revision"] = f"`{environment['git_revision']}`"
    if environment.get("device"):
        facts["Trained on"] = f"{environment.get('world_size', 1)} × {environment['device']}"
    return facts


def _last_record(path: Path, step: int) -> dict[str, Any]:
    """The logged step nearest to the checkpoint's, from before it."""
    last: dict[str, Any] = {}
    try:
        for record in json_records(path):
            if record.get("step", 0) > step:
                break
            last = record
    except UserError:
        pass  # a run may have logged nothing
    return last


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
