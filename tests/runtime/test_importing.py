"""The collector rests while the stack is imported, and never looks at it again."""

import gc
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
