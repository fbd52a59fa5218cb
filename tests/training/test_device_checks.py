"""What accelerators refuse; what CPUs refuse is tried in training (test_layouts.py), but for layouts."""

import pytest

from vishwamai_mp.config import ConfigError, load_config
from vishwamai_mp.training import device_checks
from vishwamai_mp.training.device_checks import check_device


@pytest.mark.parametrize("sums", ["memory.enabled=true", "tree.enabled=true"])
def test_what_cannot_be_deterministic_on_gpus(monkeypatch, sums):
    config = load_config({}, ["training.deterministic=true", sums])
    check_device(config)
    monkeypatch.setattr(device_checks, "is_accelerator", lambda _: True)
    with pytest.raises(ConfigError, match=r"training.deterministic=true with (memory.enabled|tree.value_signal)="):
        check_device(config)
    check_device(load_config({}, [sums]))
    check_device(load_config({}, ["training.deterministic=true", "cache.enabled=true"]))


def test_what_only_transformer_engine_overlaps():
    tensor = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    config = load_config({"precision": "bf16", "parallel": {"overlap_tensor_parallel": True, **tensor}})
    with pytest.raises(ConfigError, match=r"overlap_tensor_parallel=true: only Transformer Engine.*set it to false"):
        check_device(config)


def test_what_only_transformer_engine_keeps_in_fp8():
    config = load_config({"precision": "fp8_current", "fp8": {"params": True}})
    with pytest.raises(ConfigError, match=r"fp8.params=true: only weights of Transformer Engine.*set it to false"):
        check_device(config)
