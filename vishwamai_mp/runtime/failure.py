"""One readable error from a job of many processes, and a prompt end for all of them."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from vishwamai_mp.config import UserError, run_program
from vishwamai_mp.config.errors import USER_ERROR_STATUS, about_the_system, one_line, spell_what_the_terminal_cannot
from vishwamai_mp.config.job_environment import job_size

_ONLY_PASSED = (__file__, str(Path(__file__).with_name("step_journal.py")))  # files that a failing call comes through
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WORD, _WORD_SECONDS = "vishwamai_mp/waits_in_vain/", 3.0
# Of gloo, NCCL and torch's store, when a peer is gone, or silent for longer than `parallel.timeout_minutes`.
_LOSS = re.compile(
    r"timed? ?out|timeout|connection (was )?(closed|reset|refused|aborted)|broken pipe|remote process exited"
    r"|socket|NCCL communicator was aborted|recvValue failed|Read error",
    re.IGNORECASE,
)


def run_distributed_program(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: 0 on success, 1 on failure; in a job, USER_ERROR_STATUS for a user's mistake.

    When one process of a job fails, its peers fail too, with errors about lost connections. So the first process of
    each machine to fail reports, and the others are silent. No process waits for another: torchrun ends the rest.
    """
    launched = is_launched()
    try:
        size = job_size()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS if launched else 1)
    if not launched and size in (None, 1):
        run_program(main)
    rank = os.environ["RANK"]
    spell_what_the_terminal_cannot()
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
        code = 1
        if line := about_the_system(error):
            if _first_to_fail():
                print(f"error: {line}", file=sys.stderr)
            code = USER_ERROR_STATUS
        elif is_loss_of_peers(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, as soon as the first process has ended
            silent = _silent_ranks()
            if _first_to_fail():
                print(f"error: {describe_loss(error, rank, silent)}\n{traceback.format_exc()}", file=sys.stderr)
        elif _first_to_fail():
            print(f"error on rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
    with contextlib.suppress(OSError):  # a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # not sys.exit: process groups of a failed job can hang in their destructors


def is_launched() -> bool:
    """Whether torchrun's agent, or our launcher around it, started this process as one of a job."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_loss_of_peers(error: BaseException) -> bool:
    """Whether a collective failed because another process did not answer: the fault is not where the error appears."""
    return isinstance(error, RuntimeError) and _LOSS.search(str(error)) is not None


def describe_loss(error: BaseException, rank: str, silent: str | None) -> str:
    """What is known when peers do not answer, and what is not.

    Args:
        error: of this rank's collective.
        rank: this one.
        silent: the ranks that gave no word afterwards; None where that cannot be asked.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _ONLY_PASSED]
    ours = [frame for frame in frames if "vishwamai_mp" in Path(frame.filename).parts]
    where = f" in {ours[-1].name} ({Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""
    what = one_line(error)[:200]
    if silent is None:
        who = "Which rank is at fault is not known here: the others' logs and machines may tell"
    elif silent:
        who = (
            f"No word within {_WORD_SECONDS:.0f} s from {silent}: dead, stopped, hung or still computing."
            " The fault is there rather than here"
        )
    else:
        who = (
            "All ranks report the same: the network between them, or one that was too slow and has come back"
            " (parallel.timeout_minutes)"
        )
    return f"rank {rank} waited{where} for other ranks in vain: {what}\n{who}. The stack of rank {rank}, which waited:"


def _silent_ranks() -> str | None:
    """The ranks that do not report within a moment that they, too, wait in vain; in words.

    Ranks report in the job's store, which outlives the failed groups: torchrun's agent holds it.
    """
    from torch.distributed import distributed_c10d

    try:
        store, world = distributed_c10d._get_default_store(), int(os.environ["WORLD_SIZE"])
        store.set_timeout(timedelta(seconds=_WORD_SECONDS))
        store.set(f"{_WORD}{os.environ['RANK']}", "waits")
        deadline = time.monotonic() + _WORD_SECONDS
        silent = list(range(world))
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"{_WORD}{rank}"])]
            time.sleep(0.1)
        time.sleep(0.5)  # for those that began to look a little later: the store may end with the first of us
    except (RuntimeError, ValueError):  # no group, or the store is gone
        return None
    if not silent:
        return ""
    named = ", ".join(map(str, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
    return f"rank{'s' if len(silent) > 1 else ''} {named}"


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
