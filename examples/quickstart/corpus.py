#!/usr/bin/env python3
"""Writes the quickstart's corpus: what the Python installation has on disk, so nothing is downloaded.

    python examples/quickstart/corpus.py FOLDER

The standard library's sources and the language reference (the `help()` topics), one document per file or topic, to
FOLDER/train.jsonl and, a hundredth of the files chosen by a hash of their names, FOLDER/held_out.jsonl.
"""

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from vishwamai_mp.config.errors import UserError, run_program

_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


def documents() -> Iterator[tuple[str, str]]:
    """Name and text of each document, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(library).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield str(path.relative_to(library)), text
    from pydoc_data.topics import topics

    yield from ((f"topics/{name}", topics[name]) for name in sorted(topics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made where it is not there")
    folder = parser.parse_args().folder
    sizes = {"train": 0, "held_out": 0}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {part: (folder / f"{part}.jsonl").open("w", encoding="utf-8") for part in sizes}
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); name another folder") from None
    for name, text in documents():
        part = "held_out" if hashlib.sha256(name.encode()).digest()[0] < 3 else "train"
        files[part].write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
        sizes[part] += len(text.encode())
    for file in files.values():
        file.close()
    print(f"corpus: {sizes['train'] / 1e6:.1f} MB to train on, {sizes['held_out'] / 1e6:.2f} MB held out")


if __name__ == "__main__":
    run_program(main)
