"""Preprocesses as told on standard input, in processes of its own that kill themselves, and says what became of each.

Input is a JSON list of runs: [settings of `preprocess`, when to die]. A run dies after so many blocks, or, at
"shuffled", before the pairs get their names; 0: it does not. Blocks are small, and each is followed by a mark.
Output is a JSON list of [exit status, what the run said].
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from vishwamai_mp.config.errors import UserError
from vishwamai_mp.data import preprocess as module
from vishwamai_mp.data import shuffling, unfinished
from vishwamai_mp.data.corpus import CorpusReader


def run(settings: dict[str, Any], dies: int | str, say: Callable[[str], Any]) -> None:
    blocks = 0

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def count(_: object) -> None:
        nonlocal blocks
        blocks += 1
        if blocks == dies:
            die()

    if dies == "shuffled":
        module._publish = die  # type: ignore[assignment]
    try:
        module.preprocess(**settings, on_progress=count, say=say)
    except UserError as error:
        say(str(error))
        os._exit(1)


def main() -> None:
    unfinished.MARK_SECONDS = 0.0
    shuffling._BUCKET_BYTES = 5000
    module.CorpusReader = partial(CorpusReader, block_bytes=2000)  # type: ignore[misc, assignment]
    found = []
    for settings, dies in json.load(sys.stdin):
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            sys.stdout = os.fdopen(send, "w")
            run(settings, dies, partial(print, flush=True))
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as said:
            text = said.read()
        found.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
