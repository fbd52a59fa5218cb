"""What ends a thought, in the words of a tokenizer."""

from dataclasses import replace
from typing import Any

from vishwamai_mp.config import PretrainConfig, UserError
from vishwamai_mp.data.tokenizer import Tokenizer


def ending_of_thoughts(tokenizer: Tokenizer, stop: str) -> dict[str, Any]:
    """What `TreeOfThoughts` takes to end thoughts at `stop`: a token of the vocabulary, or else a string."""
    try:
        ending: dict[str, Any] = {"stop_tokens": (tokenizer.token_to_id(stop),)}
    except UserError:
        ending = {"stop_string": stop}
    return {**ending, "end_token": tokenizer.eod_id if tokenizer.eod_id >= 0 else None}


def with_step_token(config: PretrainConfig, tokenizer: Tokenizer | None) -> PretrainConfig:
    """The configuration with `tree.step_token` as the tokenizer has it; without a tokenizer, or one without that
    token, values are learnt at the starts of documents alone."""
    tree = config.tree
    if not tree.enabled or tree.step_token is not None or tokenizer is None:
        return config
    (step_token,) = ending_of_thoughts(tokenizer, tree.stop).get("stop_tokens", (None,))
    return replace(config, tree=replace(tree, step_token=step_token))
