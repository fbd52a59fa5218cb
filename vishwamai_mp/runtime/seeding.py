"""Random numbers of a run: a function of (seed, step), so that a resumed run needs no saved generator states."""

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

# Far from each other and from the tracker's own offsets (2718 + rank), so that neighbours' streams are apart.
_STEP, _PLACE = 1_000_003, 1_618_033_987


def seed_step(seed: int, step: int, groups: ProcessGroupCollection) -> None:
    """Seed every generator of this process for one training step.

    megatron-core's tracker then gives replicated regions equal streams on all tensor parallel ranks, and sharded
    regions streams of their own. Data and context parallel ranks and pipeline stages, which see other tokens or are
    other layers, draw other numbers.

    Args:
        seed: of the run.
        step: from 0.
        groups: where this rank stands.
    """
    place = groups.dp_cp.rank() * groups.pp.size() + groups.pp.rank()
    # The tracker stays the object that it was: Transformer Engine's attention keeps the one that it was built with.
    tensor_parallel.model_parallel_cuda_manual_seed((seed + step * _STEP + place * _PLACE) % 2**31)
