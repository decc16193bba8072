"""The evaluations of long contexts: tasks are what they say, scores are right, and both protocols run as commands."""

import argparse
import gzip
import json
import pickle
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from examples.synthetic_text import KINDS_OF_SECRET, NAMES, TRADES, make_documents
from tests.models import tiny_model


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import eval_facts
    import eval_ruler
    import evaluation
    import retrieval_tasks
    import ruler_tasks
    from prepare_corpus import train_tokenizer


VOCABULARY = 500
TEXT = "\n".join(document.text for document in make_documents(5, 4000, 20, 1))
WORDS = {
    "nouns": ["river", "lamp", "engine", "window", "carpet", "violin", "meadow", "harbor"],
    "adjectives": ["green", "quiet", "early", "narrow", "gentle", "hollow", "amber", "brisk"],
    "verbs": ["walk", "carry", "listen", "gather", "wander", "borrow", "mend", "fold", "whisper", "climb"],
}


def other_tokenizer() -> PreTrainedTokenizerFast:
    """One that joins digits, as many do: numbers have different numbers of tokens. It has no end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT, " ".join(str(i * 7919) for i in range(1000))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)


TOKENIZERS = {"single digits": train_tokenizer([{"text": TEXT}], VOCABULARY), "joined digits": other_tokenizer()}
TOKENIZER = TOKENIZERS["single digits"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def setting(request):
    """A tokenizer, its tasks and a corpus in its tokens."""
    tokenizer = TOKENIZERS[request.param]
    corpus = np.array(evaluation.encode(tokenizer, TEXT), dtype=np.uint16)
    return tokenizer, retrieval_tasks.RetrievalTasks(tokenizer, pool=500), corpus


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of an untrained HSA model and an untrained Llama with their tokenizer, a haystack and word lists."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {
        "hsa": tiny_model(vocab_size=VOCABULARY),
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=0, bos_token_id=0, **sizes)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "words.json").write_text(json.dumps(WORDS), encoding="utf-8")
    return {name: folder / name for name in (*made, "text.txt", "words.json")}


@pytest.fixture(scope="module", params=["hsa", "llama"])
def any_model(request):
    if request.param == "hsa":
        return tiny_model()
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


# -- retrieval_tasks.py --

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
            comma = evaluation.encode(tokenizer, ",") if is_chain else []
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
    name = retrieval_tasks.FACT_KINDS[kind]
    plain = dict.fromkeys(retrieval_tasks.FACT_SENTENCES, retrieval_tasks.FACT_QUESTIONS)
    wordings = {**plain, retrieval_tasks.RULER_SENTENCE: (retrieval_tasks.RULER_QUESTION,)}

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
    tokens = retrieval_tasks.excerpt(corpus, 25, np.random.default_rng(0))
    assert np.array_equal(np.diff(tokens.astype(int)) % 10, np.ones(24))


@pytest.mark.parametrize("parts", [1, 2, 8, 100])
def test_parts_are_runs_of_the_corpus_from_random_places(parts):
    corpus, length = np.arange(60_000, dtype=np.uint16), 800
    sizes, starts = [], []
    for seed in range(30):
        tokens = retrieval_tasks.excerpt(corpus, length, np.random.default_rng(seed), parts=parts).astype(int)
        cuts = np.flatnonzero(np.diff(tokens) % len(corpus) != 1) + 1
        assert len(tokens) == length and len(cuts) == parts - 1
        sizes += np.diff(cuts, prepend=0, append=length).tolist()
        starts += tokens[[0, *cuts]].tolist()
    assert min(sizes) >= length // (4 * parts) and (parts == 1 or len(set(sizes)) > 5)
    assert len(set(starts)) > 0.95 * len(starts) and np.mean(starts) == pytest.approx(30_000, rel=0.3)
    # As long as it gets: every token from another place.
    tokens = retrieval_tasks.excerpt(corpus, 5, np.random.default_rng(0), parts=5).astype(int)
    assert len(tokens) == 5 and (np.diff(tokens) != 1).all()


@pytest.mark.parametrize("task", ["s_niah", "mq_niah", "vt", "dense"])
@pytest.mark.parametrize("parts", [1, 4])
def test_haystacks_of_tasks_are_made_of_parts(task, parts):
    """With a corpus of ids that no template has. `dense` writes over its haystack, others put needles into theirs."""
    tasks = retrieval_tasks.RetrievalTasks(TOKENIZER, pool=500)
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
    tasks = retrieval_tasks.RetrievalTasks(TOKENIZER, value_ids=(0, 5), pool=10)
    values = [tasks.s_niah(np.random.default_rng(i), np.arange(99), 200).tokens[-7:] for i in range(20)]
    assert set(np.concatenate(values)) <= set(range(5)) - set(TOKENIZER.all_special_ids)
    with pytest.raises(ValueError, match="`value_ids` must be a range in"):
        retrieval_tasks.RetrievalTasks(TOKENIZER, value_ids=(5, 5))


# -- ruler_tasks.py --


@pytest.fixture(scope="module")
def ruler():
    corpus = np.array(evaluation.encode(TOKENIZER, TEXT), dtype=np.uint16)
    words = {
        kind: [*of_kind, *(f"{word}s{i}" for word in of_kind for i in "abcdefgh")] for kind, of_kind in WORDS.items()
    }
    return ruler_tasks.RulerTasks(TOKENIZER, words, corpus)


@pytest.mark.parametrize("task", ruler_tasks.TASKS)
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
    for task in eval_ruler.ONE_NEEDLE[1:]:
        starts = [ruler.make(task, np.random.default_rng(0), 3000, depth).depth for depth in (0.0, 0.5, 1.0)]
        assert starts[0] < 0.1 and 0.3 < starts[1] < 0.7 and starts[2] > 0.8


def test_string_match():
    assert ruler_tasks.string_match_all("It is ABC, and 123.", ["abc", "123"]) == 1
    assert ruler_tasks.string_match_all("It is ABC.", ["abc", "123"]) == 0.5
    assert ruler_tasks.string_match_all("", ["abc"]) == 0


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("niah_single_1", 150, "niah_single_1 needs at least .* more tokens"),
        ("vt", 300, "vt needs at least .* more tokens"),
        ("cwe", 500, "cwe does not fit into 500 tokens"),
        ("cwe", 50_000, "needs more than the 234 words"),
        ("fwe", 150, "fwe needs at least 200 tokens"),
        ("qa", 1000, "There is no task 'qa'"),
    ],
)
def test_impossible_prompts_are_refused(ruler, task, length, message):
    with pytest.raises(ValueError, match=message):
        ruler.make(task, np.random.default_rng(0), length)


# -- evaluation.py --


@pytest.mark.parametrize("segment", [0, 7, 64, 4096])
def test_reading_in_segments_equals_one_pass(any_model, segment):
    ids = torch.randint(1, 99, (2, 150))
    with torch.no_grad():
        logits = any_model(ids).logits
    right, _ = evaluation.score_last(any_model, ids, 20, segment)
    assert torch.equal(right, logits[:, -21:-1].argmax(-1) == ids[:, -20:])
    expected = torch.nn.functional.cross_entropy(logits[:, -71:-1].mT, ids[:, -70:], reduction="none")
    torch.testing.assert_close(evaluation.nll(any_model, ids, 70, segment), expected, atol=1e-4, rtol=1e-4)
    tokens, _ = evaluation.generate(any_model, ids[:1], 8, segment)
    whole = any_model.generate(ids[:1], max_new_tokens=8, do_sample=False)[0, 150:].tolist()
    assert tokens == whole


def test_recorded_retrieval_is_that_of_the_scored_tokens(model):
    ids = torch.randint(1, 99, (2, 200))
    with torch.no_grad():
        layers = model(ids, output_retrieval=True).retrieval
    expected = torch.stack([layer.indices[:, -21:-1].flatten(2) for layer in layers], dim=2)
    for offload in (False, True):
        _, chunks = evaluation.score_last(model, ids, 20, 48, offload)
        assert torch.equal(chunks, expected)
    tokens, chunks = evaluation.generate(model, ids[:1, :-20], 5, 48)
    assert torch.equal(chunks[0, 0], expected[0, 0]) and chunks.shape[1] == len(tokens)
    assert not model.base_model._forward_hooks and not model.base_model._forward_pre_hooks


def test_recall():
    chunks = torch.tensor([[[3, -1], [4, 4]], [[0, 1], [7, 2]]])  # two tokens, two layers, K = 2
    assert evaluation.retrieval_recall(chunks, [(48, 64)], 16) == [1, 0, 1]
    assert evaluation.retrieval_recall(chunks, [(60, 70), (85, 90)], 16) == pytest.approx([1 / 3, 1 / 3, 2 / 3])


class Stub(torch.nn.Module):
    """A model that knows the sequences it will be given, so that its logits are right, or all but those at `wrong`."""

    def __init__(self, vocabulary: int, wrong: int | None = None):
        super().__init__()
        self.vocabulary, self.wrong, self.known, self.rows = vocabulary, wrong, [], None
        self.device, self.config = torch.device("cpu"), types.SimpleNamespace(model_type="stub")

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        if past_key_values is None:
            self.rows, self.known = self.known[: len(input_ids)], self.known[len(input_ids) :]
            past_key_values = 0
        end = past_key_values + input_ids.shape[1]
        following = torch.stack([torch.roll(row, -1)[past_key_values:end] for row in self.rows]).clone()
        if self.wrong is not None:
            following[:, torch.arange(past_key_values, end) == len(self.rows[0]) - 1 + self.wrong] = 0
        logits = torch.nn.functional.one_hot(following, self.vocabulary).float()[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=logits, past_key_values=end)


def arguments_for(folders, *words) -> argparse.Namespace:
    flags = ["--model", "-", "--output", "-", "--haystack", folders["text.txt"], "--device", "cpu", *words]
    return eval_ruler.parse_arguments([str(word) for word in flags])


@pytest.mark.parametrize("task", eval_ruler.PAPER_TASKS)
def test_scores_of_a_cheat_a_near_miss_and_a_guess(folders, task):
    words = ("--samples", 4, "--seeds", 0, 1, "--batch_size", 3, "--segment", 200)
    arguments = arguments_for(folders, *words)
    corpus = evaluation.read_haystack(arguments.haystack, TOKENIZER)
    for wrong, score in ((None, 1.0), (-1, 0.0), (-30, 1.0)):  # wrong about the last token; about one of the question
        model = Stub(VOCABULARY, wrong)
        protocol = eval_ruler.PaperProtocol(arguments, model, TOKENIZER, corpus)
        for seed in arguments.seeds:
            for i in range(arguments.samples):
                tokens = protocol.sample(task, 600, seed, i)[0].tokens
                model.known.append(torch.from_numpy(tokens.astype(np.int64)))
        summary = evaluation.summarise(protocol.records(task, 600))
        assert summary["accuracy"] == score and summary["samples"] == 8
    model = tiny_model(vocab_size=VOCABULARY)
    records = eval_ruler.PaperProtocol(arguments, model, TOKENIZER, corpus).records(task, 600)
    assert evaluation.summarise(records)["accuracy"] == 0
    assert all(len(record["recall"]) == 3 for record in records)


def test_ruler_answers_are_matched(folders, ruler, monkeypatch):
    arguments = arguments_for(folders, "--words", folders["words.json"], "--protocol", "ruler", "--samples", 2)
    protocol = eval_ruler.RulerProtocol(arguments, Stub(VOCABULARY), TOKENIZER, ruler.haystack)
    protocol.tasks = ruler
    for share, score in ((4, 1.0), (2, 0.5), (0, 0.0)):
        outputs = [protocol.sample("niah_multiquery", 2000, 0, i)[0].outputs[:share] for i in range(2)]
        answers = iter(evaluation.encode(TOKENIZER, f" they are {', '.join(x)}. And then") for x in outputs)
        monkeypatch.setattr(eval_ruler, "generate", lambda *_, answers=answers: (next(answers), None))
        records = protocol.records("niah_multiquery", 2000)
        assert [record["score"] for record in records] == [score, score]


def test_wilson_interval():
    assert evaluation.wilson(0, 0) == (0, 1)
    assert evaluation.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927, by hand
    assert evaluation.wilson(10, 10)[1] == pytest.approx(1)
    assert evaluation.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_haystacks_of_every_kind_are_read(tmp_path):
    texts = ["One text.\n", "Another,\nof two lines."]
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]
    tokens = evaluation.read_haystack(files, TOKENIZER)
    end = TOKENIZER.eos_token
    assert tokens.dtype == np.uint16
    assert TOKENIZER.decode(tokens) == end.join([texts[0], texts[0], *texts]) + end
    assert 5 <= len(evaluation.read_haystack(files, TOKENIZER, most=5)) < len(tokens)
    np.save(tmp_path / "d.npy", tokens)
    mapped = evaluation.read_haystack([tmp_path / "d.npy"], TOKENIZER)
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, tokens)
    (tmp_path / "e.jsonl").write_text('{"body": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='Line 1 of .*e.jsonl has no string "text"'):
        evaluation.read_haystack([tmp_path / "e.jsonl"], TOKENIZER)


def test_samples_of_a_cell_do_not_depend_on_other_cells():
    draws = {
        evaluation.sample_rng(*key).integers(2**62) for key in ((0, "vt", 9, 0), (1, "vt", 9, 0), (0, "vt", 9, 1))
    }
    assert len(draws) == 3 and evaluation.sample_rng(0, "vt", 9, 0).integers(2**62) in draws


# -- eval_ruler.py --


@pytest.mark.parametrize("name", ["hsa", "llama"])
@pytest.mark.parametrize("protocol", ["paper", "ruler"])
def test_protocols_from_a_folder(folders, tmp_path, capsys, name, protocol):
    lengths = (400, 512) if protocol == "paper" else (900,)
    words = ["--model", folders[name], "--haystack", folders["text.txt"], "--words", folders["words.json"],
             "--protocol", protocol, "--output", tmp_path, "--samples", 2, "--depths", 2, "--segment", 256,
             "--device", "cpu", "--lengths", *lengths]  # fmt: skip
    if protocol == "ruler":
        words += ["--tasks", "niah_single_1", "vt"]
    eval_ruler.main([str(word) for word in words])
    results = json.loads((tmp_path / f"{protocol}.json").read_text(encoding="utf-8"))
    assert {"cpu", "torch", "transformers", "python", "device", "dtype"} <= results["hardware"].keys()
    assert ("hsa" in results["hardware"]) == (name == "hsa")
    assert results["model"]["type"] == name and results["model"]["parameters"] > 0
    assert str(tmp_path.parent) not in json.dumps(results)
    assert len(results["rows"]) == (6 if protocol == "paper" else 2)
    for row in results["rows"]:
        assert row["samples"] == 2 and 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["seconds"] > 0
        assert len(row["records"]["score"]) == len(row["records"]["index"]) == 2
        assert ("recall" in row) == (name == "hsa")
        if row["task"] in eval_ruler.ONE_NEEDLE:
            assert row["records"]["depth"] == [0, 1]
    printed = capsys.readouterr().out
    assert all(row["task"] in printed for row in results["rows"])
    map_file = "paper_s_niah.png" if protocol == "paper" else "ruler_niah_single_1.png"
    assert (tmp_path / map_file).read_bytes().startswith(b"\x89PNG")


# -- eval_facts.py --


@pytest.mark.parametrize("task", eval_facts.TASKS)
def test_facts_are_where_the_prompt_says_and_of_words_not_trained_on(setting, task):
    tokenizer, _, corpus = setting
    rng = np.random.default_rng(3)
    lists = ((eval_facts.NAMES, NAMES), (eval_facts.TRADES, TRADES), (eval_facts.THINGS, KINDS_OF_SECRET))
    assert not any(set(here) & set(there) for here, there in lists)
    assert not {x for pair in eval_facts.REWORDED for x in pair} & {
        *retrieval_tasks.FACT_SENTENCES, *retrieval_tasks.FACT_QUESTIONS
    }  # fmt: skip
    for _ in range(20):
        fact = eval_facts.make_fact(task, rng)
        tokens, (start, end) = eval_facts.make_prompt(fact, rng, tokenizer, corpus, 400)
        text = tokenizer.decode(tokens)
        assert len(tokens) == 400 and tokenizer.decode(tokens[start:end]) == f" {fact[0]}"
        assert text.endswith(f" {fact[1]}") and fact[2] in fact[0] and fact[2] not in fact[1]
    with pytest.raises(ValueError, match="`--lengths` must be at least .* for fact and question, got 10"):
        eval_facts.make_prompt(fact, rng, tokenizer, corpus, 10)


@pytest.mark.parametrize("right", [True, False])
def test_answers_to_facts_are_matched(folders, tmp_path, monkeypatch, right):
    def say(model, ids, *args, **kwargs):
        """What the fact in the prompt says, or something else."""
        sentence = facts[-1][0] if right else "Nothing of the kind."
        return TOKENIZER(sentence)["input_ids"], None

    def make_fact(*args):
        facts.append(make(*args))
        return facts[-1]

    facts, make = [], eval_facts.make_fact
    words = ["--model", str(folders["hsa"]), "--haystack", str(folders["text.txt"]), "--output", str(tmp_path)]
    words += ["--lengths", "300", "--samples", "2", "--device", "cpu"]
    eval_facts.main(words)  # the untrained model runs through
    rows = json.loads((tmp_path / "facts.json").read_text())["rows"]
    assert [row["task"] for row in rows] == list(eval_facts.TASKS) and all("recall" in row for row in rows)
    monkeypatch.setattr(eval_facts, "make_fact", make_fact)
    monkeypatch.setattr(eval_facts, "generate", say)
    eval_facts.main(words)
    rows = json.loads((tmp_path / "facts.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == [float(right)] * 4 and rows[0]["samples"] == 2


def test_what_does_not_fit_into_memory_is_reported(folders, tmp_path, monkeypatch, capsys):
    def records(self, task, length):
        if length > 400:
            raise torch.OutOfMemoryError
        return [{"seed": 0, "index": 0, "score": 1.0, "depth": 0.5}]

    monkeypatch.setattr(eval_ruler.PaperProtocol, "records", records)
    words = ["--model", folders["llama"], "--haystack", folders["text.txt"], "--output", tmp_path, "--tasks", "s_niah",
             "--lengths", 400, 500, "--device", "cpu"]  # fmt: skip
    eval_ruler.main([str(word) for word in words])
    rows = json.loads((tmp_path / "paper.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["accuracy"] == 1 and rows[1] == {"task": "s_niah", "length": 500, "error": "out of memory"}
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`--haystack` is needed by s_niah, mq_niah, vt"),
        (["--tasks", "cwe"], "`--tasks`: cwe is not in `--protocol paper`"),
        (["--protocol", "ruler", "--tasks", "cwe"], "`--words` is needed by cwe"),
        (["--protocol", "ruler", "--words", "no.json", "--tasks", "cwe"], "`--words`: there is no file no.json"),
        (["--haystack", "a.csv"], "`--haystack` takes .txt, .jsonl, .jsonl.gz and .npy files, got a.csv"),
        (["--haystack", "no.txt"], "`--haystack`: there is no file no.txt"),
        (["--samples", "0"], "`--samples` must be at least 1, got 0"),
        (["--lengths", "100", "-1"], "`--lengths` must be at least 1"),
        (["--dtype", "int8"], "`--dtype` must be auto, float32"),
        (["--depths", "1"], "`--depths` must be 0 or at least 2"),
        (["--config", "chunk_topk"], "argument --config: takes NAME=VALUE, got 'chunk_topk'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(folders, capsys, words, message):
    if "--depths" in words:
        words = [*words, "--haystack", str(folders["text.txt"])]
    with pytest.raises(SystemExit):
        eval_ruler.parse_arguments(["--model", "m", "--output", "o", *words])
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_prompts_too_short_for_a_task_end_the_program_at_once(folders, tmp_path):
    words = ["--model", folders["llama"], "--haystack", folders["text.txt"], "--output", tmp_path, "--lengths", 30]
    with pytest.raises(SystemExit, match="`length` must be at least"):
        eval_ruler.main([str(word) for word in words])


def test_fields_of_the_configuration_can_be_changed(folders, tmp_path, monkeypatch):
    models, load = [], eval_ruler.load

    def remember(arguments):
        model, tokenizer = load(arguments)
        models.append(model)
        return model, tokenizer

    monkeypatch.setattr(eval_ruler, "load", remember)
    words = ["--model", folders["hsa"], "--haystack", folders["text.txt"], "--output", tmp_path, "--tasks", "s_niah",
             "--lengths", 400, "--samples", 1, "--device", "cpu", "--config"]  # fmt: skip
    changes = ["chunk_topk=3", "retrieval_distance_penalty=0.5", "chunk_weighting=stick_breaking"]
    eval_ruler.main([str(word) for word in [*words, *changes]])
    expected = {"chunk_topk": 3, "retrieval_distance_penalty": 0.5, "chunk_weighting": "stick_breaking"}
    assert {name: getattr(models[0].config, name) for name in expected} == expected
    assert json.loads((tmp_path / "paper.json").read_text())["arguments"]["config"] == expected
    with pytest.raises(SystemExit, match=r"`--config`: a model of type 'hsa' has no field \['chunk_top'\]"):
        eval_ruler.main([str(word) for word in [*words, "chunk_top=3"]])


def test_offloading_is_for_hsa_models(folders, tmp_path):
    words = ["--model", folders["llama"], "--haystack", folders["text.txt"], "--output", tmp_path, "--offload"]
    with pytest.raises(SystemExit, match="`--offload` is for HSA models, not for 'llama'"):
        eval_ruler.main([str(word) for word in words])
