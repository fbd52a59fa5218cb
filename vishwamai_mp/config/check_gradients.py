"""What `parallel.reduce_grads_in` and `parallel.fuse_grad_accumulation` go with."""

from typing import TYPE_CHECKING

from vishwamai_mp.config.errors import ConfigError, leave_out

if TYPE_CHECKING:
    from vishwamai_mp.config.schema import PretrainConfig


def check_gradients(config: "PretrainConfig") -> None:
    """Refuse sums of gradients that the model's precision or its sharding does not have.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    parallel, precision = config.parallel, config.precision
    if parallel.reduce_grads_in == "bf16" and precision in ("fp32", "fp16"):
        why = "its gradients are fp32" if precision == "fp32" else "bf16 has fewer digits than its gradients"
        raise ConfigError(
            f"parallel.reduce_grads_in=bf16 with precision={precision}: {why}; use bf16, or"
            f" {leave_out('parallel.reduce_grads_in')}"
        )
    if parallel.fuse_grad_accumulation and parallel.fully_sharded:
        raise ConfigError(
            "parallel.fuse_grad_accumulation=true with parallel.fully_sharded=true: gradients are summed as they are"
            " reduced; set one of them to false"
        )
