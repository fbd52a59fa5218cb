"""Machines of network namespaces: what runs on one is what is killed with it, and a cable that is pulled is felt."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples/fault_tolerance/machines.py"
_spec = importlib.util.spec_from_file_location("machines", _EXAMPLE)
assert _spec
assert _spec.loader
machines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(machines)

pytestmark = pytest.mark.skipif(machines.why_not() is not None, reason=f"{machines.why_not()}")


def test_a_machine_is_killed_whole_and_alone():
    """With what left its launcher's session and parent, as Slurm's daemons and their jobs do."""
    # In a namespace of its own for mounts and names, as `command` makes it.
    daemon = "setsid sh -c 'sleep 600 & sleep 600' >/dev/null 2>&1 & hostname"
    with machines.machines(2) as (first, second):
        names = [subprocess.check_output(m.command("sh", "-c", daemon), text=True) for m in (first, second)]
        assert names == ["n1\n", "n2\n"]
        machines.wait_for("both to run", lambda: len(first.processes()) >= 3 and len(second.processes()) >= 3, 10)
        here, others = psutil.Process(os.getpid()), second.processes()
        assert here not in first.processes()
        first.kill()
        machines.wait_for("the end of the first", lambda: not first.processes(), 10)
        assert second.processes() == others
        second.kill()
        machines.wait_for("the end of the second", lambda: not second.processes(), 10)


def test_a_cut_link_is_dead_in_both_directions_until_it_is_restored():
    def answers(here, there) -> bool:
        hello = "import socket, sys; socket.create_connection((sys.argv[1], 9), 0.5)"
        command = here.command(sys.executable, "-c", hello, there.name)
        told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        return "ConnectionRefusedError" in told  # nobody listens, but somebody is there

    with machines.machines(2) as (first, second):
        assert answers(first, second)
        second.cut()
        assert not answers(first, second)
        assert not answers(second, first)
        second.restore()
        assert answers(second, first)
