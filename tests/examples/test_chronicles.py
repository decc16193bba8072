"""The made-up chronicles, and `prepare.py chronicle`."""

import json

import pytest

from hsa_lab.tasks.chronicles import Fact, make_document, make_documents
from tests.commands import run_example


@pytest.mark.parametrize("characters", [0, 1, 100, 5000])
@pytest.mark.parametrize("facts", [0, 1, 20])
def test_facts_are_where_the_document_says(characters, facts):
    document = make_document(seed=3, characters=characters, facts=facts)
    assert len(document.text) >= characters
    assert len(document.facts) == facts
    assert [fact.start for fact in document.facts] == sorted(fact.start for fact in document.facts)
    for fact in document.facts:
        assert document.text[fact.start : fact.start + len(fact.sentence)] == fact.sentence
        assert document.text[fact.answer_start : fact.answer_start + len(fact.answer)] == fact.answer
        assert document.text.count(fact.answer) == 1  # nothing else gives it away
        assert fact.question.removeprefix("What is the ").removesuffix("?") in fact.sentence
    assert len({fact.question for fact in document.facts}) == facts


def test_length_is_kept_and_facts_are_spread():
    document = make_document(seed=0, characters=100_000, facts=50)
    assert 100_000 <= len(document.text) < 100_200
    starts = [fact.start for fact in document.facts]
    assert starts[0] < 10_000 and starts[-1] > 90_000


def test_text_depends_on_the_seed_alone():
    assert make_document(5, 2000, 3) == make_document(5, 2000, 3)
    texts = {document.text for document in make_documents(5, 2000, 10, 3)}
    assert len(texts) == 10


def test_questions_follow_the_text():
    plain, asking = (make_document(1, 2000, 5, questions) for questions in (False, True))
    assert asking.facts == plain.facts
    assert asking.text.startswith(plain.text.rstrip("\n"))
    questions = asking.text[len(plain.text) :]
    assert all(f"{fact.question} {fact.answer}.\n" in questions for fact in asking.facts)


@pytest.mark.parametrize(("characters", "facts"), [(-1, 0), (10, -1), (10, 10**6)])
def test_impossible_documents_are_refused(characters, facts):
    with pytest.raises(ValueError, match="`characters` must be at least 0 and `facts` from 0 to"):
        make_document(0, characters, facts)


@pytest.mark.slow
def test_text_generator_as_a_command(tmp_path):
    files = {"output": tmp_path / "new" / "text.txt", "facts_output": tmp_path / "facts.json"}
    run_example("prepare.py", tmp_path, "chronicle", characters=3000, seed=1, facts=2, **files)
    document = make_document(1, 3000, 2)
    assert files["output"].read_text(encoding="utf-8") == document.text
    facts = json.loads(files["facts_output"].read_text(encoding="utf-8"))
    assert tuple(Fact(**fact) for fact in facts) == document.facts
    printed = run_example("prepare.py", tmp_path, "chronicle", characters=3000, seed=1, facts=2).stdout
    assert printed == document.text
