"""Trains a model: the program that torchrun starts.

    torchrun --nproc-per-node 8 -m vishwamai_mp.pretrain --config 7b data.train=corpus_text_document \\
        data.tokenizer=spm.model training.output_dir=runs/first

Run again, the same command continues from the newest checkpoint in `training.output_dir`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from vishwamai_mp.config import load_config, preset_names, resolve, run_program, to_yaml
from vishwamai_mp.config.command_line import parse_command_line, section_list
from vishwamai_mp.config.job_environment import job_size, set_hardware_queues
from vishwamai_mp.config.schema import PretrainConfig

_EPILOG = f"""\
sections:
{section_list()}

Every key stands with its default and meaning in vishwamai_mp/config/schema/__init__.py;
`python -m vishwamai_mp.config.schema` prints them as a JSON schema, with which editors complete and check recipes.
The value of a text setting is taken to the letter; section.key=null undoes what the preset or recipe says.
"""


@dataclass
class Job:
    """What the command line asks for.

    Attributes:
        config: resolved; against torchrun's world size, where there is one or training is asked for.
        notes: what the user should know about how the settings were read.
        print_only: show the configuration instead of training.
    """

    config: PretrainConfig
    notes: list[str] = field(default_factory=list)
    print_only: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    job = parse_arguments(arguments)
    if job.print_only:
        if os.environ.get("RANK", "0") == "0":
            print("".join(f"# {note}\n" for note in job.notes) + to_yaml(job.config), end="")
        return 0
    set_hardware_queues(job.config.parallel)
    # torch and megatron-core take seconds to import; a mistake in the command line should not.
    from vishwamai_mp.runtime.importing import kept

    with kept():
        import psutil

        from vishwamai_mp.data.given import run_datasets
        from vishwamai_mp.data.tokenizer import Tokenizer
        from vishwamai_mp.runtime import distributed_session
        from vishwamai_mp.runtime.out_of_memory import advice_when_out_of_memory
        from vishwamai_mp.training.callbacks import usual_callbacks
        from vishwamai_mp.training.loop import Trainer
        from vishwamai_mp.tree_of_thoughts.endings import with_step_token

    config, began = job.config, psutil.Process().create_time()
    with distributed_session(config) as runtime, advice_when_out_of_memory(config):
        tokenizer = Tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        config = with_step_token(config, tokenizer)
        datasets = run_datasets(config, tokenizer, runtime)
        trainer = Trainer(config, runtime, datasets, usual_callbacks(config, tokenizer, began=began))
        for note in [*job.notes, *datasets.epochs(job.config.training), *datasets.notes]:
            trainer.say(note)
        trainer.train()
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> Job:
    """The job that the command line, and torchrun's environment, describe."""
    parser = argparse.ArgumentParser(
        prog="python -m vishwamai_mp.pretrain",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, help=f"a recipe (YAML), the guide's JSON, or a preset: {', '.join(preset_names())}"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    options = parse_command_line(parser, arguments)
    notes: list[str] = []
    processes = job_size() or (None if options.print_config else 1)
    config = load_config(options.config, options.overrides, notes)
    return Job(resolve(config, processes), notes, options.print_config)


if __name__ == "__main__":
    if "RANK" not in os.environ:  # no launcher waits for an exit status
        run_program(main)  # imports torch only when the command line is sound
    from vishwamai_mp.runtime.failure import run_distributed_program

    run_distributed_program(main)
