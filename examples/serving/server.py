#!/usr/bin/env python3
"""An OpenAI-compatible endpoint over a checkpoint, and a page to try the model on.

    pip install -c constraints.txt -e '.[serve]'
    python examples/serving/server.py --load runs/tiny --port 8000
    curl localhost:8000/v1/completions -d '{"prompt": "Once upon", "max_tokens": 40, "stream": true}'

Text completions, and chat where the model has a template (chat_template.jinja beside its tokenizer). `"strategy":
"tree"` searches instead of sampling; open http://localhost:8000/ to watch. One process, one model. There is no login:
whoever reaches the port may use the model, so by default only this machine does.
"""

import argparse
import socket
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vishwamai_mp.config import UserError, run_program
from vishwamai_mp.opening import find_run


def main() -> None:
    options = parse_arguments()
    check_address(options.host, options.port)
    run = find_run(options.load)
    run.answering(options.overrides)  # mistakes are told before torch is imported
    import uvicorn

    from vishwamai_mp.opening import laid_out
    from vishwamai_mp.serving import WEB_OPTIONS, Limits, Service, build_app
    from vishwamai_mp.tree_of_thoughts import ending_of_thoughts

    limits = Limits(**{field.name: value for field in fields(Limits) if (value := getattr(options, field.name, None))})
    draft = None if options.draft_model is None else find_run(options.draft_model)
    with laid_out(run, options.overrides, options.bos, options.weights, draft) as model:
        tree = model.tree_settings()
        ending = ending_of_thoughts(model.tokenizer.tokenizer, tree.stop)
        generator = model.generator(speculate=options.speculate, reuse_tokens=options.reuse_tokens)
        service = Service(generator, model.tokenizer, tree, ending, limits)
        try:
            app = build_app(service, model.name, options.allow_host)
            uvicorn.run(app, host=options.host, port=options.port, **WEB_OPTIONS)
        finally:
            service.close()


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on before a model is loaded, which may take minutes."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OverflowError:
        raise UserError(f"--port {port}: ports are below 65536") from None
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]  # behind it comes the address once more
        raise UserError(f"cannot listen on --host {host} --port {port}: {why}; name another") from None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a run folder, its checkpoints folder, or one checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        type=bare_name,
        metavar="NAME",
        help="a name by which this server is reached beside localhost, as behind a reverse proxy; may be repeated",
    )
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin prompts with the tokenizer's BOS (default: as tokenizer.json, else tokenizer_config.json, has it)",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="guess up to N tokens ahead, as a text went on where it was alike before; texts stay the same",
    )
    parser.add_argument(
        "--draft-model",
        metavar="PATH",
        help="with --speculate: a run folder or checkpoint of a smaller model with the same tokenizer, which guesses"
        " instead",
    )
    parser.add_argument(
        "--reuse-tokens",
        type=int,
        metavar="N",
        help="keep what was computed of up to N tokens of earlier texts, for later texts that begin alike; 0: nothing"
        " (default: as many tokens as 1 GiB holds keys and values of)",
    )
    parser.add_argument(
        "--weights",
        choices=["int8", "int4"],
        help="round the weights of linear layers: on CPUs, one or a few texts are written faster that way; for models"
        " in bf16 (precision=bf16 makes one of any), with half as much memory again",
    )
    parser.add_argument("--max-seconds", dest="seconds", type=positive(float), help="per request (default: 600)")
    parser.add_argument(
        "--max-waiting", dest="waiting", type=positive(int), help="texts of all clients at a time (default: 256)"
    )
    parser.add_argument(
        "--max-choices", dest="choices", type=positive(int), help="texts per prompt, n and best_of (default: 16)"
    )
    parser.add_argument("--max-prompts", dest="prompts", type=positive(int), help="per request (default: 64)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the search (tree.*)")
    options = parser.parse_intermixed_args()
    if options.draft_model is not None and not options.speculate:
        raise UserError("--draft-model guesses up to --speculate N tokens at a time; add it, --speculate 4 for a start")
    return options


def bare_name(text: str) -> str:
    if not text or set(text) & set("/:@ "):
        raise argparse.ArgumentTypeError(f"{text!r}: give a name alone, without https:// and without a port")
    return text


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: use a number above 0")
        return value

    return read


if __name__ == "__main__":
    run_program(main)
