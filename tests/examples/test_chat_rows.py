"""Chat rows: disjoint splits, right answers, and rows whose tokens, roles and evidence are what they say."""

import collections
import gzip
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hsa_lab.chat_rows import (
    clauses,
    documents,
    evaluation,
    events,
    facts,
    families,
    mixture,
    prepare,
    programs,
    qa,
    quotes,
    stories,
    tables,
    values,
)
from hsa_lab.chat_rows.haystack import Haystack, read_books, read_files, save_stream
from hsa_lab.chat_rows.rows import (
    ANSWER,
    HIDDEN,
    IGNORED,
    TEXT,
    VALUE,
    Plan,
    RowBuilder,
    Turn,
    evidence_chunks,
    save_rows,
)
from hsa_lab.chat_rows.ruler_forms import KINDS, ruler_plan
from hsa_lab.chat_rows.splits import SPLITS, author_split, number_split, passage_split, split_of
from hsa_lab.tasks.chronicles import make_document


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with single digits and the chat template of SmolLM2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([make_document(0, 30_000, 20, True).text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def haystack(tokenizer) -> Haystack:
    text = make_document(1, 60_000).text
    return Haystack(np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.uint16), tokenizer)


@pytest.fixture(scope="module")
def builder(tokenizer, haystack) -> RowBuilder:
    code = "def first():\n    return 1\n\n\ndef second():\n    return 2\n\n\n" * 200
    ids = np.array(tokenizer(code, add_special_tokens=False)["input_ids"], np.uint16)
    return RowBuilder(tokenizer, {"books": haystack, "code": Haystack(ids, tokenizer, code=True)})


def worlds(split: str, count: int = 30):
    for seed in range(count):
        world = facts.World(split, random.Random(seed))
        while len(world.facts) < 15:
            world.add()
        world.add(3, 1, shared=True)
        yield world


# -- tables and splits --


def test_there_are_hundreds_of_kinds_with_many_wordings():
    counts = facts.wording_counts()
    assert len(counts) >= 800 and len(tables.attributes()) >= 300 and len(tables.entity_types()) >= 110
    own = [(len(a.statements), len(a.questions)) for a in tables.attributes()]
    assert (
        min(min(pair) for pair in own) >= 1 and np.mean([s for s, _ in own]) > 2 and np.mean([q for _, q in own]) > 1.7
    )
    assert min(min(pair) for pair in counts.values()) >= 20


def test_every_wording_can_be_filled():
    allowed = {"e", "v", "a v", "t", "l", "m", "w", "p", "s", "c", "who"}
    wordings = [w for a in tables.attributes() for w in (*a.statements, *a.questions, *a.reverse)]
    for group in ("statement", "question", "reverse", "both", "hop", "group", "check", "pair", "wrapped", "refusal"):
        wordings += tables.wordings(group)
    for wording in wordings:
        assert {part.split("}")[0] for part in wording.split("{")[1:]} <= allowed, wording
    for attribute in tables.attributes():
        for wording in attribute.statements:
            assert "{e}" in wording and ("{v}" in wording or "{a v}" in wording), wording
        for wording in attribute.questions:
            assert "{e}" in wording and "{v}" not in wording, wording
        for wording in attribute.reverse:
            assert "{v}" in wording or "{a v}" in wording, wording


def test_kinds_and_wordings_are_of_one_split_and_all_splits_have_some():
    kinds = collections.Counter(kind.split for kind in tables.kinds())
    assert all(kinds[split] >= 40 for split in SPLITS) and kinds["train"] > 300
    trained = [kind for kind in tables.kinds() if kind.split == "train"]
    others = [kind for kind in tables.kinds() if kind.split != "train"]
    assert not {k.name for k in trained} & {k.name for k in others}
    # A kind that is not trained on has a type or an attribute that no trained kind has.
    for kind in others:
        assert kind.type not in {k.type for k in trained} or kind.attribute not in {k.attribute for k in trained}
    for group in (
        "statement",
        "question",
        "reverse",
        "reverse human",
        "both",
        "hop",
        "group",
        "check",
        "pair",
        "wrapped",
    ):
        found = [set(tables.wordings(group, split)) for split in SPLITS]
        assert all(found) and set.union(*found) == set(tables.wordings(group))
        assert sum(map(len, found)) == len(set(tables.wordings(group)))
    for attribute in tables.attributes():
        for group in ("statements", "questions", "reverse"):
            found = [set(facts._own(attribute, group, split)) for split in SPLITS]
            assert sum(map(len, found)) == len(getattr(attribute, group))


def test_words_and_numbers_of_the_splits_are_disjoint():
    open_pools = [pool for pool, words in tables.words().items() if words["train"] != words["test"]]
    assert len(open_pools) > 15
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        first, second = ({w.lower() for pool in open_pools for w in tables.words()[pool][s]} for s in (one, other))
        assert first and second and not first & second
    sources = {split: values.Source(split, random.Random(0)) for split in SPLITS}
    numbers = {a.value for a in tables.attributes() if a.value.split()[0] not in ("pool", "name", "company", "place")}
    for value in numbers | {"int 10 99", "year 1800 2000", "name"}:
        drawn = [{source.value(value) for _ in range(40)} for source in sources.values()]
        assert all(drawn) and sum(map(len, drawn)) == len(set.union(*drawn)), value


def test_numbers_passages_and_authors_do_not_depend_on_how_they_are_written():
    assert number_split("1,250") == number_split("1250")
    assert passage_split("The old  Mill.\nIt stood") == passage_split("the old mill it stood")
    assert author_split("G.K. Chesterton") == author_split("G. K. Chesterton")
    assert author_split("Charlotte Brontë") == author_split("Emily Bronte")
    assert len({split_of(f"x {i}") for i in range(100)}) == 3


# -- facts --


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_statements(split):
    asked = collections.Counter()
    for world in worlds(split):
        for fact in world.facts:
            sentence = world.state([fact])
            assert fact.value.lower() in sentence.lower() and fact.entity.name.lower() in sentence.lower()
            assert "{" not in sentence and "}" not in sentence and facts.OPEN not in sentence
        for short in (False, True):
            for question in world.questions(12, short):
                asked[question.kind] += 1
                answer = "".join(text for text, _ in question.answer)
                assert "{" not in question.text + answer and facts.OPEN not in question.text + answer
                for expected in question.expected if question.kind != "check" or not short else []:
                    assert expected.lower() in answer.lower()
                if question.kind == "missing":
                    assert not question.facts and evaluation.is_refusal(answer)
                else:
                    assert question.facts and not evaluation.is_refusal("".join(t for t, v in question.answer if v))
                if question.kind not in ("check", "missing"):
                    assert not any(e.lower() in question.text.lower() for e in question.expected)
    assert set(asked) == set(facts.QUESTIONS)


def test_reverse_questions_have_one_answer_and_groups_are_complete():
    for world in worlds("train"):
        for _ in range(10):
            if (question := world.ask("reverse", False)) is not None:
                (fact,) = question.facts
                same = [f for f in world.facts if f.attribute is fact.attribute and f.value == fact.value]
                assert same == [fact]
            if (question := world.ask("group", False)) is not None:
                fact = question.facts[0]
                same = {f.entity.name for f in world.facts if (f.attribute, f.value) == (fact.attribute, fact.value)}
                assert same == set(question.expected) and len(same) > 1


def test_no_two_things_are_mentioned_alike_and_missing_things_are_not_told():
    for world in worlds("validation"):
        mentions = [mention for entity in world.entities for mention in entity.mentions()]
        assert len(mentions) == len(set(mentions))
        told = {(fact.entity.name, fact.attribute.label) for fact in world.facts}
        for entity in world.entities:
            labels = [label for name, label in told if name == entity.name]
            conflicts = {c for fact in entity.told.values() for c in fact.attribute.conflicts}
            assert not conflicts & set(labels)
            attribute = world._untold(entity)
            assert attribute is None or (
                (entity.name, attribute.label) not in told and attribute.label not in conflicts
            )


def test_the_same_seed_gives_the_same_facts():
    first, second = (families.facts_plan(random.Random(3), 6) for _ in range(2))
    assert [t.question for t in first.turns] == [t.question for t in second.turns]
    assert [b[0][0] for b in first.blocks] == [b[0][0] for b in second.blocks]


@pytest.mark.parametrize("kind", documents.DOCUMENTS)
def test_documents_tell_all_their_facts(kind):
    for seed in range(8):
        world = facts.World("train", random.Random(seed))
        pieces = documents.make_document(kind, world, 500)
        text = "".join(text for text, _ in pieces)
        assert 300 < len(text) < 2000 and text.startswith("\n\n") and "{who}" not in text and "{n}" not in text
        told = [fact for _, facts_of in pieces for fact in facts_of]
        assert told and set(map(id, told)) == set(map(id, world.facts))
        for piece, facts_of in pieces:
            for fact in facts_of:
                assert fact.value.lower() in piece.lower()
    with pytest.raises(ValueError, match="no kind of document 'poem'"):
        documents.make_document("poem", world, 100)


# -- events --


def told_events(split: str, count: int = 40):
    for seed in range(count):
        teller = events.Events(facts.World(split, random.Random(seed)))
        for _ in range(12):
            teller.add()
        yield teller


def test_actions_and_wordings_of_events_are_of_one_split():
    table = clauses.table()
    assert len(table.actions) >= 200 and len({action.domain for action in table.actions}) >= 12
    verbs = {split: {action.base for action in clauses.actions(split)} for split in SPLITS}
    assert not verbs["train"] & (verbs["validation"] | verbs["test"]) and not verbs["validation"] & verbs["test"]
    assert len(verbs["train"]) >= 120 and min(map(len, verbs.values())) >= 8
    for group, forms in table.wordings.items():
        found = [set(clauses.wordings(group, split)) for split in SPLITS]
        assert (group in ("refuse", "answer") or all(found)) and set.union(*found) == set(forms)
        assert sum(map(len, found)) == len(set(forms))
    for name, pool in table.pools.items():
        found = [set(pool.of(split)) for split in SPLITS]
        assert all(found) and sum(map(len, found)) == len(pool.members), name
    assert not table.alike.keys() - {action.base for action in table.actions}
    forms = {action.base: action.forms for action in table.actions}
    assert forms["take over"] == ("take over", "takes over", "took over", "taken over", "taking over")
    assert forms["copy"] == ("copy", "copies", "copied", "copied", "copying")
    assert forms["stop"] == ("stop", "stops", "stopped", "stopped", "stopping")


def test_clauses_of_an_event():
    table = clauses.table()
    send = next(action for action in table.actions if action.base == "send")
    when = clauses.Role("by ", "deadline", "", (("By when", ""),))
    parts = {
        "agent": clauses.Part(send.agent, "Ana"),
        "object": clauses.Part(send.object, "the slides", True),
        "role 0": clauses.Part(send.roles[0], "Tom"),
        "deadline": clauses.Part(when, "Friday"),
    }
    event = clauses.Event(send, "f", parts)
    assert event.clause() == "Ana will send the slides to Tom by Friday"
    assert event.passive(["agent", "object"]) == "the slides will be sent by Ana"
    assert event.yes_no(["object"]) == "will Ana send the slides"
    names = ["agent", "object"]
    assert event.asked("deadline", names, when, False)[0][:2] == ("By when", "will Ana send the slides")
    assert event.asked("role 0", names, send.roles[0], False) == [
        ("To whom", "will Ana send the slides", "Ana will send the slides"),
        ("Who", "will Ana send the slides to", "Ana will send the slides to"),
    ]
    assert event.asked("agent", names, send.agent, True)[0][:2] == ("By whom", "will the slides be sent")
    event.mode = "p"
    assert event.passive() == "the slides were sent by Ana to Tom by Friday"
    assert event.asked("object", names, send.object, False)[0] == ("What", "did Ana send", "Ana sent")


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_events(split):
    asked = collections.Counter()
    for number, teller in enumerate(told_events(split)):
        for event in teller.told:
            sentence = teller.state(event)
            assert all(part.text.lower() in sentence.lower() for part in event.parts.values()), sentence
            assert not {"{", "}", facts.OPEN, "*"} & set(sentence.removeprefix("* ")) and "  " not in sentence
        for question in teller.questions(12, number % 2 == 0):
            asked[question.kind] += 1
            answer = "".join(text for text, _ in question.answer)
            assert not {"{", facts.OPEN, "*"} & set(question.text + answer) and "  " not in question.text + answer
            if question.kind == "missing":
                assert not question.facts and evaluation.is_refusal(answer)
                continue
            (event,) = question.facts
            assert question.expected and all(e.lower() in answer.lower() for e in question.expected[: 1 + number % 2])
            assert not evaluation.is_refusal("".join(text for text, wanted in question.answer if wanted))
            if question.kind == "direct":
                assert not any(e.lower() in question.text.lower() for e in question.expected)
                # It says which of the events of one action is meant.
                assert any(part.text.lower() in question.text.lower() for part in event.parts.values())
                for other in teller.told:
                    if other is not event and other.action.base == event.action.base:
                        texts = {part.text.lower() for part in other.parts.values()}
                        assert not texts & {part.text.lower() for part in event.parts.values()}
    assert set(asked) == set(events.QUESTIONS)


@pytest.mark.parametrize("kind", events.STYLES)
def test_documents_tell_events_beside_facts(kind):
    told = collections.Counter()
    for seed in range(8):
        world = facts.World("train", random.Random(seed))
        teller = events.Events(world)
        pieces = documents.make_document(kind, world, 500, teller, 0.6)
        found = [(text, fact) for text, facts_of in pieces for fact in facts_of]
        heads = [(text, fact) for text, fact in found if isinstance(fact, events.Heading)]
        assert [fact for _, fact in heads] == teller.headings and bool(heads) == (kind not in ("notes", "log"))
        for text, head in heads:
            if head.group not in ("minutes was", "minutes number"):
                assert all(value.lower() in text.lower() for value in head.values)
            question = teller.ask("heading", seed % 2 == 0)
            assert question is None or question.expected == question.facts[0].values
        found = [(text, fact) for text, fact in found if not isinstance(fact, events.Heading)]
        assert {id(fact) for _, fact in found} == {id(fact) for fact in (*world.facts, *teller.told)}
        for text, fact in found:
            told[type(fact)] += 1
            for part in fact.parts.values() if isinstance(fact, clauses.Event) else [fact]:
                value = part.text if isinstance(part, clauses.Part) else part.value
                assert value.removeprefix("the ").lower() in text.lower()
    assert told[clauses.Event] > 5 and told[facts.Fact] > 5


# -- rows --


def check_row(builder, row, length):
    decode = builder.tokenizer.decode
    assert row.ids.dtype == np.uint16 and row.ids.shape == row.roles.shape == (length,)
    for _, _, start, end in row.turns:
        assert row.ids[end - 1] == builder.chat.end[0] and np.isin(row.roles[start:end], (ANSWER, VALUE)).all()
        assert np.array_equal(row.ids[start - len(builder.chat.reply) : start], builder.chat.reply)
    spans = np.zeros(length, bool)
    for _, _, start, end in row.turns:
        spans[start:end] = True
    assert np.array_equal(spans, np.isin(row.roles, (ANSWER, VALUE)))
    for turn, start, end in row.evidence:
        assert (row.roles[start:end] == HIDDEN).all() and end <= row.turns[turn][2]
    # What was tokenised in pieces is what the tokenizer makes of the whole, nearly everywhere.
    text = decode(row.ids)
    whole = builder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert abs(len(whole) - length) <= 0.02 * length + 3
    return text


def test_a_row_is_the_chat_template_with_exactly_as_many_tokens(builder):
    turns = [
        Turn("Who has the key?", [("It is ", False), ("Ada Lamb", True), (".", False)], ["key"], "direct"),
        Turn("And the door?", [("The text does not say.", False)], [], "missing"),
    ]
    plan = Plan("facts", [[(" Ada Lamb has the key.", ["key"])]], turns, intro="Read this.", hint="Be brief.")
    for length in (200, 333, 1000):
        (row,) = builder.build([plan], length, random.Random(0))
        text = check_row(builder, row, length)
        document = text.split("user\n", 1)[1].split("\n\nBe brief.", 1)[0]
        messages = [
            {"role": "user", "content": f"{document}\n\nBe brief. Who has the key?"},
            {"role": "assistant", "content": "It is Ada Lamb."},
            {"role": "user", "content": "And the door?"},
            {"role": "assistant", "content": "The text does not say."},
        ]
        assert builder.tokenizer.apply_chat_template(messages, tokenize=False) == text
        assert document.startswith("Read this.\n\n") and document.count(" Ada Lamb has the key.") == 1
        ((turn, start, end),) = row.evidence
        assert turn == 0 and builder.tokenizer.decode(row.ids[start:end]) == " Ada Lamb has the key."
        assert builder.tokenizer.decode(row.ids[row.roles == VALUE]).strip() == "Ada Lamb"
        assert row.roles[0] == IGNORED and (row.roles == TEXT).sum() > 60


def test_what_does_not_fit_is_left_out(builder):
    turns = [Turn(f"Question {i}?", [("yes", True)], [], "direct") for i in range(50)]
    (row,) = builder.build([Plan("facts", [], turns)], 200, random.Random(0))
    assert 2 < len(row.turns) < 20 and len(row.ids) == 200
    assert builder.build([Plan("facts", [[(" word" * 300, [])]], turns)], 200, random.Random(0)) == []


def test_hidden_things_are_everywhere_and_keep_their_order(builder):
    places = []
    for seed in range(200):
        blocks = [[(f" Fact number {i}.", [i])] for i in range(3)]
        plan = Plan("stories", blocks, [Turn("?", [("yes", True)], [0, 1, 2])], groups=[0, 0, 0])
        (row,) = builder.build([plan], 400, random.Random(seed))
        starts = [start for _, start, _ in row.evidence]
        assert starts == sorted(starts)
        places += starts
    histogram, _ = np.histogram(places, bins=4, range=(20, 380))
    assert (histogram > 0.1 * len(places)).all()


@pytest.mark.parametrize(
    "family", ["facts", "facts in code", "code", "documents", "events", "programs", "quotes", "ruler"]
)
@pytest.mark.parametrize("length", [512, 1500])
def test_rows_of_all_families(builder, family, length):
    materials = mixture.Materials(builder, "train")
    recipe = {"families": {family: 1.0}, "questions": {"512": 4, "1024": 8}}
    found = mixture.rows(materials, recipe, length, seed=1)
    rows = [next(found) for _ in range(40)]
    for row in rows:
        check_row(builder, row, length)
        evidence = {turn for turn, _, _ in row.evidence}
        for number, (_, kind, start, end) in enumerate(row.turns):
            assert (number in evidence) == (kind not in ("missing", "common", "coded"))
            assert kind == "missing" or (row.roles[start:end] == VALUE).any()
    again = mixture.rows(materials, recipe, length, seed=1)
    assert all(np.array_equal(row.ids, next(again).ids) for row in rows)
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(rows, mixture.rows(materials, recipe, length, seed=2)))


def test_compound_attributes_are_of_one_split_and_hold_no_label_of_another():
    found = {split: {attribute.label for attribute in tables.compounds(split)} for split in SPLITS}
    assert len(found["train"]) > 10_000 and all(found.values())
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    labels = {a.label.lower() for a in tables.attributes() if a.split != "train"}
    words = {f" {label} " for label in labels}
    assert not any(word in f" {label.lower()} " for word in words for label in found["train"])
    world = facts.World("train", random.Random(0), compounds=1.0)
    told = [fact.attribute.label for _ in range(20) for fact in world.add()]
    assert set(told) <= found["train"]
    assert all(question.expected or question.kind == "missing" for question in world.questions(20, False))


def test_only_words_of_training_are_made_up_and_they_are_no_words_of_pools():
    known = {
        word for pool in tables.words().values() for of in pool.values() for w in of for word in w.lower().split()
    }
    for split in SPLITS:
        source = values.Source(split, random.Random(0))
        names = {source.word("first").lower() for _ in range(300)}
        assert bool(names - known) == (split == "train"), split
        phrases = {source.word("food") for _ in range(300)}
        assert bool(phrases - set(tables.words()["food"][split])) == (split == "train"), split
    source = values.Source("train", random.Random(1))
    for phrase in ("a burst pipe", "an old boiler", "the north wall", "chess"):
        for _ in range(50):
            varied = source.varied(phrase)
            assert varied != phrase and varied[0].isalpha() and "  " not in varied
            if phrase.startswith(("a ", "an ")):
                article, first = varied.split()[:2]
                assert article == ("an" if first[0] in "aeiou" else "a")


def test_quotations_are_in_the_text_with_their_answers(tokenizer, haystack):
    kinds = collections.Counter()
    for seed in range(30):
        plan = quotes.quote_plan(random.Random(seed), haystack, tokenizer, 8, 2048)
        for turn in plan.turns:
            kinds[turn.kind] += 1
            told = " ".join(
                text.strip() for block in plan.blocks for text, keys in block if set(keys) & set(turn.evidence)
            )
            (answer, asked), plain = turn.answer[0], told.replace('"', "'")
            assert asked and answer.replace('"', "'") in plain
            quotation = turn.question.split('"')[1].removesuffix(" ...")
            whole = quotation.replace("____", answer) if turn.kind == "blank" else quotation
            assert whole in plain, (whole, plain)
    assert {"next", "before", "blank", "after"} <= kinds.keys()


def test_speakers_are_found():
    sentences = ['"It is far too late to go there now," said Mr. Carlow, and rose.', "He left."]
    turn = quotes._speaker(random.Random(0), sentences, 3)
    assert turn.answer == [("Mr. Carlow", True)] and turn.evidence == [(3, 0)]
    assert quotes._speaker(random.Random(0), ['"It is far too late to go there now," said He.'], 0) is None


def test_questions_about_programs_have_one_answer_that_is_told():
    for seed in range(60):
        plan = programs.program_plan(random.Random(seed), 12, 3000)
        text = "".join(piece for block in plan.blocks for piece, _ in block)
        assert plan.turns
        for turn in plan.turns:
            assert bool(turn.evidence) == (turn.kind != "missing")
            value = "".join(part for part, asked in turn.answer if asked)
            if turn.kind == "program" and not value.startswith(("It ", "when ")):
                assert value in text, (turn, text)
        for block in plan.blocks:
            compile("".join(piece for piece, _ in block), "made-up", "exec")


def test_evidence_holds_the_answer(builder):
    for seed in range(30):
        plan = families.facts_plan(random.Random(seed), 6)
        for row in builder.build([plan], 1200, random.Random(seed)):
            for turn, start, end in row.evidence:
                question = plan.turns[turn]
                if question.kind == "direct":
                    told = builder.tokenizer.decode(row.ids[start:end]).lower()
                    assert question.evidence[0].value.lower() in told


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_ruler_forms(kind):
    for seed in range(20):
        plan = ruler_plan(random.Random(seed), 6, 1000, kind=kind)
        text = "".join(text for block in plan.blocks for text, _ in block)
        assert plan.turns and "special magic" not in text and "VAR" not in text
        for turn in plan.turns:
            assert "special magic" not in turn.question
            wanted = [part for part, asked in turn.answer if asked]
            assert len(set(wanted)) == len(wanted) and all(part in text for part in wanted)
            if kind in ("common", "coded"):
                counts = collections.Counter(text.replace(")", " ").replace(",", " ").split())
                rest = {word: n for word, n in counts.items() if word not in wanted and not word.isdigit()}
                assert min(counts[part] for part in wanted) > max(rest.values())
            elif kind == "chain":
                assert len(turn.evidence) == len(wanted)


# -- files --


def write_babi(folder):
    (folder / "en-10k").mkdir(parents=True)
    lines = []
    for story in range(20):
        lines += [f"1 Mary moved to the {stories.ROOMS[story % 6]}.", "2 John went to the office."]
        lines += [
            "3 Where is Mary? \t" + stories.ROOMS[story % 6] + "\t1",
            f"4 Sandra left for the {'park' * (story + 1)}.",
        ]
        lines += ["5 Where is John? \toffice\t2"]
    for task in stories.TASKS:
        (folder / "en-10k" / f"{task}_x_train.txt").write_text("\n".join(lines))


def test_stories_keep_the_last_tenth_and_can_be_told_together(tmp_path):
    write_babi(tmp_path)
    found = {split: stories.read_stories(tmp_path, "qa1", split) for split in SPLITS}
    keys = {split: {(s.facts, s.question) for s in found[split]} for split in SPLITS}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    longest = max(len(s.facts[-1]) for s in found["test"])
    assert longest == len(f"Sandra left for the {'park' * 20}.")
    for seed in range(20):
        plan = stories.story_plan(random.Random(seed), {"qa1": found["train"]}, 5)
        text = "".join(text for block in plan.blocks for text, _ in block)
        assert len(plan.groups) == len(plan.blocks)
        subjects = [turn.question.removeprefix("Where is ").rstrip("? ") for turn in plan.turns]
        assert len(set(subjects)) == len(subjects) and all(subject in text for subject in subjects)
        for turn in plan.turns:
            sources = [text for block in plan.blocks for text, keys in block if keys[0] in turn.evidence]
            assert any(turn.answer[0][0] in source for source in sources)


def write_qa(path):
    lines = []
    for i in range(60):
        passage = (
            f"Paper {i} tells of the mill. The miller of town {i} was called Bran{i}. He sold oats to nobody else."
        )
        for q, a in ((f"Who was the miller of town {i}?", f"Bran{i}"), ("What did he sell?", "oats")):
            prompt = f'Question: "{q}"\n\nContext: "{passage}"\n\nAnswer:'
            lines.append({"source": "adversarial_qa", "template": "x", "prompt": prompt, "completion": a})
    plot = "Question: Who dies?\nMovie plot title: Night {}\nMovie plot: " + "A man walks home in the rain. " * 3
    for i in range(30):
        prompt = f'Please answer. If it\'s un-answerable, please output "No answer".\n\n{plot.format(i)}'
        lines.append({"source": "duorc", "template": "y", "prompt": prompt, "completion": "No answer"})
    lines.append({"source": "paws", "template": "z", "prompt": "a b", "completion": "Yes"})
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_passages_are_taken_apart_and_split_by_passage(tmp_path, builder):
    write_qa(tmp_path / "qa.jsonl.gz")
    found = {split: qa.read_passages(tmp_path / "qa.jsonl.gz", split) for split in SPLITS}
    texts = {split: {(p.title, p.text) for p in found[split]} for split in SPLITS}
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == 90 and all(texts.values())
    for passage in found["train"]:
        if passage.title:
            assert passage.questions == [("Who dies?", "")]
        else:
            assert [answer for _, answer in passage.questions][1] == "oats"
            assert qa.support(passage, *passage.questions[0]) == [1] and qa.support(passage, "What?", "oats") == [2]
            assert "".join(passage.sentences) == passage.text
    plan = qa.qa_plan(random.Random(0), found["train"], 6, 1000)
    (row,) = builder.build([plan], 1000, random.Random(0))
    check_row(builder, row, 1000)


def test_books_are_split_by_author_and_files_by_name(tmp_path, tokenizer):
    authors = [f"Ann {a}{b}" for a in tables.words()["placestem"]["train"] for b in ("by", "ton")][:60]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        for i in range(120):
            file.write(json.dumps({"id": f"b{i}", "text": f"Book {i} by {authors[i % 60]}. It ends.\r\n"}) + "\n")
    index = "id\ttitle\tauthor\n" + "".join(f"b{i}\tT\t{authors[i % 60]}\n" for i in range(120))
    (tmp_path / "index.tsv").write_text(index)
    found = {split: list(read_books([tmp_path], split)) for split in SPLITS}
    writers = {split: {text.split(" by ")[1] for text in texts} for split, texts in found.items()}
    assert sum(map(len, found.values())) == 120 and sum(map(len, writers.values())) == 60 and all(writers.values())
    size = save_stream(tmp_path / "out" / "books.npy", found["train"], tokenizer)
    stream = np.load(tmp_path / "out" / "books.npy")
    assert stream.dtype == np.uint16 and len(stream) == size
    assert tokenizer.decode(stream) == "".join(text.strip() + "\n\n" for text in found["train"])
    for i in range(40):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n" * 300)
    files = [list(read_files([str(tmp_path / "*.py")], split)) for split in SPLITS]
    assert sum(map(len, files)) == 40 and len(files[0]) > 20
    (tmp_path / "index.tsv").write_text("id\tauthor\nb0\tX\n")
    with pytest.raises(ValueError, match="no author for b1"):
        list(read_books([tmp_path], "train"))


def test_excerpts_begin_where_a_sentence_ends_and_repeat_a_short_text(tokenizer, haystack):
    for count in (50, len(haystack.stream) + 77):
        tokens, cuts = haystack.excerpt(count, random.Random(1))
        assert len(tokens) == count and cuts[0] == 0 and (np.diff(cuts) > 0).all() and cuts[-1] < count
        for cut in cuts[1:20]:
            assert tokenizer.decode(tokens[cut - 1 : cut]).rstrip('"').endswith((".", "!", "?"))


def test_shards_and_commands(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "books").mkdir()
    with gzip.open(tmp_path / "books" / "a.jsonl.gz", "wt") as file:
        for i in range(80):
            file.write(json.dumps({"id": f"b{i}", "text": make_document(i, 3000).text}) + "\n")
    writers = [a + b for a in tables.words()["placestem"]["train"] for b in ("by", "ton")]
    index = "id\tauthor\n" + "".join(f"b{i}\t{writers[i]}\n" for i in range(80))
    (tmp_path / "books" / "index.tsv").write_text(index)
    write_babi(tmp_path / "babi")
    write_qa(tmp_path / "qa.jsonl.gz")
    common = ["--tokenizer", str(tmp_path / "tokenizer")]
    streams = str(tmp_path / "streams")
    prepare.main(["streams", *common, "--books", str(tmp_path / "books"), "--output", streams])
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "Hi", "answer": "Hello."}\n')
    recipe = {"families": {"facts": 0.3, "qa": 0.2, "stories": 0.2, "text": 0.2, "chat": 0.1}, "questions": {"256": 3}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    options = ["--streams", streams, "--qa", str(tmp_path / "qa.jsonl.gz"), "--babi", str(tmp_path / "babi")]
    options += ["--chats", str(chats), "--recipe", str(tmp_path / "recipe.json"), "--length", "600"]
    prepare.main(["rows", *common, *options, "--tokens", "60000", "--output", str(tmp_path / "rows")])
    ids, roles, turns, evidence = (
        np.load(tmp_path / "rows" / f"train-600-00000.{name}.npy") for name in ("ids", "roles", "turns", "evidence")
    )
    assert (
        ids.shape == roles.shape == (100, 600) and ids.dtype == np.uint16 and turns.shape[1] == evidence.shape[1] == 3
    )
    kinds = (tmp_path / "rows" / "train-600-00000.kinds.txt").read_text().splitlines()
    assert len(kinds) == len(turns) and turns[:, 0].max() < 100 and evidence[:, 0].max() < len(turns)
    for turn, start, end in evidence[:200]:
        assert (roles[turns[turn][0]][start:end] == HIDDEN).all()
    counts = json.loads((tmp_path / "rows" / "mixture-train-600.json").read_text())
    assert counts["rows"].keys() == recipe["families"].keys() and sum(counts["rows"].values()) == 100
    prepare.main(["show", *common, *options, "--count", "6"])
    assert "<|im_start|>" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prepare.main(["show", *common, "--streams", streams, "--recipe", str(tmp_path / "recipe.json")])
    assert "no material for chat, qa, stories" in capsys.readouterr().err


def test_evidence_chunks_and_empty_shards(tmp_path, builder):
    evidence = np.array([[0, 10, 20], [0, 15, 16], [2, 15, 33]])
    assert evidence_chunks(evidence, 16).tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
    save_rows([builder.text_row("books", 64, random.Random(0))], tmp_path / "x")
    assert np.load(tmp_path / "x.turns.npy").shape == np.load(tmp_path / "x.evidence.npy").shape == (0, 3)


# -- evaluation --


@pytest.mark.parametrize("kind", evaluation.KINDS)
def test_questions_have_the_length_asked_for_and_right_answers_score(kind, tmp_path, tokenizer, haystack):
    write_qa(tmp_path / "qa.jsonl.gz")
    passages = qa.read_passages(tmp_path / "qa.jsonl.gz", "test")
    samples = list(evaluation.make_questions(kind, tokenizer, haystack, 1500, 12, passages=passages))
    assert len(samples) == 12
    for sample in samples:
        prompt = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(sample.tokens) == prompt
        assert 1300 < len(sample.tokens) <= 1500 and sample.question in prompt
        if kind == "missing":
            assert sample.score("The text does not say what it is.") == 1 and sample.score("It is 17.") == 0
            assert not sample.evidence
        else:
            assert sample.score("It is " + " and ".join(sample.expected) + ".") > 0.3 and sample.evidence
            assert sample.score("I do not know.") == 0
    again = evaluation.make_questions(kind, tokenizer, haystack, 1500, 12, passages=passages)
    assert [s.question for s in again] == [s.question for s in samples]
    for sample in evaluation.make_questions(kind, tokenizer, haystack, None, 3, passages=passages):
        assert (
            len(sample.tokens) < (3000 if kind == "documents" else 1300)
            and sample.question in sample.messages[0]["content"]
        )
    other = evaluation.make_questions(kind, tokenizer, haystack, 1500, 12, passages=passages, seed=1)
    assert [s.question for s in other] != [s.question for s in samples] or kind == "qa"


def test_scores():
    assert evaluation.contains("It costs $1,250.", "$1250") and evaluation.contains("It is 24.", "24 metres")
    assert not evaluation.contains("It is 1250.", "125") and not evaluation.contains("At 12:30.", "12:3")
    assert not evaluation.contains("It is 2.45.", "2") and evaluation.contains("THE Old Mill", "old mill")
    assert evaluation.f1("the old mill", "Old mill.") == 1 and evaluation.f1("old", "old mill") == pytest.approx(2 / 3)
    assert evaluation.f1("", "mill") == 0
    for text in (
        "The text does not say.",
        "I couldn't find it in the text.",
        "No information is given.",
        "Not in the text.",
    ):
        assert evaluation.is_refusal(text), text
    for text in ("The port of heron-7 is 8080.", "Nora Nowak runs it.", "Yes, it is."):
        assert not evaluation.is_refusal(text), text


def test_errors_name_what_is_wrong(builder, tokenizer, haystack, tmp_path):
    with pytest.raises(ValueError, match="`split` must be one of"):
        values.Source("dev", random.Random(0))
    with pytest.raises(ValueError, match="no kind of questions 'riddles'"):
        next(evaluation.make_questions("riddles", tokenizer, haystack, 500, 1))
    with pytest.raises(ValueError, match="fits into 50 tokens"):
        next(evaluation.make_questions("facts", tokenizer, haystack, 50, 1))
    with pytest.raises(ValueError, match="unknown families: poems"):
        next(mixture.rows(mixture.Materials(builder, "train"), {"families": {"poems": 1}, "questions": {}}, 512, 0))
    with pytest.raises(ValueError, match="no material for qa"):
        next(mixture.rows(mixture.Materials(builder, "train"), {"families": {"qa": 1}, "questions": {}}, 512, 0))
    (tmp_path / "chats.jsonl").write_text('{"prompt": "Hi"}\n')
    with pytest.raises(ValueError, match="line 1: needs `prompt` and `answer`"):
        mixture.read_chats(tmp_path / "chats.jsonl")
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        RowBuilder(plain, {"books": haystack})
