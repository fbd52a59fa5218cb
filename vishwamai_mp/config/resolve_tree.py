"""Derives and checks the `tree` section."""

from dataclasses import replace

from vishwamai_mp.config.errors import ConfigError
from vishwamai_mp.config.schema import TreeConfig


def resolve_tree(tree: TreeConfig) -> TreeConfig:
    """Fill in derived values of the `tree` section and validate it.

    Raises:
        ConfigError: names the key, the value and the mend.
    """
    if tree.pruning_threshold > 1:
        raise ConfigError(
            f"tree.pruning_threshold={tree.pruning_threshold}: a share of the best sibling's score; use 0 to 1"
        )
    if tree.value_weight == 0 and tree.logprob_weight == 0:
        raise ConfigError("tree.value_weight=0 and tree.logprob_weight=0 leave no score; raise one of them")
    if tree.value_gradient and tree.value_loss_weight == 0:
        raise ConfigError("tree.value_gradient=true has no effect at tree.value_loss_weight=0; raise the latter")
    return replace(tree, branching=tree.beam_width if tree.branching is None else tree.branching)
