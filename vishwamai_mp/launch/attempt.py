"""One attempt at a job: a torchrun agent without restarts, whose exit status says what came of it.

Usage: python -m vishwamai_mp.launch.attempt <torchrun's options>; see `vishwamai_mp.launch`.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, Store, run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as handlers
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.launcher.api import launch_agent

from vishwamai_mp.config.errors import HUNG_STATUS, USER_ERROR_STATUS
from vishwamai_mp.launch import FAILED, NEVER_MET, STOPPED, WORKERS_LOG_LEVEL
from vishwamai_mp.runtime.failure import die_with_parent

_BACKEND = "fixed-machines"
_FINAL, _HEARD = "vishwamai_mp/final", "vishwamai_mp/heard"  # keys in the rendezvous' store
_HERE = "vishwamai_mp/here"  # and in one per machine its name
_PATIENT_SECONDS = 30.0  # between words about machines that have not come
_LISTEN_SECONDS = 5.0  # for another machine's word that a failure is final
_LINGER_SECONDS = 20.0  # at most: the machine with the store stays until all others have heard
_ENDED_BY_SIGNAL = {-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 130}


class Meeting:
    """torchrun's c10d rendezvous for machines whose number is fixed, and its store.

    Args:
        number: this machine's, where the launcher knows it.
    """

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.store: Store | None = None
        self.complete = False

    def handler(self, parameters: RendezvousParameters) -> Any:
        """The handler that the agent asks for."""
        backend, self.store = create_backend(parameters)
        handler = create_handler(self.store, backend, parameters)
        meet, waiting = handler.next_rendezvous, handler.num_nodes_waiting

        def next_rendezvous() -> Any:
            with self.telling_who_is_missing(parameters.min_nodes):
                found = meet()
            self.complete = True
            return found

        def num_nodes_waiting() -> int:
            if waiting():  # one that was in this meeting, dropped out without our workers noticing, and came back
                raise RendezvousConnectionError("a machine has come back; its place in this attempt is lost")
            return 0

        for method in (next_rendezvous, num_nodes_waiting):
            setattr(handler, method.__name__, method)
        handler.get_backend = lambda: _BACKEND  # type: ignore[method-assign]
        return handler

    @contextlib.contextmanager
    def telling_who_is_missing(self, machines: int) -> Iterator[None]:
        """While machine 0, which has the store, waits: every half minute say which machines have not come."""
        met = threading.Event()

        def tell() -> None:
            while not met.wait(_PATIENT_SECONDS):
                if absent := self.missing(machines):
                    _say(absent)

        if machines > 1 and self.number is not None:
            assert self.store is not None
            self.store.set(f"{_HERE}/{self.number}", socket.gethostname())
            if self.number == 0:
                threading.Thread(target=tell, daemon=True).start()
        try:
            yield
        finally:
            met.set()

    def missing(self, machines: int) -> str | None:
        """A line that names the machines which have never come; None: there are none, or the store has gone."""
        assert self.store is not None
        with contextlib.suppress(DistError, RuntimeError):
            absent = [str(number) for number in range(machines) if not self.store.check([f"{_HERE}/{number}"])]
            if absent:
                these = f"machine{'s' * (len(absent) > 1)} {', '.join(absent[:16])}{' …' * (len(absent) > 16)}"
                return f"waiting for {these} of {machines}: NODE_RANK={absent[0]} has not come to this rendezvous"
        return None

    def tell_final(self, machines: int, hosts: bool) -> None:
        """Tell the other machines that this job's failure is final. They need not be there any more."""
        if self.store is None or machines == 1:
            return
        with contextlib.suppress(DistError, RuntimeError):
            self.store.set(_FINAL, socket.gethostname())
            deadline = time.monotonic() + _LINGER_SECONDS
            while hosts and self.store.add(_HEARD, 0) < machines - 1 and time.monotonic() < deadline:
                time.sleep(0.1)

    def hears_final(self, machines: int) -> str | None:
        """The machine that says its failure is final, if one does within a moment."""
        if self.store is None or machines == 1:
            return None
        with contextlib.suppress(DistError, RuntimeError):
            self.store.wait([_FINAL], timedelta(seconds=_LISTEN_SECONDS))
            self.store.add(_HEARD, 1)
            return self.store.get(_FINAL).decode()
        return None


def main(arguments: list[str]) -> int:
    """Run the agent to its end.

    Returns:
        0, FAILED, NEVER_MET, STOPPED, HUNG_STATUS or USER_ERROR_STATUS.
    """
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _ignore)  # the process above passes them to the workers
    logging.disable(logging.ERROR)  # the agent's own account of a failure, a page of it
    os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.pop(WORKERS_LOG_LEVEL, "ERROR")
    options = run.parse_args(arguments)
    config, entrypoint, entrypoint_arguments = run.config_from_args(options)
    meeting = Meeting(int(os.environ["NODE_RANK"]) if os.environ.get("NODE_RANK", "").isdecimal() else None)
    handlers.register(_BACKEND, meeting.handler)
    config.rdzv_backend = _BACKEND
    config.max_restarts = 0
    config.signals_to_handle = "SIGQUIT"
    config.shutdown_timeout = 5  # s, for workers whose peer has failed: their step is lost
    hosts = config.rdzv_configs.get("is_host", "1") not in ("0", "False", "false")
    try:
        launch_agent(config, entrypoint, list(entrypoint_arguments))
        return 0
    except ChildFailedError as error:
        statuses = {failure.exitcode for failure in error.failures.values()}
        if USER_ERROR_STATUS in statuses:
            meeting.tell_final(config.max_nodes, hosts)
            return USER_ERROR_STATUS
        rank, failure = error.get_first_failure()
        why, outcome = f"rank {rank} {_how(failure.exitcode)}", FAILED
        if HUNG_STATUS in statuses:
            why, outcome = "the job hung; hang_report.txt in the run folder says which rank held it up", HUNG_STATUS
        elif failure.exitcode in _ENDED_BY_SIGNAL:  # the first: the agent ends the others by a signal itself
            outcome = STOPPED
    except (RendezvousError, DistError) as error:
        lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        why, outcome = f"the machines lost touch ({lines[0][:160]})", FAILED if meeting.complete else NEVER_MET
        if meeting.store is None:
            why = f"machine 0 cannot be reached at {config.rdzv_endpoint} ({lines[0][:160]})"
    machine = meeting.hears_final(config.max_nodes)
    if machine is not None:
        _say(f"{machine} has failed by a mistake that only its user can mend; see its output")
        return USER_ERROR_STATUS
    if outcome != STOPPED:
        _say(why)
    return outcome


def _how(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
    return f"ended with status {status}"


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _ignore(number: int, frame: Any) -> None:
    """Not SIG_IGN, which workers would inherit."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
