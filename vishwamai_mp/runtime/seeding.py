"""Random numbers of a run: a function of (seed, step), so that a resumed run needs no saved generator states."""

from megatron.core import tensor_parallel


def seed_step(seed: int, step: int) -> None:
    """Seed every generator of this process for one training step.

    megatron-core's tracker then gives replicated regions equal streams on all tensor parallel ranks, and sharded
    regions streams of their own.
    """
    # A multiplier far from the tracker's own offsets (2718 + rank) keeps neighbouring steps' streams apart.
    tensor_parallel.model_parallel_cuda_manual_seed((seed + step * 1_000_003) % 2**31, force_reset_rng=True)
