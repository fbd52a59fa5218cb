#!/usr/bin/env python3
"""Turn text into the indexed token files that training reads.

example:
  python tools/preprocess_data.py --input corpus/*.jsonl.zst --tokenizer tokenizer.model --append-eod \\
      --workers 8 --output-prefix corpus/train
    writes corpus/train_text_document.bin and .idx; train on them with data.train=corpus/train_text_document

Documents keep the order of the input unless they are to be shuffled. The files are byte for byte those of Megatron-LM's
tool for the same tokenizer, and the same for any number of workers. They appear when complete. A run that was killed or
stopped, or whose disk was full, goes on by the same command: PATH.partial keeps what is done, twice a minute.
"""

import argparse
import sys

from vishwamai_mp.config.errors import run_program
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.corpus_tools import CorpusProgress, add_encoding, corpus_parser, stop_on_sigterm
from vishwamai_mp.data.preprocess import PreprocessReport, preprocess


def parse_arguments() -> argparse.Namespace:
    inputs = (
        "JSON lines (.jsonl .json), .parquet, or plain text (.txt .md .rst .py, a document per file), each also with"
        " .gz or .zst; a document may have up to 256 MiB"
    )
    parser = corpus_parser(__doc__ or "", inputs, "document")
    add_encoding(parser)
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys or columns that hold text; each makes a pair of files of its own (default: text)",
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument(
        "--append-bos", action="store_true", help="begin each document with the tokenizer's beginning-of-sequence token"
    )
    parser.add_argument(
        "--split-documents-at",
        choices=("blank-lines",),
        help="make a document of each stretch of a plain text file between blank lines (default: of the whole file)",
    )
    parser.add_argument(
        "--dedup",
        choices=("exact", "minhash"),
        help="drop documents that an earlier one repeats: exact, of the same text (100 bytes of memory for each that"
        " stays); minhash, nearly the same, 80%% of all runs of five tokens by estimate (2.5 KB each; needs rensa)",
    )
    parser.add_argument(
        "--shuffle-documents",
        action="store_true",
        help="write documents in an order drawn from --seed; beside the output the disk holds all tokens twice",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of --shuffle-documents (default: 1234)")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew instead of going on from what a killed run has left"
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PATH", help="files are PATH_<key>_document.bin, .idx"
    )
    arguments = parser.parse_args()
    if arguments.seed is not None and not arguments.shuffle_documents:
        parser.error("--seed is for --shuffle-documents")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    seed = 1234 if arguments.seed is None else arguments.seed
    stop_on_sigterm()
    with CorpusProgress() as progress:

        def show(report: PreprocessReport) -> None:
            progress.update(report.documents, report.bytes_read, report.total_bytes)

        report = preprocess(
            arguments.input,
            arguments.tokenizer,
            arguments.output_prefix,
            keys=arguments.json_keys,
            append_eod=arguments.append_eod,
            append_bos=arguments.append_bos,
            split_documents_at=arguments.split_documents_at,
            dedup=arguments.dedup,
            shuffle_seed=seed if arguments.shuffle_documents else None,
            workers=arguments.workers,
            on_error=arguments.on_error,
            restart=arguments.restart,
            on_progress=show,
            on_skip=progress.skipped,
            say=progress.say,
        )
    for key, prefix in report.prefixes.items():
        print(f"{prefix}: {counted(report.documents, 'document')}, {counted(report.tokens[key], 'token')}")
    if arguments.dedup:
        share = report.repeated_documents / max(1, report.documents + report.repeated_documents)
        dropped = counted(report.repeated_documents, "repeated document")
        print(f"--dedup {arguments.dedup}: {dropped} dropped ({share:.1%})")
    if arguments.shuffle_documents:
        print(f"documents shuffled by --seed {seed}")
    if report.documents == 1:
        print(
            "warning: the corpus is one document, and data.split divides a corpus between documents: none of it can"
            " be held out; cut plain text with --split-documents-at blank-lines, or name another corpus in data.valid",
            file=sys.stderr,
        )
    rate = report.total_bytes / report.seconds / 1e6
    print(
        f"{counted(report.empty_documents, 'document')} without text, {report.skipped_documents} malformed skipped; "
        f"{report.seconds:.1f} s, {report.documents / report.seconds:.0f} docs/s, {rate:.2f} MB/s of input"
    )


if __name__ == "__main__":
    run_program(main)
