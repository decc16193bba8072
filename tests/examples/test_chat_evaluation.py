"""Evaluations of chat models: prompts in the chat template, questions that share a text, a base measured beside."""

import json
import os
import subprocess
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from hsa_lab.chat_rows.chat import ChatFormat
from hsa_lab.chat_rows.evaluation import KINDS, make_questions, make_texts
from hsa_lab.chat_rows.haystack import Haystack
from hsa_lab.chat_rows.qa import read_passages
from hsa_lab.chat_rows.splits import number_split, split_of
from hsa_lab.chat_rows.tables import words
from hsa_lab.evaluation import harness
from hsa_lab.evaluation.chat import chat_divergence, say
from hsa_lab.evaluation.questions import Facts
from hsa_lab.reading import Reader
from hsa_lab.tasks import babilong
from hsa_lab.tasks.chronicles import make_document
from hsa_lab.tasks.retrieval import RetrievalTasks
from hsa_lab.tasks.retrieval_chat import ANSWER_TOKENS, ChatRetrieval
from hsa_lab.tasks.ruler import TASKS, RulerTasks, words_of_split
from hsa_lab.tokens import encode
from modeling_hsa import convert_to_hsa
from tests.commands import REPOSITORY

from .test_babilong_perplexity import babi_file
from .test_chat_rows import write_qa
from .texts import TOKENIZER, VOCABULARY, chat_tokenizer, tiny_llama


HSA = {"placement": [1, 2], "sliding_window": 64, "chunk_topk": 4, "chunk_size": 16, "retrieval_dim": 16}
NOUNS, ADJECTIVES, VERBS = (
    [f"{start}{end}" for start in starts for end in ("in", "or", "ale", "und", "ist", "oth", "ick", "anto", "erly")]
    for starts in (
        [a + b for a in "bdfgklmnprst" for b in "aeiou"],
        ["gl" + b for b in "aeiou"] + ["str" + b for b in "aeiou"],
        ["qu" + b for b in "aeiou"] + ["spr" + b for b in "aeiou"],
    )
)
WORDS = {"nouns": [*NOUNS, "heron"], "adjectives": ADJECTIVES, "verbs": VERBS}


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def stream(tokenizer) -> np.ndarray:
    return np.array(encode(tokenizer, make_document(2, 40_000).text), np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, stream) -> Path:
    """A tiny chat model in "base", what it is converted to in "model", books, words, bAbI, passages and chats."""
    folder = tmp_path_factory.mktemp("chat")
    llama = tiny_llama(len(tokenizer))
    converted = convert_to_hsa(llama, **HSA)
    with torch.no_grad():
        for parameter in converted.parameters():  # as if it was trained
            parameter += 0.01 * torch.randn_like(parameter)
    for name, model in (("base", llama), ("model", converted)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    np.save(folder / "books-test.npy", stream)
    (folder / "words.json").write_text(json.dumps(WORDS))
    (folder / "babi").mkdir()
    (folder / "babi" / "qa1_x_train.txt").write_text(babi_file(200))
    write_qa(folder / "qa.jsonl.gz")
    chats = [{"prompt": f"What is {i}?", "answer": f"{i} is a number, the one after {i - 1}."} for i in range(20)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return folder


def run(folder: Path, output: Path, command: str, *words) -> dict:
    """The results of a command."""
    flags = ["--model", folder / "model", "--output", output, "--device", "cpu"]
    flags += [] if command == "chat" else ["--haystack", folder / "books-test.npy"]
    evaluate.main([command, *map(str, (*flags, *words))])
    return json.loads((output / f"{command}.json").read_text(encoding="utf-8"))


def in_chat(tokenizer, text: str) -> tuple[str, str]:
    """The message of the user and the beginning of the answer, of a prompt with one turn."""
    assert text.startswith("<|im_start|>user\n")
    message, mark, answer = text.removeprefix("<|im_start|>user\n").partition("<|im_end|>\n<|im_start|>assistant\n")
    assert mark and "<|im" not in message + answer
    return message, answer


# -- prompts in chat form --


@pytest.mark.parametrize("task", TASKS)
def test_ruler_begins_the_answer_in_the_turn_of_the_assistant(tokenizer, stream, task):
    chat = RulerTasks(tokenizer, WORDS, stream, ChatFormat(tokenizer), "test")
    plain = RulerTasks(tokenizer, WORDS, stream)
    for prompt, in_text in ((x.make(task, np.random.default_rng(0), 3000), x is plain) for x in (chat, plain)):
        text = tokenizer.decode(prompt.tokens)
        assert len(prompt.tokens) + prompt.answer_tokens <= 3000
        if in_text:
            assert "<|im_end|>" not in text
            continue
        message, answer = in_chat(tokenizer, text)
        assert message.rstrip().endswith(("?", ".")) and answer.endswith((" is", " are", "are:"))
        assert answer.startswith("The special magic" if task.startswith("niah") else "Answer: ")
        assert all(output in message for output in prompt.outputs)
        needles = [tokenizer.decode(prompt.tokens[a:b]) for a, b in prompt.values]
        assert all(any(output in needle for needle in needles) for output in prompt.outputs) or not needles
        if not task.startswith(("cwe", "fwe", "vt")):
            assert all(number_split(output) == "test" for output in prompt.outputs)


def test_words_of_ruler_are_of_the_split_and_not_trained_on():
    nouns = {"nouns": [*NOUNS, *words()["noun"]["train"]]}
    found = {split: words_of_split(WORDS | nouns, split) for split in ("validation", "test")}
    listed = {split: {word for of in found[split].values() for word in of} for split in found}
    assert listed["test"] and listed["validation"] and not listed["test"] & listed["validation"]
    assert all(split_of(f"word {word}") == split for split in listed for word in listed[split])
    trained = {word.lower() for pool in words().values() for word in pool["train"]}
    assert any(split_of(f"word {word}") == "test" for word in words()["noun"]["train"])
    assert not trained & listed["test"]


def test_several_needles_of_one_text_are_asked_for(tokenizer, stream):
    ruler = RulerTasks(tokenizer, WORDS, stream, ChatFormat(tokenizer), "test")
    for task, count in (("niah_multikey_1", 4), ("niah_multikey_3", 6), ("niah_single_2", 1), ("niah_multiquery", 1)):
        prompts = ruler.make_all(task, np.random.default_rng(1), 3000, most=6)
        assert len(prompts) == count and len({tuple(prompt.outputs) for prompt in prompts}) == count
        texts = {tokenizer.decode(prompt.tokens).rpartition("\nWhat ")[0] for prompt in prompts}
        assert len(texts) == 1
        for prompt in prompts:
            assert len(prompt.tokens) + prompt.answer_tokens <= 3000
            needles = [tokenizer.decode(prompt.tokens[start:end]) for start, end in prompt.values]
            assert len(needles) == len(prompt.outputs)
            assert all(any(output in needle for needle in needles) for output in prompt.outputs)


def test_common_words_are_pairs_where_there_are_not_enough(tokenizer, stream):
    ruler = RulerTasks(tokenizer, WORDS, stream, ChatFormat(tokenizer), "test")
    prompt = ruler.make("cwe", np.random.default_rng(0), 12_000)
    message, _ = in_chat(tokenizer, tokenizer.decode(prompt.tokens))
    listed = message.split("appear most often.\n")[-1].split("\nQuestion")[0].split()[1::2]
    assert all("-" in word for word in prompt.outputs) and len(prompt.tokens) > 9000
    counts = sorted(listed.count(word) for word in set(listed))
    assert min(listed.count(word) for word in prompt.outputs) == counts[-10] > counts[-11]


@pytest.mark.parametrize("digits", [0, 8])
@pytest.mark.parametrize(("task", "count"), [("s_niah", 1), ("mq_niah", 3), ("vt", 2)])
def test_the_tasks_of_the_papers_as_chats(tokenizer, stream, task, count, digits):
    asker = ChatRetrieval(RetrievalTasks(tokenizer, pool=2000, pool_seed=1), ChatFormat(tokenizer), "test", digits)
    for seed in range(5):
        asked = asker.make_all(task, np.random.default_rng(seed), stream, 700, most=3)
        assert len(asked) == count
        assert max(len(question.tokens) for question in asked) + ANSWER_TOKENS[task] == 700
        for question in asked:
            message, answer = in_chat(tokenizer, tokenizer.decode(question.tokens))
            assert answer == "" and message.endswith("?")
            needles = [tokenizer.decode(question.tokens[a:b]) for a, b in question.needles]
            assert all(needle.startswith(" |") and needle.endswith(" |") for needle in needles)
            assert all(any(value in needle for needle in needles) for value in question.expected)
            assert not any(value in needle for needle in needles for value in question.barred)
            assert all(value in message for value in question.barred)
            assert question.score(f"It is {' and '.join(question.expected)}.") == 1
            assert question.score(f"It is {question.expected[0][:-1]}.") == 0
            assert question.score(message) == (0 if task == "vt" else 1)
            if task == "mq_niah" or digits and task == "s_niah":
                assert all(number_split(value) == "test" for value in question.expected)
    first, last = (
        asker.make_all("s_niah", np.random.default_rng(0), stream, 700, depth)[0].depth for depth in (0.0, 1.0)
    )
    assert first < 0.1 and last > 0.7
    with pytest.raises(ValueError, match=f"{task} in chat form needs at least"):
        asker.make_all(task, np.random.default_rng(0), stream, 90)


def test_stories_are_asked_in_turns(tokenizer, stream):
    told = babilong.Story(("Mary moved to the garden.",), "Where is Mary?", "garden", (0,))
    shot = babilong.Story(("John moved to the office.",), "Where is John?", "office", (0,))
    prompts = babilong.Prompts(babilong.Background(stream, tokenizer), tokenizer, [shot], ChatFormat(tokenizer))
    prompt = prompts.make(told, 500, np.random.default_rng(0))
    turns = [
        {"role": "user", "content": "John moved to the office.\n\nAnswer in one word: Where is John?"},
        {"role": "assistant", "content": "office"},
        {"role": "user", "content": "@@"},
    ]
    before, after = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).split("@@")
    text = tokenizer.decode(prompt.tokens)
    assert len(prompt.tokens) == 500 and text.startswith(before)
    assert text.endswith("\n\nAnswer in one word: Where is Mary?" + after)
    assert [tokenizer.decode(prompt.tokens[a:b]) for a, b in prompt.facts] == [" Mary moved to the garden."]


# -- questions about one text --


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "trained" not in kind])
def test_several_questions_of_a_text_are_as_one_would_be(folder, tokenizer, stream, kind):
    books, passages = Haystack(stream, tokenizer), read_passages(folder / "qa.jsonl.gz", "test")
    texts = make_texts(kind, tokenizer, books, 3000, 4, passages=passages)
    several = 0
    for _ in range(4):
        samples = next(texts)
        several += len(samples) > 1
        assert len({sample.question for sample in samples}) == len(samples)
        assert 2800 < max(len(sample.tokens) for sample in samples) <= 3000
        for sample in samples:
            prompt = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(sample.tokens) == prompt and prompt.count(sample.question) == 1
            told = " ".join(tokenizer.decode(sample.tokens[a:b]) for a, b in sample.evidence)
            assert sample.score(told) > 0 or kind == "missing"
            shared = len(samples[0].messages[0]["content"]) - 300
            assert sample.messages[0]["content"][:shared] == samples[0].messages[0]["content"][:shared]
    assert several
    alone = [sample.question for sample in make_questions(kind, tokenizer, books, 3000, 2, passages=passages)]
    again = make_texts(kind, tokenizer, books, 3000, 1, passages=passages)
    assert alone == [next(again)[0].question for _ in range(2)]


# -- the commands --


@pytest.mark.parametrize("command", ["paper", "ruler", "babilong"])
def test_chat_models_are_asked_in_their_template(folder, tmp_path, command):
    more = {"paper": [], "ruler": ["--words", folder / "words.json"], "babilong": ["--babi", folder / "babi"]}[command]
    tasks = {"paper": ["s_niah", "vt"], "ruler": ["niah_multikey_1", "fwe"], "babilong": ["qa1"]}[command]
    words = [*more, "--tasks", *tasks, "--lengths", 600, "--samples", 3, "--batch_tokens", 1300]
    results = run(folder, tmp_path, command, *words, "--base", folder / "base")
    assert results["form"] == "chat" and results["base"] == "base"
    if command == "ruler":
        scores = {row["task"]: row["accuracy"] for row in results["rows"]}
        assert results["average"]["600"] == sum(scores[task] for task in tasks) / 2
        assert results["average"].keys() == {"600", "600, base"}
    assert [row["task"] for row in results["rows"]] == [name for task in tasks for name in (task, f"{task}, base")]
    for row in results["rows"]:
        assert row["samples"] == 3 and ("recall" in row) == ("base" not in row["task"] and row["task"] != "fwe")
        assert len(row["records"]["answer"]) == len(row["records"]["expected"]) == 3
    results = run(
        folder, tmp_path / "text", command, *words, "--chat", "no", "--base", folder / "base", "--base_length", 500
    )
    assert results["form"] == "text" and [row["task"] for row in results["rows"]] == tasks


def test_questions_about_long_texts_share_them(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "LONG", 1200)
    words = ["--tasks", "facts", "missing", "--lengths", 800, 1200, "--samples", 4, "--seeds", 0, 1]
    words += ["--most_read", 1900, "--questions_of_text", 3, "--answer_tokens", 4]
    results = run(folder, tmp_path, "facts", *words, "--base", folder / "base", "--base_length", 1000)
    rows = {(row["task"], row["length"]): row for row in results["rows"]}
    assert list(rows) == [
        ("facts", 800), ("facts, base", 800), ("missing", 800), ("missing, base", 800), ("facts", 1200),
        ("missing", 1200),
    ]  # fmt: skip
    short, long = rows["facts", 800], rows["facts", 1200]
    assert short["samples"] == 4 and "texts" not in short  # of 1,900 tokens two a seed
    assert long["texts"] == 2 and 4 <= long["samples"] <= 6 and len(long["recall_by_layer"]) == 2
    assert long["records"]["seed"].count(0) == long["records"]["index"].count(0) - long["records"]["seed"].count(1)
    assert short["records"]["question"] == rows["facts, base", 800]["records"]["question"]
    assert "facts, base" in capsys.readouterr().out


def test_answers_belong_to_their_questions(folder, tmp_path, monkeypatch, tokenizer):
    """A model that knows is right, in batches of which no two prompts are alike."""
    known, questions = {}, Facts.questions

    def remember(self, *sample):
        made = questions(self, *sample)
        known.update({question.tokens.tobytes(): question.record["expected"] for question in made})
        return made

    def answer(self, prompts, count, **options):
        assert len(prompts) > 1 and options == {"eos_token_id": 1}
        texts = [" and ".join(known[prompt.numpy().tobytes()]) or "It is not in the text." for prompt in prompts]
        return [(encode(tokenizer, text), None) for text in texts]

    monkeypatch.setattr(Facts, "questions", remember)
    monkeypatch.setattr(Reader, "generate_batch", answer)
    words = ["--lengths", 900, "--samples", 2, "--seeds", 0, 1, "--batch_tokens", 2000]
    rows = run(folder, tmp_path, "facts", *words)["rows"]
    assert {"facts", "facts, trained kinds", "documents", "missing"} <= {row["task"] for row in rows} < set(KINDS)
    assert [row["accuracy"] for row in rows] == [1.0] * len(rows) and rows[0]["samples"] == 4
    assert [row["refused"] for row in rows] == [float(row["task"] == "missing") for row in rows]


def test_passages_are_asked_about_alone_and_in_books(folder, tmp_path, capsys):
    words = ["--qa", folder / "qa.jsonl.gz", "--lengths", 700, "--samples", 3, "--answer_tokens", 3]
    results = run(folder, tmp_path, "qa", *words, "--base", folder / "base")
    assert [(row["task"], row["length"]) for row in results["rows"]] == [
        ("alone", 0), ("alone, base", 0), ("qa", 700), ("qa, base", 700),
    ]  # fmt: skip
    asked = [row["records"]["question"] for row in results["rows"]]
    assert asked[0] == asked[1] and asked[2] == asked[3] and set(asked[0]) & set(asked[2])
    assert "alone" in capsys.readouterr().out


def test_chats_are_compared_with_those_of_the_base(folder, tmp_path, capsys):
    words = ["--base", folder / "base", "--chats", folder / "chats.jsonl", "--samples", 5, "--prompts", 2]
    results = run(folder, tmp_path, "chat", *words, "--answer_tokens", 3)
    (row,) = results["rows"]
    assert row["samples"] == 5 and 0 < row["kl"]["low"] < row["kl"]["mean"] < row["kl"]["high"] and row["same"] <= 1
    assert [said["prompt"] for said in results["said"]] == ["What is 0?", "What is 1?"]
    assert all({"model", "base"} < said.keys() for said in results["said"])
    assert "What is 1?" in capsys.readouterr().out


def test_a_model_does_not_diverge_from_itself(tokenizer, folder):
    base = tiny_llama(len(tokenizer))
    chats = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]

    def kl(model) -> tuple[float, float]:
        found = chat_divergence(model, base, tokenizer, chats, rows=3)
        tokens = sum(record["tokens"] for record in found)
        return sum(record["kl"] for record in found) / tokens, sum(record["same"] for record in found) / tokens

    assert kl(base) == pytest.approx((0, 1), abs=1e-6)
    assert kl(convert_to_hsa(base, **HSA | {"sliding_window": 512}).eval())[0] == pytest.approx(0, abs=1e-5)
    expected = torch.tensor(encode(tokenizer, tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], tokenize=False, add_generation_prompt=True
    )))[None]  # fmt: skip
    new = base.generate(expected, max_new_tokens=3, do_sample=False, eos_token_id=1)[0, expected.shape[1] :]
    assert (
        say(base, tokenizer, ["Who?", "What is the longest river?"], 3)[0]
        == tokenizer.decode(new, skip_special_tokens=True).strip()
    )


def test_other_models_have_no_chat(folder, tmp_path):
    (tmp_path / "plain").mkdir()
    tiny_llama(VOCABULARY).save_pretrained(tmp_path / "plain")
    TOKENIZER.save_pretrained(tmp_path / "plain")
    for command in (["facts"], ["paper", "--chat", "yes"]):
        with pytest.raises(ValueError, match="no chat template"):
            run(folder, tmp_path, *command, "--model", tmp_path / "plain", "--lengths", 300)


@pytest.mark.parametrize("what", ["quick", "table", "base"])
def test_the_commands_of_the_recipe_are_commands(folder, tmp_path, what):
    """`evaluate.sh`, with another `python` that writes down what it is called with."""
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >"$OUTPUT/$BASHPID.words"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "books-validation.npy").write_bytes((folder / "books-test.npy").read_bytes())
    (tmp_path / "books-test.npy").write_bytes((folder / "books-test.npy").read_bytes())
    given = {"MODEL": "model", "BASE": "base", "QA": "qa.jsonl.gz", "BABI": "babi", "CHATS": "chats.jsonl"}
    given = {name: str(folder / file) for name, file in given.items()} | {"WORDS": str(folder / "words.json")}
    given |= {"STREAMS": str(tmp_path), "OUTPUT": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = REPOSITORY / "examples" / "recipes" / "adaptation" / "evaluate.sh"
    subprocess.run(["bash", script, what], env={**os.environ, **given}, check=True)
    called = [file.read_text().splitlines() for file in tmp_path.glob("*.words")]
    assert len(called) == {"quick": 7, "table": 8, "base": 5}[what]
    for file, *flags in called:
        assert file == "examples/evaluate.py"
        arguments = evaluate.parse_arguments(flags)
        split = "validation" if what == "quick" else "test"
        assert arguments.command == "chat" or arguments.haystack == [tmp_path / f"books-{split}.npy"]
        assert getattr(arguments, "split", split) == split
        assert Path(arguments.output).is_dir()
