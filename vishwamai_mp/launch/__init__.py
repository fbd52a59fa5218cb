"""Starts the processes of a job on this machine, and starts them again: what the scripts in `launch/` run.

    python -m vishwamai_mp.launch <torchrun's own options> -m vishwamai_mp.pretrain …

Takes torchrun's options and uses torchrun's agent, with three differences.

- SIGTERM, SIGINT and SIGHUP are a wish to stop, handed to the workers, which finish their step and save. They get the
  time they need, and a job that ended so ends with 0. torchrun kills them after 30 s and always ends with 1.
- Every attempt is a new agent process and a new rendezvous. When a machine drops out, the others give up their attempt
  and wait for it to come back. torchrun's agents renew a rendezvous in place; where one of them was killed the
  survivors' store, restart count and cached address no longer fit those of the newcomer, and all of them time out.
- A user's mistake and a lack of memory are final: the same command would fail the same way. No machine retries.

Three layers of processes, each ended by the kernel when the one above is gone, be it by SIGKILL:

    __main__.py    counts attempts, passes signals on; imports no torch
    attempt.py     one agent: rendezvous, workers, their outcome as an exit status
    workers        `vishwamai_mp.pretrain`, one per rank
"""

# Exit statuses of an attempt, beside 0. What a worker says by its own status is in `config.errors`: a user's mistake
# (78), or that it was ended because the job hung (79), which the launcher ends with too when no restart is left.
FAILED = 1  # workers ran, and one failed or a machine dropped out
NEVER_MET = 75  # no worker ran: the machines did not come together (EX_TEMPFAIL of sysexits.h)
STOPPED = 76  # workers were ended by the signal before they had begun to listen for it

WORKERS_LOG_LEVEL = "VISHWAMAI_WORKERS_LOG_LEVEL"  # an attempt's variable: what workers get as TORCH_CPP_LOG_LEVEL
