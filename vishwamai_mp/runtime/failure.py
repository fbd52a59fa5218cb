"""One readable error from a job of many processes, and a prompt end for all of them."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from vishwamai_mp.config import UserError, run_program


def run_distributed_program(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: 0 on success, 1 on failure.

    When one process of a job fails, its peers fail too, with errors about lost connections. So the first process of
    each machine to fail reports, and the others are silent. No process waits for another: torchrun ends the rest.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        run_program(main)
    rank = os.environ["RANK"]
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = 130
    except UserError as error:
        if _first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        code = 1
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if _first_to_fail():
            print(f"error on rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: process groups of a failed job can hang in their destructors


def _first_to_fail() -> bool:
    """Whether no other process of this job, on this machine and in this attempt, has failed before."""
    attempt = "-".join(
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    )
    # The launcher's process number tells this attempt from an earlier job that had the same port.
    flag = Path(tempfile.gettempdir()) / f"vishwamai-failed-{attempt}-{os.getppid()}".replace("\0", "")
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # better twice than never
    return True
