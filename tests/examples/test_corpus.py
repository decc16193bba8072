"""`prepare.py corpus`: the streams of tokens are the text, whatever its kind of file and its line ends."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hsa_lab import corpus
from hsa_lab.tasks.chronicles import make_documents
from tests.commands import run_example


TEXTS = [document.text for document in make_documents(3, 2500, 6, 2, questions=True)]
TEXTS[1] = "Größe: 48213 → 7.\r\n\r\n\tIndented 😀,  twice.\n \n" * 50
TEXTS[2] = "x" * 3000 + "\n\n\n" + "No line end"


# Has tokens of several whitespace characters, and of whitespace before words.
WORDS = corpus.train_tokenizer([{"text": "a \n\n\n a\r\n\r\n\t\t a's  é. é.\n\n1 \n \n1 \n"}] * 9, 320)


def write_files(folder: Path) -> tuple[list[str], list[str]]:
    """Two .txt, a .jsonl and a .jsonl.gz file to train on, and one to validate on; an empty document among them."""
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)]
    (folder / "a.txt").write_bytes(TEXTS[0].encode())
    (folder / "b.txt").write_bytes(TEXTS[1].encode())
    (folder / "c.jsonl").write_text(lines[2] + '{"text": ""}\n' + lines[3], encoding="utf-8")
    with gzip.open(folder / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines[4])
    (folder / "e.jsonl").write_text(lines[5], encoding="utf-8")
    return [str(folder / name) for name in ("a.txt", "b.txt", "c.jsonl", "d.jsonl.gz")], [str(folder / "e.jsonl")]


@pytest.mark.slow
def test_streams_decode_to_the_text(tmp_path):
    train, validation = write_files(tmp_path)
    output = tmp_path / "corpus"
    run = run_example(
        "prepare.py", tmp_path, "corpus", "--train_files", *train, "--validation_files", *validation, output=output,
        vocab_size=400,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(output)
    index = json.loads((output / "index.json").read_text(encoding="utf-8"))
    assert len(tokenizer) == index["tokenizer"]["tokens"] == 400
    for split, texts in {"train": TEXTS[:5], "validation": TEXTS[5:]}.items():
        tokens = np.load(output / f"{split}.npy", mmap_mode="r")
        assert tokens.dtype == np.uint16
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
        documents = np.split(tokens, ends + 1)[:-1]
        assert [tokenizer.decode(document[:-1].tolist()) for document in documents] == texts
        assert tokens.tolist() == [
            token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        ]
        found = index["splits"][split]
        assert (found["documents"], found["tokens"]) == (len(texts), len(tokens))
        assert found["characters"] == sum(map(len, texts))
        assert found["bytes"] == sum(len(text.encode()) for text in texts)
        assert f"{split}: {len(texts)} documents, {len(tokens):,} tokens" in run.stdout


def test_tokens_are_those_of_the_whole_document_however_it_is_cut():
    tokenizer = corpus.train_tokenizer([{"text": text} for text in TEXTS], 400)
    for text in TEXTS:
        pieces = list(corpus.cut_document(io.StringIO(text), size=40))
        assert "".join(pieces) == text
        assert [token for piece in pieces for token in tokenizer(piece)["input_ids"]] == tokenizer(text)["input_ids"]
    assert len(list(corpus.cut_document(io.StringIO(TEXTS[0]), size=40))) > 5
    assert list(corpus.cut_document(io.StringIO(""))) == []


@settings(max_examples=300)
@given(st.text("a' \t\n\r1é.\u00a0", max_size=30))
def test_pieces_of_any_text(text):
    """Line ends beside all kinds of characters that the pre-tokenizer tells apart."""
    pieces = list(corpus.cut_document(io.StringIO(text, newline="\n"), size=1))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in WORDS(piece)["input_ids"]] == WORDS(text)["input_ids"]


def test_digits_are_single():
    tokenizer = corpus.train_tokenizer([{"text": "1984 1984 1984 in 1984\n" * 100}], 300)
    tokens = tokenizer(" In 1984, 66 years")["input_ids"]
    assert [token for token in map(tokenizer.decode, tokens) if any(map(str.isdigit, token))] == list("198466")


@pytest.mark.slow
def test_preparing_needs_no_datasets(tmp_path):
    """One tokenizer code, which train.py shares; it must not bring `datasets` along."""
    hidden = "import runpy, sys; sys.modules.update(datasets=None); sys.argv.pop(0); "
    hidden += "sys.path[0] = sys.argv[0].rpartition('/')[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    run_example(
        "prepare.py", tmp_path, "corpus", launcher=("-c", hidden), train_files=tmp_path / "a.txt",
        output=tmp_path / "corpus", vocab_size=300,
    )  # fmt: skip
    assert not (tmp_path / "corpus" / "validation.npy").exists()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"vocab_size": 70_000}, ValueError, "--vocab_size.*65536"),
        ({"train_files": ["text.csv"]}, ValueError, r"must end in .txt, .jsonl or .jsonl.gz, got .*text.csv"),
        ({"train_files": ["none.txt"]}, FileNotFoundError, "no file .*none.txt"),
        ({"train_files": ["body.jsonl"]}, ValueError, 'Line 1 of .*body.jsonl has no string "text"'),
        ({"validation_files": ["text.txt"]}, ValueError, "share .*text.txt"),
    ],
)
def test_unusable_arguments_are_refused(tmp_path, monkeypatch, fields, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    (tmp_path / "body.jsonl").write_text('{"body": "text"}\n', encoding="utf-8")
    with pytest.raises(error, match=message):
        corpus.prepare(**{"train_files": ["text.txt"], "output": tmp_path / "corpus", **fields})
