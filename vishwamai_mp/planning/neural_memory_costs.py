"""Parameters and FLOPs of the neural memory. A test holds these formulae against the built module."""

from vishwamai_mp.config import MemoryConfig
from vishwamai_mp.config.component_shapes import CONVOLUTION_TAPS, memory_widths


def memory_parameters(memory: MemoryConfig) -> int:
    """Of all layers that have one.

    Args:
        memory: resolved.
    """
    if not memory.enabled:
        return 0
    return _modules(memory) * (_matrices(memory) + _vectors(memory))


def memory_forward_flops_per_token(memory: MemoryConfig) -> float:
    """Matrix products of one token's forward pass through all memories, a multiply-add counted as two.

    That of training, in chunks of `chunk_size`; the recurrence that decodes needs less. Linear in the sequence: its
    length does not enter.
    """
    if not memory.enabled:
        return 0.0
    return _modules(memory) * 2 * _matrices(memory) + rule_flops_per_token(memory)


def rule_flops_per_token(memory: MemoryConfig) -> float:
    """The part of `memory_forward_flops_per_token` that is not projections: writing and reading the fast weights."""
    return _modules(memory) * heads(memory) * _rule_flops(memory)


def heads(memory: MemoryConfig) -> int:
    """Heads of one memory, over all ranks."""
    size, head_dim = memory_widths(memory)
    return size // head_dim


def memory_state_bytes(memory: MemoryConfig) -> int:
    """What decoding keeps of one sequence in fast weights, over all layers and ranks: fp32, whatever the context."""
    parts = 2 if memory.momentum else 1
    return _modules(memory) * memory.num_memory_layers * heads(memory) * parts * _head_dim(memory) ** 2 * 4


def _head_dim(memory: MemoryConfig) -> int:
    return memory_widths(memory)[1]


def _modules(memory: MemoryConfig) -> int:
    return len(memory.layers or ()) if memory.enabled else 0


def _gates(memory: MemoryConfig) -> int:
    return memory.num_memory_layers * (3 if memory.momentum else 2)


def _matrices(memory: MemoryConfig) -> int:
    """Projections: query, key and value of each level, read gate and gates; output."""
    assert memory.hidden_size is not None
    size, head_dim = memory_widths(memory)
    per_head = (3 * memory.num_memory_layers + 1) * head_dim + _gates(memory)
    return memory.hidden_size * (heads(memory) * per_head + size)


def _vectors(memory: MemoryConfig) -> int:
    """Input norm; convolution, gate biases, read norm and, of several levels, their mix, of each head."""
    assert memory.hidden_size is not None
    levels, head_dim = memory.num_memory_layers, _head_dim(memory)
    per_head = 3 * levels * head_dim * CONVOLUTION_TAPS + _gates(memory) + head_dim + (levels if levels > 1 else 0)
    return memory.hidden_size + heads(memory) * per_head


def _rule_flops(memory: MemoryConfig) -> float:
    """The momentum delta rule of one token in one head, all levels."""
    width, chunk, levels = _head_dim(memory), memory.chunk_size, memory.num_memory_layers
    state = 2 * width * width * (2 if memory.momentum else 1)  # a vector times the state, or into it
    pairs = 2 * chunk * width  # a token with the tokens of its chunk
    reads = 2 * levels - 1  # each level by its query, each but the last by the next level's key
    coefficients = 2 * chunk * (chunk + 1) if memory.momentum else 0
    write = 2 * state + 2 * pairs + coefficients  # erase and write; key products, and the solved system applied
    return levels * write + reads * (state + 2 * pairs)
