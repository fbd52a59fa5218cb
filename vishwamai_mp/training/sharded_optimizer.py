"""AdamW over the rows that this rank holds of a fully sharded model: fp32, and without communication."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from torch import Tensor, nn

from vishwamai_mp.model.fully_sharded import FullySharded
from vishwamai_mp.runtime import Runtime
from vishwamai_mp.training.compact_adamw import MOMENTS, fill_moments

_MAIN = "fp32_param"


class ShardedOptimizer(MixedPrecisionOptimizer):
    """megatron-core's interface over torch's AdamW on plain tensors, which share memory with the split parameters.

    Args:
        config: megatron-core's.
        chunk: the model.
        runtime: process groups.
    """

    def __init__(self, config: OptimizerConfig, chunk: FullySharded, runtime: Runtime) -> None:
        self.chunk = chunk
        # A rank may hold no row of a small parameter, or of any that is trained.
        self.split = [split for split in chunk.parameters() if split.requires_grad and split.to_local().numel()]
        self.rows = [nn.Parameter(parameter.to_local().detach()) for parameter in self.split]
        pairs = list(zip(self.split, self.rows, strict=True))
        groups = [
            {"params": [rows for split, rows in pairs if (split.dim() > 1) == matrices], "wd_mult": float(matrices)}
            for matrices in (True, False)
        ]
        adam = torch.optim.AdamW(
            [{**group, "lr_mult": 1.0} for group in groups],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
        )
        super().__init__(adam, config, _scaler(config), fill_moments)
        self.is_stub_optimizer = False
        self.grad_stats_parallel_group, self.tp_group = runtime.groups.dp_cp, runtime.groups.tp

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def _copy_model_grads_to_main_grads(self) -> None:
        for split, rows in zip(self.split, self.rows, strict=True):
            rows.grad = torch.zeros_like(rows) if split.grad is None else split.grad.to_local()

    def _collect_main_grad_data_for_unscaling(self) -> list[Tensor]:
        return [rows.grad for rows in self.rows if rows.grad is not None]

    def _copy_main_params_to_model_params(self) -> None:
        """They are the same."""

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        """They are the same."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """Moments and, of a model in 16 bits, fp32 weights, as parts of the whole model's."""
        state = {f"{kind}.{name}": shard for kind, name, shard in self._shards()}
        for shard in state.values() if is_loading else ():
            shard.data = torch.empty_like(shard.data)  # the model's own weights are loaded into the views
        return {"state": state, "param_groups": self.state_dict()["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        loaded = state_dict["state"]
        for kind, name, shard in self._shards():
            shard.data.copy_(loaded[f"{kind}.{name}"])
        for state in self.optimizer.state.values():
            state["step"].copy_(loaded["common_step"])
        if self.grad_scaler and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _shards(self) -> Iterator[tuple[str, str, ShardedTensor]]:
        """Kind, parameter and place of each part of the state; its data are views."""
        fill_moments(self.optimizer)
        by_storage = {rows.untyped_storage().data_ptr(): rows for rows in self.rows}
        for name, shard in self.chunk.module.sharded_state_dict().items():
            rows = by_storage.get(shard.data.untyped_storage().data_ptr())
            if rows is None:
                continue  # a buffer
            start, shape = shard.data.storage_offset() - rows.storage_offset(), shard.data.shape
            values = {kind: self.optimizer.state[rows][kind] for kind in MOMENTS}
            if self.chunk.module.sharding.compute != torch.float32:
                values[_MAIN] = rows.detach()
            for kind, value in values.items():
                data = value.flatten()[start : start + shape.numel()].view(shape)
                key = f"optimizer.state.{kind}.{shard.key}"
                yield kind, name, replace(shard, key=key, data=data, dtype=data.dtype)


def _scaler(config: OptimizerConfig) -> DynamicGradScaler | None:
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )
