"""Model-parallel pretraining of language models with neural memory, a differentiable cache and tree of thoughts."""

import os
import sys
from types import TracebackType

__version__ = "0.1.0"

_report = sys.excepthook


def _report_interrupts_briefly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook by which Ctrl-C while modules are imported gives a line instead of their stack.

    `run_program` sees to it from the call of a program's `main` on. Importing comes before and takes seconds; only what
    every import of this package begins with is early enough. Python then ends by the signal, 130 to a shell.
    """
    modules, at = 0, trace
    while at is not None:
        code, at = at.tb_frame.f_code, at.tb_next
        modules += code.co_name == "<module>" or code.co_filename.startswith("<frozen importlib")
    if not issubclass(kind, KeyboardInterrupt) or modules < 2:  # the main program is one
        _report(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        print("interrupted", file=sys.stderr)


sys.excepthook = _report_interrupts_briefly

# Of threads that share an operator, GNU's OpenMP has those that are done spin for milliseconds until the last is. On a
# machine that does other work too the last one waits for a core that they hold, and a small model's steps took 20 times
# as long. This is tens of microseconds to half a millisecond. It is read once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
