"""What is settled while the stack is imported: the collector rests, and threads do not spin for long."""

import gc
import os
import subprocess
import sys

import pytest

from vishwamai_mp.runtime.importing import kept


def test_the_collector_rests_meanwhile_and_is_back_after_an_error():
    with pytest.raises(ImportError):
        _fail_while_importing()
    assert gc.isenabled()


def _fail_while_importing():
    with kept():
        assert not gc.isenabled()
        with kept():
            pass
        assert not gc.isenabled()
        raise ImportError


def test_what_the_model_imports_is_not_looked_at_again():
    program = "import gc, vishwamai_mp.model; print(gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()))"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    enabled, frozen, looked_at = run.stdout.split()
    assert enabled == "True"
    assert int(frozen) > 10 * int(looked_at)


@pytest.mark.parametrize(
    ("said", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_that_wait_do_not_keep_a_core_for_long(said, found):
    """Told before torch is imported, when it is read; what the environment says stays."""
    program = "import os, sys, vishwamai_mp; print(os.environ.get('GOMP_SPINCOUNT', ''), 'torch' in sys.modules)"
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], env=inherited | said, capture_output=True, text=True)
    assert done.stdout == f"{found} False\n", done.stderr
