"""The process that exports a checkpoint while the training that wrote it goes on.

`python -m vishwamai_mp.conversion.export_job CHECKPOINT FOLDER` writes a Hugging Face folder aside and gives it its
name when it is whole. The process ends, and leaves nothing, when its standard input does: then the training has ended,
however that came, or wants the export no more.
"""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from vishwamai_mp.config.errors import run_program
from vishwamai_mp.config.files import aside_of, sync_folder

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_export(checkpoint: Path, folder: Path, messages: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Begin to export `checkpoint` to `folder`.

    Args:
        checkpoint: in its run folder.
        folder: which must not exist; it appears when the process has ended with 0.
        messages: gets what the process says.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(checkpoint), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=messages,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the training, which ends this one in order
    )


def main() -> None:
    checkpoint, folder = (Path(argument) for argument in sys.argv[1:])
    partial = aside_of(folder)
    threading.Thread(target=_end_with_training, args=(partial,), daemon=True).start()
    os.nice(10)
    from vishwamai_mp.conversion.source import open_source
    from vishwamai_mp.conversion.to_hf import ExportOptions, export_folder
    from vishwamai_mp.conversion.tokenizer_files import tokenizer_of_run

    try:
        source = open_source(checkpoint)
        export_folder(source, partial, ExportOptions(tokenizer=tokenizer_of_run(source.run)))
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        _discard(partial)


def _end_with_training(partial: Path) -> None:
    # Not through sys.stdin: Python aborts where it ends while a thread waits in there.
    while os.read(0, 1):
        pass
    _discard(partial)
    os._exit(1)


def _discard(partial: Path) -> None:
    """Delete the unfinished folder, if there is one, also while somebody writes to it."""
    aside = aside_of(partial)
    try:
        partial.rename(aside)
    except OSError:
        return
    shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    run_program(main)
