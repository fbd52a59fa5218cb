"""What is in a checkpoint, for people and for programs. From the manifest alone: no torch, nothing is unpickled."""

from typing import Any

from vishwamai_mp.checkpoint.manifest import check_files, is_optimizer, read_manifest
from vishwamai_mp.checkpoint.store import Found
from vishwamai_mp.config.wording import counted

_LAYOUT_NAMES = {
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "virtual_pipeline_model_parallel_size": "virtual pipeline",
    "context_parallel_size": "context",
    "data_parallel_size": "data",
}


def describe(found: Found, verify: bool) -> dict[str, Any]:
    """All about a located checkpoint.

    Args:
        found: from `locate`.
        verify: read its files through; otherwise only their sizes are compared.
    """
    assert found.path is not None
    manifest = read_manifest(found.path)
    problems = check_files(found.path, manifest.files, checksums=verify)
    return {
        "path": str(found.path),
        "step": manifest.step,
        "whole": not problems,
        "verified": verify,
        "problems": problems,
        "skipped": found.skipped,
        "model": manifest.model,
        "precision": manifest.precision,
        "parameters": manifest.parameters,
        "optimizer": manifest.has_optimizer,
        "layout": manifest.layout,
        "versions": manifest.versions,
        "bytes": sum(record.size for record in manifest.files.values()),
        "tensors": {
            name: {"shape": record.shape, "dtype": record.dtype, "bytes": record.size}
            for name, record in manifest.tensors.items()
        },
        "files": {name: record.size for name, record in manifest.files.items()},
    }


def render(facts: dict[str, Any]) -> str:
    """The same as text."""
    layout = ", ".join(f"{_LAYOUT_NAMES.get(key, key)} {size}" for key, size in facts["layout"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    model = ", ".join(f"{key}={value}" for key, value in facts["model"].items() if value is not None)
    states = [record["bytes"] for name, record in facts["tensors"].items() if is_optimizer(name)]
    lines = [
        f"checkpoint  {facts['path']}",
        f"step        {facts['step']}",
        f"state       {_state(facts)}",
        f"parameters  {facts['parameters']:,} (padding of the vocabulary included)",
        f"optimizer   {_optimizer(states) if facts['optimizer'] else 'no, only weights'}",
        f"saved as    {layout}; precision {facts['precision']}",
        f"model       {model}",
        f"versions    {versions}",
        f"size        {size_text(facts['bytes'])} in {counted(len(facts['files']), 'file')}",
        *(f"note        {line}" for line in facts["skipped"]),
        "",
        *_table(facts["tensors"]),
    ]
    return "\n".join(lines)


def size_text(size: int) -> str:
    """Bytes in a unit that suits."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _state(facts: dict[str, Any]) -> str:
    if facts["problems"]:
        return f"BROKEN: {'; '.join(facts['problems'])}"
    return "whole (checksums verified)" if facts["verified"] else "whole by its files' sizes (--verify reads them)"


def _optimizer(sizes: list[int]) -> str:
    return f"yes, {size_text(sum(sizes))} in {counted(len(sizes), 'tensor')} (--json lists them)"


def _table(tensors: dict[str, dict[str, Any]]) -> list[str]:
    width = max((len(name) for name in tensors if not is_optimizer(name)), default=6)
    lines = [f"{'tensor':{width}}  {'shape':>16}  {'dtype':>8}  {'size':>10}"]
    for name, record in tensors.items():
        if is_optimizer(name):
            continue  # one of each parameter's size and a few more: their sum stands above
        shape = " × ".join(map(str, record["shape"])) or "scalar"
        lines.append(f"{name:{width}}  {shape:>16}  {record['dtype']:>8}  {size_text(record['bytes']):>10}")
    return lines
