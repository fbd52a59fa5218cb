#!/usr/bin/env python3
"""Turn conversations into rows for fine-tuning: loss on answers only, several conversations to a row.

example:
  python tools/prepare_chat_data.py --input chats.jsonl --tokenizer tokenizer.model --sequence-length 512 \\
      --output-prefix chats
    writes chats.bin/.idx and chats_marks.bin/.idx; train on them with
    data.train=chats data.prepared_rows=true training.sequence_length=512

A line is {"messages": [{"role": "user", "content": "…"}, …]}, {"conversations": [{"from": "human", "value": "…"}, …]},
{"question": "…", "answer": "…"} or {"prompt": "…", "completion": "…"}. An answer with "weight": 0, or "loss", "train"
or "trainable": false, is context without loss. Where the tokenizer has a chat template beside it (chat_template.jinja,
or in tokenizer_config.json), or with --chat-template, conversations are written by that, with "tools", "documents",
tool calls and whatever else of a record and its messages the template reads; a prompt and its completion are taken as
they stand. Otherwise, and with --no-chat-template, the template is the one documented in vishwamai_mp/data/chat.py. A
key that the template does not read is refused unless --ignore-keys names it. Lengths are in tokens. Files appear when
complete, and PATH_rows.json, which says how they were made; after an error nothing is left behind.
"""

import argparse
import shlex
from pathlib import Path

from vishwamai_mp.config.errors import run_program
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.corpus_tools import CorpusProgress, add_encoding, corpus_parser, stop_on_sigterm
from vishwamai_mp.data.prepare import PrepareReport, prepare


def parse_arguments() -> argparse.Namespace:
    parser = corpus_parser(__doc__ or "", "JSON lines (.jsonl .json), also with .gz or .zst", "line")
    add_encoding(parser)
    parser.add_argument(
        "--sequence-length", type=int, required=True, metavar="N", help="training.sequence_length, in tokens"
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PATH", help="files are PATH.bin, .idx and PATH_marks.bin, .idx"
    )
    parser.add_argument("--no-packing", action="store_true", help="one conversation to a row, the rest is padding")
    template = parser.add_mutually_exclusive_group()
    template.add_argument(
        "--chat-template",
        metavar="FILE",
        type=Path,
        help="a Jinja template for conversations (default: the one beside the tokenizer, if there is one)",
    )
    template.add_argument(
        "--no-chat-template",
        dest="chat_template",
        action="store_const",
        const="none",
        help="leave the template beside the tokenizer alone",
    )
    parser.add_argument(
        "--bos", action="store_true", help="begin conversations with the tokenizer's bos, as models like Llama expect"
    )
    parser.add_argument(
        "--too-long",
        choices=("stop", "truncate", "skip"),
        default="stop",
        help="at a conversation longer than a row: stop with its file:line, keep its beginning, or leave it out "
        "(default: stop)",
    )
    parser.add_argument(
        "--ignore-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of records and messages that are left out; one that is not known stops otherwise",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    stop_on_sigterm()
    with CorpusProgress() as progress:

        def show(report: PrepareReport) -> None:
            progress.update(report.conversations, report.bytes_read, report.total_bytes)

        report = prepare(
            arguments.input,
            arguments.tokenizer,
            arguments.output_prefix,
            sequence_length=arguments.sequence_length,
            packing=not arguments.no_packing,
            begin=arguments.bos,
            chat_template=arguments.chat_template or "own",
            too_long=arguments.too_long,
            on_error=arguments.on_error,
            ignored_keys=arguments.ignore_keys,
            workers=arguments.workers,
            on_progress=show,
            on_skip=progress.skipped,
        )
    print(
        f"{report.prefix}: {counted(report.conversations, 'conversation')} in {counted(report.rows, 'row')} of"
        f" {report.row_tokens} tokens, {report.filled:.1%} filled; loss on {report.learnt_tokens} of"
        f" {report.tokens} tokens"
    )
    template = report.template
    if template:
        by = f"chat template: {template.name} (sha256 {template.sha256[:12]}); answers by {template.answers_by}"
        print(by + ("; it may write the date of today" if template.tells_time else ""))
    else:
        print("chat template: the headings of vishwamai_mp/data/chat.py")
    print(
        f"{report.truncated} truncated, {report.too_long} too long and {report.malformed} malformed left out;"
        f" {report.seconds:.1f} s"
    )
    print(
        f"train with {shlex.quote(f'data.train={report.prefix}')} data.prepared_rows=true"
        f" training.sequence_length={arguments.sequence_length}"
    )


if __name__ == "__main__":
    run_program(main)
