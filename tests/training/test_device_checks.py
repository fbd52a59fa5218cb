"""What accelerators refuse; what CPUs refuse is tried in training (test_layouts.py)."""

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
