"""The tasks of retrieval, of RULER, and of facts are what they say; so are the haystacks they are hidden in."""

import gzip
import json
import pickle
import re

import numpy as np
import pytest

from hsa_lab.evaluation.retrieval import ONE_NEEDLE
from hsa_lab.tasks import facts, retrieval
from hsa_lab.tasks.chronicles import KINDS_OF_SECRET, NAMES, TRADES
from hsa_lab.tasks.ruler import TASKS as TASKS_OF_RULER
from hsa_lab.tasks.ruler import RulerTasks, string_match_all
from hsa_lab.tokens import encode, excerpt, read_haystack, sample_rng

from .texts import TEXT, TOKENIZER, TOKENIZERS, make_ruler


@pytest.fixture(scope="module", params=TOKENIZERS)
def setting(request):
    """A tokenizer, its tasks and a corpus in its tokens."""
    tokenizer = TOKENIZERS[request.param]
    corpus = np.array(encode(tokenizer, TEXT), dtype=np.uint16)
    return tokenizer, retrieval.RetrievalTasks(tokenizer, pool=500), corpus


# -- retrieval.py --

TASKS = {
    "s_niah": {},
    "s_niah near": {"max_distance": 90},
    "mq_niah": {},
    "vt": {},
    "vt all": {"score": "all", "parts": 3},
    "dense": {"items": 8},
    "dense far": {"items": 5, "min_distance": 300, "max_distance": 400},
    "dense numbers": {"items": 40, "kinds": ("number",)},
    "dense ids": {"items": 40, "kinds": ("ids",), "max_distance": 100},
    "dense facts": {"items": 20, "kinds": ("fact", "word", "uuid")},
}


def make(tasks, name: str, seed: int, corpus, length: int = 1000):
    return tasks.make(name.split()[0], np.random.default_rng(seed), corpus, length, **TASKS[name])


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_the_seed_alone(setting, name):
    """Not on what was made before, nor on the corpora of other samples; and so in another process."""
    _, tasks, corpus = setting
    fresh = pickle.loads(pickle.dumps(tasks))
    expected = make(fresh, name, 3, corpus)
    make(tasks, name, 4, corpus[::-1])
    actual = make(tasks, name, 3, corpus)
    for field in ("tokens", "answer_mask", "needles", "values", "asked", "answers"):
        assert np.array_equal(getattr(actual, field), getattr(expected, field)), field
    assert not np.array_equal(make(tasks, name, 5, corpus).tokens, expected.tokens)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [800, 1037])
def test_needles_and_answers_are_where_the_sample_says(setting, name, length):
    tokenizer, tasks, corpus = setting
    for seed in range(5):
        sample = make(tasks, name, seed, corpus, length)
        assert sample.tokens.shape == sample.answer_mask.shape == (length,)
        assert sample.tokens.dtype == np.uint16 and sample.answer_mask.dtype == bool
        spans = sorted([*map(tuple, sample.needles.tolist()), *map(tuple, sample.answers.tolist())])
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])) and 0 <= spans[0][0] and spans[-1][1] <= length
        for (start, end), (a, b) in zip(sample.needles, sample.values):
            text = tokenizer.decode(sample.tokens[start:end])
            is_fact = name.startswith("dense") and text.endswith(".")
            assert is_fact or (text.startswith(" | ") and text.endswith(" |"))
            assert start < a < b < end
        # What is scored is copied, in this order, from the needles that are asked for; variables with commas between.
        for number, (start, end) in enumerate(sample.answers):
            asked = sample.asked == number
            copied = [sample.tokens[a:b].tolist() for a, b in sample.values[asked]]
            is_chain = tokenizer.decode(sample.tokens[slice(*sample.needles[asked][0])]).startswith(" | VAR")
            comma = encode(tokenizer, ",") if is_chain else []
            expected = [token for value in copied for token in (*comma, *value)][len(comma) :]
            assert sample.tokens[start:end][sample.answer_mask[start:end]].tolist() == expected
        assert sample.answer_mask.sum() == sum(sample.answer_mask[a:b].sum() for a, b in sample.answers)


def test_templates_read_as_documented(setting):
    tokenizer, tasks, corpus = setting
    sample = tasks.mq_niah(np.random.default_rng(1), corpus, 600)
    values = [tokenizer.decode(sample.tokens[a:b]) for a, b in sample.wanted]
    text = tokenizer.decode(sample.tokens)
    assert len(sample.needles) == 6 and len(values) == 2
    assert all(len(value) == 7 and value[0] == " " and value[1:].isdigit() for value in values)
    assert text.endswith(f" mentioned in the text? Answer:{''.join(values)}")

    sample = tasks.vt(np.random.default_rng(1), corpus, 600)
    answer = tokenizer.decode(sample.tokens[slice(*sample.answers[0])])
    a, b, c = answer.strip().split(", ")
    (start, end), *_ = sample.needles[sample.asked >= 0]
    assert tokenizer.decode(sample.tokens[start:end]) == f" | VAR {c} = VAR {b} |"
    assert tokenizer.decode(sample.tokens[sample.answer_mask]) == f" {c}"
    assert f" | VAR {b} = VAR {a} |" in tokenizer.decode(sample.tokens)

    sample = tasks.s_niah(np.random.default_rng(1), corpus, 600)
    assert sample.answer_mask.sum() == 7 and sample.answer_mask[-7:].all()
    assert np.array_equal(sample.tokens[-7:], sample.tokens[slice(*sample.values[0])])


@pytest.mark.parametrize(("low", "high"), [(0, None), (0, 90), (100, 200), (700, None), (333, 333)])
def test_dense_questions_keep_their_distance(setting, low, high):
    _, tasks, corpus = setting
    distances = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sample = tasks.dense(rng, corpus, 1024, 6, low, high, kinds=("number", "ids", "chain"))
        distances += sample.distances.tolist()
    distances = np.array(distances)
    # A needle ends before the question starts, which takes some tokens.
    assert distances.min() >= max(low, 10) and distances.max() <= (1024 if high is None else high)
    if low != high:
        assert len(set(distances.tolist())) > 10


@pytest.mark.parametrize("kind", ["fact", "word", "uuid"])
def test_facts_read_as_documented(setting, kind):
    tokenizer, tasks, corpus = setting
    value = {"fact": r"\d{4,7}", "word": r"[a-z]+", "uuid": r"[\da-f]{8}-[\da-f]{4}-4[\da-f-]{21}"}[kind]
    name = retrieval.FACT_KINDS[kind]
    plain = dict.fromkeys(retrieval.FACT_SENTENCES, retrieval.FACT_QUESTIONS)
    wordings = {**plain, retrieval.RULER_SENTENCE: (retrieval.RULER_QUESTION,)}

    def pattern(sentence):
        slots = {"what": "(?P<what>[ a-z]+)", "name": r"(?P<name>\w+)", "trade": "(?P<trade>[a-z]+)"}
        slots["value"] = f"(?P<value>{value})"
        return " " + re.escape(sentence).replace(r"\{", "{").replace(r"\}", "}").format(kind=name, **slots)

    values, seen = set(), set()
    for seed in range(60):
        sample = tasks.dense(np.random.default_rng(seed), corpus, 1000, 6, kinds=(kind,))
        for (start, end), number in zip(sample.needles.tolist(), sample.asked.tolist()):
            text, (first, last) = tokenizer.decode(sample.tokens[start:end]), sample.answers[number].tolist()
            matches = {sentence: re.fullmatch(pattern(sentence), text) for sentence in wordings}
            ((sentence, match),) = [(sentence, match) for sentence, match in matches.items() if match]
            asked = tokenizer.decode(sample.tokens[start:last])
            fields = match.groupdict()
            ends = {q: f"{q.format(kind=name, **fields)} {fields['value']}." for q in wordings[sentence]}
            (question,) = [question for question, end in ends.items() if asked.endswith(end)]
            assert asked.removesuffix(ends[question])[-1].isspace()
            assert sample.answer_mask[first:last].tolist() == [True] * (last - first - 1) + [False]
            values.add(fields["value"])
            seen |= {sentence, question}
    assert len(values) > 20
    assert seen == {*wordings, *(question for questions in wordings.values() for question in questions)}


def test_dense_fills_the_sequence(setting):
    _, tasks, corpus = setting
    sample = tasks.dense(np.random.default_rng(0), corpus, 4096, 300, kinds=("number",))
    written = (sample.needles[:, 1] - sample.needles[:, 0]).sum() + sample.answer_mask.sum()
    assert len(sample.answers) > 20 and written > 1000


def test_depth_places_the_needle(setting):
    _, tasks, corpus = setting
    starts = [tasks.s_niah(np.random.default_rng(0), corpus, 500, depth).needles[0] for depth in (0.0, 0.5, 1.0)]
    sample = tasks.s_niah(np.random.default_rng(0), corpus, 500, 1.0)
    assert starts[0][0] == 0 and starts[0][0] < starts[1][0] < starts[2][0]
    assert starts[2][1] <= sample.answers[0, 0]


@pytest.mark.parametrize(("length", "bound"), [(1000, 90), (1000, 300), (300, 5000)])
def test_near_needles_keep_their_distance(setting, length, bound):
    tokenizer, tasks, corpus = setting
    question = len(tasks.pieces["ask_key"])
    samples = [tasks.s_niah(np.random.default_rng(seed), corpus, length, max_distance=bound) for seed in range(200)]
    distances = np.array([sample.distances[0] for sample in samples])
    furthest = min(bound, samples[0].answers[0, 0] - np.diff(samples[0].needles[0])[0])  # the needle at the start
    assert question <= distances.min() < question + 0.1 * furthest and 0.9 * furthest < distances.max() <= furthest
    nearest = tasks.s_niah(np.random.default_rng(0), corpus, length, max_distance=question)
    assert nearest.distances.tolist() == [question]


def test_haystack_goes_round():
    corpus = np.arange(10, dtype=np.uint16)
    tokens = excerpt(corpus, 25, np.random.default_rng(0))
    assert np.array_equal(np.diff(tokens.astype(int)) % 10, np.ones(24))


@pytest.mark.parametrize("parts", [1, 2, 8, 100])
def test_parts_are_runs_of_the_corpus_from_random_places(parts):
    corpus, length = np.arange(60_000, dtype=np.uint16), 800
    sizes, starts = [], []
    for seed in range(30):
        tokens = excerpt(corpus, length, np.random.default_rng(seed), parts=parts).astype(int)
        cuts = np.flatnonzero(np.diff(tokens) % len(corpus) != 1) + 1
        assert len(tokens) == length and len(cuts) == parts - 1
        sizes += np.diff(cuts, prepend=0, append=length).tolist()
        starts += tokens[[0, *cuts]].tolist()
    assert min(sizes) >= length // (4 * parts) and (parts == 1 or len(set(sizes)) > 5)
    assert len(set(starts)) > 0.95 * len(starts) and np.mean(starts) == pytest.approx(30_000, rel=0.3)
    # As long as it gets: every token from another place.
    tokens = excerpt(corpus, 5, np.random.default_rng(0), parts=5).astype(int)
    assert len(tokens) == 5 and (np.diff(tokens) != 1).all()


@pytest.mark.parametrize("task", ["s_niah", "mq_niah", "vt", "dense"])
@pytest.mark.parametrize("parts", [1, 4])
def test_haystacks_of_tasks_are_made_of_parts(task, parts):
    """With a corpus of ids that no template has. `dense` writes over its haystack, others put needles into theirs."""
    tasks = retrieval.RetrievalTasks(TOKENIZER, pool=500)
    corpus = np.arange(1000, 61_000, dtype=np.uint16)
    options = {"items": 2, "kinds": ("number",)} if task == "dense" else {}  # too little to hide a part
    for seed in range(5):
        sample = tasks.make(task, np.random.default_rng(seed), corpus, 1200, parts=parts, **options)
        tokens = sample.tokens.astype(int)
        at = np.flatnonzero(tokens >= 1000)
        haystack = tokens[at]
        offsets = (haystack - (at if task == "dense" else np.arange(len(haystack)))) % len(corpus)
        assert len(set(offsets.tolist())) == parts


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("s_niah", {"length": 20}, "`length` must be at least"),
        ("s_niah", {"depth": 2}, "`depth` must be from 0 to 1"),
        ("s_niah", {"max_distance": 3}, "`max_distance` must be at least .*, for the question, got 3"),
        ("s_niah", {"max_distance": 90, "depth": 0.5}, "`depth` 0.5 and `max_distance` 90 both say"),
        ("s_niah", {"parts": 0}, "`parts` must be an integer from 1 to .* got 0"),
        ("dense", {"parts": 501}, "`parts` must be an integer from 1 to the 500 tokens of the haystack, got 501"),
        ("vt", {"parts": 2.5}, "`parts` must be an integer from 1 to .* got 2.5"),
        ("mq_niah", {"queries": 7}, "`queries` must be from 1 to `pairs`"),
        ("vt", {"score": "none"}, "`score` 'last' or 'all'"),
        ("dense", {"kinds": ("words",)}, "`kinds` must be of number, ids, chain"),
        ("dense", {"min_distance": 5, "max_distance": 4}, "leave no distance"),
        ("dense", {"min_distance": 500}, "No question has room in 500 tokens"),
        ("dense", {"items": 501, "kinds": ("ids",)}, "501 needles need a larger `pool` than"),
        ("niah", {}, "no task 'niah'"),
    ],
)
def test_impossible_samples_are_refused(setting, task, options, message):
    _, tasks, corpus = setting
    options = {"length": 500, **options}
    with pytest.raises(ValueError, match=message):
        tasks.make(task, np.random.default_rng(0), corpus, **options)


def test_values_are_of_the_range_asked_for():
    tasks = retrieval.RetrievalTasks(TOKENIZER, value_ids=(0, 5), pool=10)
    values = [tasks.s_niah(np.random.default_rng(i), np.arange(99), 200).tokens[-7:] for i in range(20)]
    assert set(np.concatenate(values)) <= set(range(5)) - set(TOKENIZER.all_special_ids)
    with pytest.raises(ValueError, match="`value_ids` must be a range in"):
        retrieval.RetrievalTasks(TOKENIZER, value_ids=(5, 5))


# -- ruler.py --


@pytest.fixture(scope="module")
def ruler() -> RulerTasks:
    return make_ruler()


@pytest.mark.parametrize("task", TASKS_OF_RULER)
def test_ruler_prompts_hold_their_answers(ruler, task):
    for length in (2500, 3001):
        prompt = ruler.make(task, np.random.default_rng(length), length)
        text = TOKENIZER.decode(prompt.tokens)
        again = ruler.make(task, np.random.default_rng(length), length)
        assert np.array_equal(prompt.tokens, again.tokens) and prompt.outputs == again.outputs
        assert length - 150 < len(prompt.tokens) + prompt.answer_tokens <= length
        assert prompt.tokens[0] == TOKENIZER("a")["input_ids"][0] or TOKENIZER.bos_token_id not in prompt.tokens[:1]
        assert all(output in text for output in prompt.outputs)
        needles = [TOKENIZER.decode(prompt.tokens[a:b]) for a, b in prompt.values]
        assert all(any(output in needle for needle in needles) for output in prompt.outputs) or not needles
        expected = {"vt": 5, "cwe": 10, "fwe": 3, "niah_multivalue": 4, "niah_multiquery": 4}.get(task, 1)
        assert len(set(prompt.outputs)) == expected


def test_ruler_words_are_the_most_frequent(ruler):
    prompt = ruler.make("cwe", np.random.default_rng(0), 3000)
    listed = TOKENIZER.decode(prompt.tokens).split("appear most often.\n")[-1].split("\nQuestion")[0].split()[1::2]
    counts = sorted(listed.count(word) for word in set(listed))
    assert min(listed.count(word) for word in prompt.outputs) == counts[-10] > counts[-11]
    prompt = ruler.make("fwe", np.random.default_rng(0), 3000)
    coded = TOKENIZER.decode(prompt.tokens).split("coded words.")[1].split("\nQuestion")[0].split()
    ranked = sorted(set(coded), key=lambda word: -coded.count(word))
    assert ranked[0] == "..." and ranked[1:4] == prompt.outputs


def test_ruler_needle_is_at_its_depth(ruler):
    for task in ONE_NEEDLE[1:]:
        starts = [ruler.make(task, np.random.default_rng(0), 3000, depth).depth for depth in (0.0, 0.5, 1.0)]
        assert starts[0] < 0.1 and 0.3 < starts[1] < 0.7 and starts[2] > 0.8


def test_string_match():
    assert string_match_all("It is ABC, and 123.", ["abc", "123"]) == 1
    assert string_match_all("It is ABC.", ["abc", "123"]) == 0.5
    assert string_match_all("", ["abc"]) == 0


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("niah_single_1", 150, "niah_single_1 needs at least .* more tokens"),
        ("vt", 300, "vt needs at least .* more tokens"),
        ("cwe", 500, "cwe does not fit into 500 tokens"),
        ("cwe", 400_000, "needs more than the 5184 words or pairs"),
        ("fwe", 150, "fwe needs at least 200 tokens"),
        ("qa", 1000, "There is no task 'qa'"),
    ],
)
def test_impossible_prompts_are_refused(ruler, task, length, message):
    with pytest.raises(ValueError, match=message):
        ruler.make(task, np.random.default_rng(0), length)


# -- facts.py --


@pytest.mark.parametrize("task", facts.TASKS)
def test_facts_are_where_the_prompt_says_and_of_words_not_trained_on(setting, task):
    tokenizer, _, corpus = setting
    rng = np.random.default_rng(3)
    lists = ((facts.NAMES, NAMES), (facts.TRADES, TRADES), (facts.THINGS, KINDS_OF_SECRET))
    assert not any(set(here) & set(there) for here, there in lists)
    assert not {x for pair in facts.REWORDED for x in pair} & {
        *retrieval.FACT_SENTENCES, *retrieval.FACT_QUESTIONS
    }  # fmt: skip
    for _ in range(20):
        fact = facts.make_fact(task, rng)
        tokens, (start, end) = facts.make_prompt(fact, rng, tokenizer, corpus, 400)
        text = tokenizer.decode(tokens)
        assert len(tokens) == 400 and tokenizer.decode(tokens[start:end]) == f" {fact[0]}"
        assert text.endswith(f" {fact[1]}") and fact[2] in fact[0] and fact[2] not in fact[1]
    with pytest.raises(ValueError, match="`--lengths` must be at least .* for fact and question, got 10"):
        facts.make_prompt(fact, rng, tokenizer, corpus, 10)


# -- tokens.py --


def test_haystacks_of_every_kind_are_read(tmp_path):
    texts = ["One text.\n", "Another,\nof two lines."]
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]
    tokens = read_haystack(files, TOKENIZER)
    end = TOKENIZER.eos_token
    assert tokens.dtype == np.uint16
    assert TOKENIZER.decode(tokens) == end.join([texts[0], texts[0], *texts]) + end
    assert 5 <= len(read_haystack(files, TOKENIZER, most=5)) < len(tokens)
    np.save(tmp_path / "d.npy", tokens)
    mapped = read_haystack([tmp_path / "d.npy"], TOKENIZER)
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, tokens)
    (tmp_path / "e.jsonl").write_text('{"body": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='Line 1 of .*e.jsonl has no string "text"'):
        read_haystack([tmp_path / "e.jsonl"], TOKENIZER)


def test_samples_of_a_cell_do_not_depend_on_other_cells():
    draws = {sample_rng(*key).integers(2**62) for key in ((0, "vt", 9, 0), (1, "vt", 9, 0), (0, "vt", 9, 1))}
    assert len(draws) == 3 and sample_rng(0, "vt", 9, 0).integers(2**62) in draws
