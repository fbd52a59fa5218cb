"""One readable error from a job of many processes, and a prompt end for all of them."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from vishwamai_mp.config import UserError, run_program
from vishwamai_mp.config.errors import USER_ERROR_STATUS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_distributed_program(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: 0 on success, 1 on failure; in a job, USER_ERROR_STATUS for a user's mistake.

    When one process of a job fails, its peers fail too, with errors about lost connections. So the first process of
    each machine to fail reports, and the others are silent. No process waits for another: torchrun ends the rest.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if not launched and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        run_program(main)
    rank = os.environ["RANK"]
    if launched:
        die_with_parent()
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = 130
    except UserError as error:
        if _first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR_STATUS
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if _first_to_fail():
            print(f"error on rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: process groups of a failed job can hang in their destructors


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, be it by SIGKILL.

    torchrun's workers would live on, train on, and write into the run folder beside the next attempt; a forked writer
    would hold its killed rank's connections open in front of the peers.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_to_fail() -> bool:
    """Whether no other process of this job, on this machine and in this attempt, has failed before."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's: ATTEMPT/LOCAL_RANK/error.json
    if error_file is None:
        return True
    try:
        Path(error_file).parent.parent.joinpath("failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # better twice than never
    return True
