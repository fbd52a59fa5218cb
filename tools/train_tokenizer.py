#!/usr/bin/env python3
"""Train a tokenizer on text, for tools/preprocess_data.py and for training.

example:
  python tools/train_tokenizer.py --input corpus/*.jsonl.zst --vocab-size 64000 --output-prefix tokenizer
    writes tokenizer.model: byte-pair tokens, the 256 bytes, <unk> <s> </s> <pad>,
    [MEMORY] [REASONING] [CACHE] [STEP], and single digits; any text encodes without loss
  python tools/train_tokenizer.py --type byte-bpe --input corpus.jsonl --vocab-size 64000 --output-prefix tokenizer
    writes tokenizer.json, of Hugging Face's kind
"""

import argparse
import sys
from collections.abc import Iterator

from vishwamai_mp.config.errors import UserError, run_program
from vishwamai_mp.config.wording import counted
from vishwamai_mp.data.byte_level_training import train_byte_level
from vishwamai_mp.data.corpus import CorpusReader, Malformed, read_block
from vishwamai_mp.data.corpus_tools import CorpusProgress, corpus_parser, stop_on_sigterm
from vishwamai_mp.data.tokenizer_training import train_tokenizer


def parse_arguments() -> argparse.Namespace:
    inputs = "JSON lines (.jsonl .json), .parquet, or plain text (.txt .md .rst .py), each also with .gz or .zst"
    parser = corpus_parser(__doc__ or "", inputs, "document")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="TOKENS", help="tokens in all, at least 400")
    parser.add_argument(
        "--output-prefix", required=True, metavar="PATH", help="the file is PATH.model, or PATH.json of byte-bpe"
    )
    parser.add_argument(
        "--type",
        choices=("bpe", "unigram", "byte-bpe"),
        default="bpe",
        help="SentencePiece's byte pairs or unigram pieces, or byte pairs over bytes; unigram models are not exported "
        "(default: bpe)",
    )
    parser.add_argument(
        *("--json-key", "--json-keys"),
        default="text",
        metavar="KEY",
        help="key or column that holds the text (default: text)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        metavar="SHARE",
        help="SentencePiece: share of the characters read that get a token of their own, in (0, 1]; the rest become "
        "bytes (default: 0.9995)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="SentencePiece: CPU threads (default: 2)")
    return parser.parse_args()


def texts(reader: CorpusReader, key: str, on_error: str, progress: CorpusProgress) -> Iterator[str]:
    documents = skipped = 0
    for block in reader:
        for document in read_block(block, [key]):
            if isinstance(document, Malformed):
                if on_error == "stop":
                    raise UserError(f"{document} (--on-error skip leaves such documents out)")
                skipped += 1
                progress.skipped(document)
            else:
                documents += 1
                yield document[0]
        progress.update(documents, reader.bytes_read)
    progress.close()
    print(f"{counted(documents, 'document')} read, {skipped} skipped; training", file=sys.stderr)


def main() -> None:
    arguments = parse_arguments()
    given = {"character_coverage": arguments.character_coverage, "num_threads": arguments.threads}
    options = {name: value for name, value in given.items() if value is not None}
    if arguments.type == "byte-bpe" and options:
        raise UserError("--character-coverage and --threads are SentencePiece's; leave them out with --type byte-bpe")
    if not 0 < options.get("character_coverage", 1) <= 1:
        raise UserError(f"--character-coverage {arguments.character_coverage}: a share in (0, 1]")
    if options.get("num_threads", 1) < 1:
        raise UserError(f"--threads {arguments.threads}: at least 1")
    stop_on_sigterm()
    reader = CorpusReader(arguments.input, [arguments.json_key])
    with CorpusProgress(reader.total_bytes) as progress:
        documents = texts(reader, arguments.json_key, arguments.on_error, progress)
        goal = (documents, arguments.vocab_size, arguments.output_prefix)
        if arguments.type == "byte-bpe":
            tokenizer = train_byte_level(*goal)
        else:
            tokenizer = train_tokenizer(*goal, model_type=arguments.type, **options)
    print(f"{tokenizer.path}: {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    run_program(main)
