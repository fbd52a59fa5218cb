"""Which rank of a job is at fault when it hangs, found out by a process that no rank can hold up.

Each rank writes what it is doing into a few kilobytes of shared memory (`shared.py`; the rank's side is
`runtime.step_journal`). On every machine one process reads them (`watchdog.py`), and when a rank takes longer than it
may, the machines put together what they know and one of them says who waits for whom (`verdict.py`, `hang_report.py`).

Needs no torch, so that the process starts at once and is small.
"""
