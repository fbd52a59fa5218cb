"""Trains a model: the program that torchrun starts.

    torchrun --nproc-per-node 8 -m vishwamai_mp.pretrain --config 7b data.train=corpus_text_document \\
        data.tokenizer=spm.model training.output_dir=runs/first

Run again, the same command continues from the newest checkpoint in `training.output_dir`.
"""

import argparse
from collections.abc import Sequence

from vishwamai_mp.config import load_config, preset_names, resolve
from vishwamai_mp.config.schema import PretrainConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    config = parse_arguments(arguments)
    # torch and megatron-core take seconds to import; a mistake in the command line should not.
    from vishwamai_mp.data.datasets import build_datasets
    from vishwamai_mp.data.tokenizer import Tokenizer
    from vishwamai_mp.runtime import distributed_session
    from vishwamai_mp.runtime.out_of_memory import advice_when_out_of_memory
    from vishwamai_mp.training.callbacks import usual_callbacks
    from vishwamai_mp.training.loop import Trainer
    from vishwamai_mp.tree_of_thoughts.endings import with_step_token

    with distributed_session(config) as runtime, advice_when_out_of_memory(config):
        tokenizer = Tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        config = with_step_token(config, tokenizer)
        datasets = build_datasets(config, tokenizer, runtime)
        trainer = Trainer(config, runtime, datasets, usual_callbacks(config, tokenizer))
        for note in datasets.notes:
            trainer.say(note)
        trainer.train()
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> PretrainConfig:
    """The resolved configuration of this job, checked against torchrun's world size."""
    import os

    parser = argparse.ArgumentParser(
        prog="python -m vishwamai_mp.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, help=f"a recipe (YAML), the guide's JSON, or a preset: {', '.join(preset_names())}"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    options = parser.parse_args(arguments)
    return resolve(load_config(options.config, options.overrides), int(os.environ.get("WORLD_SIZE", 1)))


if __name__ == "__main__":
    from vishwamai_mp.runtime.failure import run_distributed_program

    run_distributed_program(main)
