"""Each room that builds on megatron-core can be the first import of a program: the adapter comes before."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_MODULES = ["model.rotary", "precision.linears", "inference.generation"]
# Forked after torch is there, each child is a program of its own as far as megatron-core goes.
_PROGRAM = """
import importlib, os, sys, torch
children = {}
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        importlib.import_module("vishwamai_mp." + name)
        os._exit(0)
    children[child] = name
for child, name in children.items():
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def test_any_room_may_come_first():
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, *_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", done.stderr
