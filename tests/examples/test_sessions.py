"""`--session` of examples/ask.py: what was read is kept, and the next start goes on from there."""

import pytest
import torch

from hsa_lab.reading import make_reader
from hsa_lab.sessions import has_session, read_or_load
from tests.commands import run_example
from tests.models import tiny_model
from tests.rows import random_ids


def test_a_document_is_read_once(model, tmp_path, monkeypatch):
    folder, document = tmp_path / "session", random_ids(1, 150)
    assert not has_session(folder) and not has_session(None)
    reader = make_reader(model, 64)
    with torch.no_grad():
        cache, tokens = read_or_load(reader, document, folder)
        assert has_session(folder) and torch.equal(tokens, document)
        expected = reader.generate(torch.cat([document, document[:, :9]], dim=1), 5, cache=cache)[0]
        monkeypatch.setattr(reader, "read", None)
        for given in (document, None):
            cache, tokens = read_or_load(reader, given, folder)
            assert torch.equal(tokens, document) and tokens.dtype == torch.int64
            assert reader.generate(torch.cat([tokens, document[:, :9]], dim=1), 5, cache=cache)[0] == expected


def test_other_sessions_are_refused(model, tmp_path):
    folder, document = tmp_path / "session", random_ids(1, 50)
    reader = make_reader(model)
    with pytest.raises(ValueError, match="`--session`: there is none in .* needs a `--document`"):
        read_or_load(reader, None, folder)
    cache, _ = read_or_load(reader, document, folder)
    with pytest.raises(ValueError, match="`--session`: the one in .* is of another document, of 50 tokens"):
        read_or_load(reader, random_ids(1, 50), folder)
    with pytest.raises(ValueError, match="other weights"):
        read_or_load(make_reader(tiny_model(seed=1)), document, folder)
    cache.save_pretrained(folder)
    with pytest.raises(ValueError, match="without its tokens"):
        read_or_load(reader, document, folder)


@pytest.mark.slow
def test_ask_answers_from_a_session(tmp_path):
    document, words = tmp_path / "notes.txt", ["--question", "What is the locker number of Ada the baker?"]
    filler = "Rain fell on the market square and nobody went out. "
    document.write_text(filler * 50 + "The locker number of Ada the baker is 48213. " + filler * 150)
    first = run_example("ask.py", tmp_path, *words, document=document, session=tmp_path / "kept")
    assert "-> 48213\n" in first.stdout and "Reading the prompt" in first.stderr and "Read in " in first.stdout
    answer = first.stdout[first.stdout.index("\nWhat is") :]
    for flags in ({}, {"document": document}):
        again = run_example("ask.py", tmp_path, *words, session=tmp_path / "kept", **flags)
        assert again.stdout.endswith(answer) and "Read before, loaded in " in again.stdout
        assert "Reading the prompt" not in again.stderr
    document.write_text(filler * 20)
    with pytest.raises(AssertionError, match="ask.py: `--session`: the one in .* is of another document.*\n$"):
        run_example("ask.py", tmp_path, *words, document=document, session=tmp_path / "kept")
