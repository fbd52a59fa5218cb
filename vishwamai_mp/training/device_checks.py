"""Settings that the present device has no use for, or cannot keep.

Asked when training begins, not when a run's model is opened on another machine.
"""

from vishwamai_mp.config import ConfigError, PretrainConfig
from vishwamai_mp.config.errors import leave_out
from vishwamai_mp.precision import PrecisionPolicy, use_transformer_engine
from vishwamai_mp.runtime import device, is_accelerator


def check_device(config: PretrainConfig) -> None:
    """Refuse what cannot act here.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    parallel, training = config.parallel, config.training
    fused = use_transformer_engine(PrecisionPolicy.of_run(config))
    for name in ("fuse_grad_accumulation", "overlap_tensor_parallel"):
        if getattr(parallel, name) and not fused:
            raise ConfigError(f"parallel.{name}=true: only Transformer Engine's layers on GPUs do so; set it to false")
    if config.fp8.params and not fused:
        raise ConfigError("fp8.params=true: only weights of Transformer Engine's layers on GPUs do so; set it to false")
    if is_accelerator(device()):
        _check_determinism(config)
        return
    if config.optimizer.moments_on_host:
        raise ConfigError("optimizer.moments_on_host=true: on CPUs they lie nowhere else; set it to false")
    if training.cuda_graphs:
        raise ConfigError("training.cuda_graphs=true: only GPUs are launched by graphs; set it to false")
    if training.offload_layers:
        raise ConfigError(
            f"training.offload_layers={training.offload_layers}: on CPUs activations lie nowhere else;"
            f" {leave_out('training.offload_layers')}"
        )
    if parallel.nccl is not None:
        raise ConfigError(f"parallel.nccl: CPUs communicate by gloo; {leave_out('parallel.nccl')}")


def _check_determinism(config: PretrainConfig) -> None:
    """CUDA sums along a row of floating point numbers in an order that differs from run to run."""
    if not config.training.deterministic:
        return
    for key, sums in (
        ("memory.enabled=true", config.memory.enabled),
        ("tree.value_signal=likelihood", config.tree.enabled and config.tree.value_signal == "likelihood"),
    ):
        if sums:
            raise ConfigError(
                f"training.deterministic=true with {key}: its running sums have no deterministic kernel on GPUs; set"
                " training.deterministic=false"
            )
