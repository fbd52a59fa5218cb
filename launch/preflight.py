#!/usr/bin/env python3
"""Is this machine fit to train? `python launch/preflight.py --help`; see `vishwamai_mp/launch/preflight.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout that is not installed

from vishwamai_mp.config import run_program
from vishwamai_mp.launch.preflight import main

if __name__ == "__main__":
    run_program(main)
