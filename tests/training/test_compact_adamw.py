"""AdamW with moments in bf16: fp32 arithmetic on what was rounded; and what the host must have room for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vishwamai_mp.config import OptimizerConfig, UserError
from vishwamai_mp.training import compact_adamw
from vishwamai_mp.training.compact_adamw import MOMENTS, CompactAdamW, use_compact_moments

_OPTIONS: Any = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_it_is_adamw_whose_moments_are_rounded_after_each_step():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(40, 3)) for _ in range(2))
    compact = CompactAdamW([{"params": [ours]}], torch.bfloat16, on_host=False, **_OPTIONS)
    plain = torch.optim.AdamW([theirs], fused=True, **_OPTIONS)
    for step in range(4):
        ours.grad = theirs.grad = torch.randn(ours.shape, generator=generator)
        compact.step()
        plain.step()
        assert torch.equal(ours, theirs)
        for name in MOMENTS:
            assert (plain.state[theirs][name] != plain.state[theirs][name].bfloat16()).any()
            plain.state[theirs][name].copy_(plain.state[theirs][name].bfloat16())
            assert compact.state[ours][name].dtype == torch.bfloat16
            assert torch.equal(compact.state[ours][name].float(), plain.state[theirs][name])
        assert compact.state[ours]["step"] == step + 1


def test_loading_keeps_type_and_place():
    parameter = torch.nn.Parameter(torch.ones(4))
    compact = CompactAdamW([{"params": [parameter]}], torch.bfloat16, on_host=False, **_OPTIONS)
    values = {name: torch.full((4,), 1 / 3) for name in MOMENTS}
    groups = [{**group, "params": [0], "step": 5} for group in compact.param_groups]
    compact.load_state_dict({"state": {0: values}, "param_groups": groups})
    state = compact.state[parameter]
    assert state["step"] == 5  # where Transformer Engine is, megatron-core says it there
    assert all(torch.equal(state[name], values[name].bfloat16()) for name in MOMENTS)


def test_a_host_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(compact_adamw, "room_on_host", lambda: 1.5 * 2**20)
    part: Any = SimpleNamespace(optimizer=torch.optim.AdamW([torch.nn.Parameter(torch.ones(2**18))]))
    use_compact_moments(part, OptimizerConfig(moments_on_host=True, moments_in="bf16"))
    assert isinstance(part.optimizer, CompactAdamW)
    with pytest.raises(UserError, match=r"moments_on_host=true: 0\.0 GiB for each process of this machine.*bf16"):
        use_compact_moments(part, OptimizerConfig(moments_on_host=True))
