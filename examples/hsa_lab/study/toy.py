"""A corpus for toys of the study: made-up chronicles."""

from pathlib import Path

from ..corpus import prepare
from ..tasks.chronicles import make_document
from .cells import SCALES


def make_toy_corpus(folder: Path) -> Path:
    """The folder of a corpus as `prepare.py corpus` writes it, made in `folder` if it is not there."""
    corpus = folder / "toy-corpus"
    if not (corpus / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for seed, split in enumerate(("train", "validation")):
            file = folder / f"toy-{split}.txt"
            file.write_text(make_document(seed, 60_000, 4).text, encoding="utf-8")
            files[split] = str(file)
        prepare([files["train"]], corpus, [files["validation"]], SCALES["toy"].base["vocab_size"])
    return corpus
