"""
Prepares texts and writes training rows.

    python -m hsa_lab.chat_rows.prepare streams --tokenizer DIR --books ../shared/data/books ../shared/data/more_books \\
        --code "/usr/lib/python3/**/*.py" --reference "/usr/share/doc/**/*.txt" --output out/streams
    python -m hsa_lab.chat_rows.prepare rows --tokenizer DIR --streams out/streams --qa ../shared/data/qa/train.jsonl.gz \\
        --babi ../shared/data/babi --length 1024 --tokens 20000000 --workers 2 --output out/rows
    python -m hsa_lab.chat_rows.prepare show --tokenizer DIR --streams out/streams --length 1024

To be run in the folder `examples`. `streams` makes one stream of tokens a split of each kind of text; `rows` writes
shards of rows (see `rows.save_rows`) and mixture.json, which counts what is in them; `show` prints some rows to read.
"""

import argparse
import json
from collections import Counter
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from transformers import AutoTokenizer

from .haystack import read_books, read_files, save_stream
from .mixture import RECIPE, Materials, rows
from .rows import Row, save_rows
from .splits import SPLITS


SHARD_TOKENS = 4_000_000


def load_tokenizer(arguments: argparse.Namespace):
    options = {"gguf_file": arguments.gguf} if arguments.gguf else {}
    return AutoTokenizer.from_pretrained(arguments.tokenizer, **options)


def make_streams(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments)
    for split in SPLITS:
        for name, texts in (
            ("books", read_books(arguments.books, split)),
            ("code", read_files(arguments.code, split)),
        ):
            if not getattr(arguments, name):
                continue
            path = Path(arguments.output) / f"{name}-{split}.npy"
            print(f"{path}: {save_stream(path, texts, tokenizer):,} tokens", flush=True)


def load_materials(arguments: argparse.Namespace) -> tuple[Materials, dict]:
    """The materials, and the recipe without the families that nothing was named for, unless a recipe was named."""
    materials = Materials.load(
        load_tokenizer(arguments), arguments.streams, arguments.split, arguments.qa, arguments.babi, arguments.chats
    )
    if arguments.recipe:
        return materials, json.loads(Path(arguments.recipe).read_text(encoding="utf-8"))
    families = {name: share for name, share in RECIPE["families"].items() if name not in materials.missing()}
    return materials, RECIPE | {"families": families}


def write_shards(arguments: argparse.Namespace, worker: int) -> dict[str, Counter]:
    """The shards of one worker, and what is in them."""
    materials, recipe = load_materials(arguments)
    source = rows(materials, recipe, arguments.length, arguments.seed * 1000 + worker)
    shards = -(-arguments.tokens // SHARD_TOKENS)
    counts = {"rows": Counter(), "questions": Counter(), "roles": Counter()}
    for shard in range(worker, shards, arguments.workers):
        size = min(SHARD_TOKENS, arguments.tokens - shard * SHARD_TOKENS)
        made = list(islice(source, max(1, size // arguments.length)))
        save_rows(made, Path(arguments.output) / f"{arguments.split}-{arguments.length}-{shard:05d}")
        for row in made:
            count_row(row, counts)
    return counts


def count_row(row: Row, counts: dict[str, Counter]) -> None:
    counts["rows"][row.turns[0][0].split(" ")[0] if row.turns else "text"] += 1
    counts["questions"].update(f"{family.split(' ')[0]} {kind}" for family, kind, _, _ in row.turns)
    values, numbers = row.roles, ("ignored", "text", "hidden", "answer", "value")
    for number, name in enumerate(numbers):
        counts["roles"][name] += int((values == number).sum())


def make_rows(arguments: argparse.Namespace) -> None:
    jobs = [(arguments, worker) for worker in range(arguments.workers)]
    if arguments.workers == 1:
        results = [write_shards(*jobs[0])]
    else:
        with get_context("spawn").Pool(arguments.workers) as pool:
            results = pool.starmap(write_shards, jobs)
    total = {name: dict(sum((result[name] for result in results), Counter())) for name in results[0]}
    path = Path(arguments.output) / f"mixture-{arguments.split}-{arguments.length}.json"
    path.write_text(json.dumps(total, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(total, indent=2))


def show(arguments: argparse.Namespace) -> None:
    materials, recipe = load_materials(arguments)
    decode = materials.builder.tokenizer.decode
    for row in islice(rows(materials, recipe, arguments.length, arguments.seed), arguments.count):
        print("=" * 40, decode(row.ids), sep="\n")
        for number, (family, kind, start, end) in enumerate(row.turns):
            found = [decode(row.ids[first:last]) for turn, first, last in row.evidence if turn == number]
            print(f"-- {family}, {kind}: {decode(row.ids[start:end])!r} from {found}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    streams = commands.add_parser("streams", help="tokenise books and source code")
    streams.add_argument("--books", nargs="+", required=True, help="folders with *.jsonl.gz and index.tsv")
    streams.add_argument("--code", nargs="*", default=[], help='files of code, "*" and "**" allowed')
    streams.add_argument("--reference", nargs="*", default=[], help="files of documentation, likewise")
    streams.set_defaults(run=make_streams)
    for name, run, text in (("rows", make_rows, "write training rows"), ("show", show, "print rows")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--streams", required=True, help="folder written by `streams`")
        command.add_argument("--split", choices=SPLITS, default="train")
        command.add_argument("--qa", help="train.jsonl.gz with passages and questions")
        command.add_argument("--babi", help="folder with en-10k and en")
        command.add_argument("--chats", help='JSON lines with "prompt" and "answer", or "messages"')
        command.add_argument("--recipe", help="JSON file (default: mixture.RECIPE)")
        command.add_argument("--length", type=int, default=1024, help="tokens of a row (default 1024)")
        command.add_argument("--seed", type=int, default=0)
        command.set_defaults(run=run)
        if name == "rows":
            command.add_argument("--tokens", type=int, required=True, help="tokens in all")
            command.add_argument("--workers", type=int, default=1)
        else:
            command.add_argument("--count", type=int, default=3, help="rows to print (default 3)")
    for command in commands.choices.values():
        command.add_argument("--tokenizer", required=True, help="folder or Hub id")
        command.add_argument("--gguf", help="name of the GGUF file in that folder, if it is one")
        if command is not commands.choices["show"]:
            command.add_argument("--output", required=True, help="folder to write to")
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
