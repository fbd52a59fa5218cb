"""Our FP8 and FP4 arithmetic against Transformer Engine's and torchao's own references, number by number.

Transformer Engine's Python lies where `vishwamai_mp/runtime/fused_layers.py` looks for it, as tests/run.sh puts it;
torchao's beside it, if it is to be compared too: pip install --no-deps --target FOLDER torchao==0.18.0
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vishwamai_mp.runtime.fused_layers import python_folder

_FOLDER = python_folder()
_PROGRAM = Path(__file__).with_name("transformer_engine_oracles.py")

pytestmark = pytest.mark.skipif(
    _FOLDER is None, reason="Transformer Engine's Python is not where runtime/fused_layers.py says"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the program counted."""
    command = [sys.executable, str(_PROGRAM), str(_FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def test_scales_of_all_bf16_amaxes_and_two_million_others(found):
    assert len(found["scales"]) == 2 * 2 * 2
    assert all(wrong == 0 for wrong, _ in found["scales"].values())
    assert {count for _, count in found["scales"].values()} == {32639, 2_000_000}


def test_delayed_histories_and_scales(found):
    """Theirs in Python multiplies by a reciprocal, given a number for the maximum; ours divides, as their kernel."""
    assert len(found["delayed"]) == 2 * 4
    assert all(wrong == 0 for wrong, _, _ in found["delayed"].values())
    assert all(0 < off < count / 2 for _, off, count in found["delayed"].values())


def test_codes_of_current_scaling(found):
    assert found["current"] == {"e4m3": 0, "e5m2": 0}


@pytest.mark.parametrize("kind", ["linear", "fp4_linear"])
def test_a_whole_linear_layer(found, kind):
    """Equal, but for few numbers that are rounded to the other side: products are summed in another order."""
    for wrong, count, _ in found[kind].values():
        assert wrong < count / 1000
    assert {name for name in found[kind] if name.endswith("fp32")} == {"y fp32", "dx fp32", "dw fp32"}


def test_blocks(found):
    assert found["blocks"] == {"1x128": 0, "128x1": 0, "128x128": 0}


def test_mx_against_torchao(found):
    """Equal, but where a block's scale is the smallest there is: 2^-127, which torchao does not divide by."""
    if "mx" not in found:
        pytest.skip("torchao is not in TRANSFORMER_ENGINE_FOLDER")
    for name, wrong in found["mx"].items():
        assert wrong == 0 or name.endswith("every amax: codes at scale 2^-127"), name


def test_nvfp4(found):
    """Codes, block scales and tensor scales of inputs, of what is rotated and of weights, extremes among them."""
    assert all(wrong == 0 for wrong, _ in found["fp4"].values()), found["fp4"]
    assert sum(count for _, count in found["fp4"].values()) > 2_000_000
    assert {name.split(", ")[-1] for name in found["fp4"]} == {"forward", "tokens", "weights"}
