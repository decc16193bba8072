"""`evaluate.py ppl` and `evaluate.py babilong` measure what they say, and run on HSA models and on others."""

import gzip
import json
import math
import random
from argparse import Namespace
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_lab.chat_rows import mixture, stories
from hsa_lab.chat_rows.splits import SPLITS
from hsa_lab.corpus import train_tokenizer
from hsa_lab.evaluation.babilong import Babilong
from hsa_lab.evaluation.perplexity import Perplexity, Places
from hsa_lab.reading import Reader, RetrievalRecorder
from hsa_lab.results import interval, ratio, student
from hsa_lab.tasks import babilong
from hsa_lab.tasks.chronicles import make_documents
from hsa_lab.tokens import document_bounds, ring_window
from tests.commands import run_example
from tests.models import tiny_model


PEOPLE = ("Mary", "John", "Daniel", "Sandra")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")


def babi_file(stories: int) -> str:
    """Stories in the form of bAbI's qa1: three questions each, after two facts more each time."""
    rng, lines = random.Random(0), []
    for _ in range(stories):
        place = {}
        for number in range(1, 10):
            if number % 3:
                person, room = rng.choice(PEOPLE), rng.choice(ROOMS)
                place[person] = room, number
                lines.append(f"{number} {person} moved to the {room}.")
            else:
                person = rng.choice(sorted(place))
                lines.append(f"{number} Where is {person}? \t{place[person][0]}\t{place[person][1]}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Namespace:
    """Folders: held-out texts, bAbI files, and a tiny HSA and a tiny Llama model with their tokenizer."""
    folder = tmp_path_factory.mktemp("evaluation")
    texts = [document.text for document in make_documents(1, 6000, 4, 1)]
    with gzip.open(folder / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    babi = folder / "babi"
    (babi / "en-10k").mkdir(parents=True)
    (babi / "en").mkdir()
    with gzip.open(babi / "en-10k" / "qa1_single_train.txt.gz", "wt", encoding="utf-8") as file:
        file.write(babi_file(300))
    for task, size in (("qa1", 30), ("qa3", 60)):
        (babi / "en" / f"{task}_single_train.txt").write_text(babi_file(size), encoding="utf-8")

    tokenizer = train_tokenizer([{"text": text} for text in [*texts, babi_file(30)]], 500)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    llama = LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    models = {"hsa": tiny_model(vocab_size=500, **ids), "llama": LlamaForCausalLM(llama).eval()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return Namespace(folder=folder, texts=texts, babi=babi, tokenizer=tokenizer, models=models)


def run(command: str, **arguments) -> None:
    """Runs `evaluate.py` with flags, as the command would."""
    words = [command]
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    evaluate.main(words)


# -- ppl --


def ppl(data, tmp_path: Path, monkeypatch, stream, kind: str = "hsa", **changes) -> Perplexity:
    """The evaluation of a model of `data`, which is not run."""
    made = []
    np.save(tmp_path / "stream.npy", stream)
    monkeypatch.setattr(evaluate, "load", lambda arguments: (data.models[kind], data.tokenizer))
    monkeypatch.setattr(Perplexity, "run", lambda self: made.append(self))
    values = {"lengths": [3, 40, 200, 400], "samples": 3, "batch_size": 2, "segment": 64, "last": 100, "model": "tiny"}
    run("ppl", **values | changes, haystack=tmp_path / "stream.npy", output=tmp_path)
    return made[0]


@pytest.fixture
def stream(data) -> np.ndarray:
    ids = [i for text in data.texts for i in [*data.tokenizer(text)["input_ids"], data.tokenizer.eos_token_id]]
    return np.array(ids, dtype=np.uint16)


@torch.no_grad()
def direct_losses(model, tokens: np.ndarray) -> np.ndarray:
    """Loss of every token of a window [L] but the first, in one pass."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    return torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hsa", "llama"])
@pytest.mark.parametrize("segment", [0, 7, 64])
def test_losses_are_those_of_one_pass(data, stream, tmp_path, monkeypatch, kind, segment):
    model = data.models[kind]
    evaluation = ppl(data, tmp_path, monkeypatch, stream, kind, segment=segment)
    for length in (3, 40, 200, 400):
        evaluation.evaluate("last", length)
    evaluation.evaluate("positions", 400)
    *rows, positions = json.loads((tmp_path / "ppl.json").read_text(encoding="utf-8"))["rows"]
    ends = rows[0]["records"]["end"]
    for row in rows:
        assert row["records"]["end"] == ends  # the same tokens at every length
        windows = [ring_window(stream, end - row["length"], row["length"]) for end in ends]
        count = min(100, row["length"] - 1)
        scored = [direct_losses(model, window)[-count:] for window in windows]
        loss = float(np.mean(scored))
        assert row["loss"]["mean"] == pytest.approx(loss, rel=1e-5)
        assert row["perplexity"]["mean"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert row["loss"]["low"] < row["loss"]["mean"] < row["loss"]["high"]
        size = [len(data.tokenizer.decode(window[-count:], skip_special_tokens=True).encode()) for window in windows]
        assert row["bits_per_byte"]["mean"] == pytest.approx(np.sum(scored) / math.log(2) / sum(size), rel=1e-5)
        assert row["bits_per_byte"]["low"] < row["bits_per_byte"]["mean"] < row["bits_per_byte"]["high"]
    changes = [a - b for a, b in zip(rows[3]["records"]["loss"], rows[2]["records"]["loss"])]
    assert rows[3]["change"]["from"] == 200
    assert rows[3]["change"]["mean"] == pytest.approx(np.mean(changes), abs=1e-3)

    assert positions["edges"] == [2, 64, 128, 256, 400]
    by_position = np.mean([direct_losses(model, window) for window in windows], axis=0)
    expected = [by_position[a - 1 : b - 1].mean() for a, b in zip([2, 64, 128, 256], [64, 128, 256, 400])]
    assert [bucket["mean"] for bucket in positions["losses"]] == pytest.approx(expected, rel=1e-5)


def test_foreign_text_replaces_all_but_the_end(data, stream, tmp_path, monkeypatch):
    model, half = data.models["hsa"], len(stream) // 2
    evaluation = ppl(data, tmp_path, monkeypatch, stream, lengths=[40, 200])
    for task in ("last", "foreign"):
        for length in (40, 200):
            evaluation.evaluate(task, length)
    short, own, same, foreign = json.loads((tmp_path / "ppl.json").read_text(encoding="utf-8"))["rows"]
    assert [row["task"] for row in (short, own, same, foreign)] == ["last", "last", "foreign", "foreign"]
    assert same["loss"] == short["loss"] and foreign["records"]["end"] == own["records"]["end"]
    for end, loss in zip(foreign["records"]["end"], foreign["records"]["loss"]):
        places = ((end - 200 + half, 160), (end - 40, 40))
        parts = [ring_window(stream, *place) for place in places]
        assert loss == pytest.approx(direct_losses(model, np.concatenate(parts))[-100:].mean(), rel=1e-3)
    assert foreign["loss"]["mean"] != pytest.approx(own["loss"]["mean"], rel=1e-3)


def test_windows_lie_in_documents_that_are_long_enough(stream):
    """Documents of 10 to 59 tokens; token 0 ends them."""
    rng = np.random.default_rng(0)
    sizes = [10, 50, 59, 20, 40]
    tokens = np.concatenate([[*range(1, size), 0] for size in sizes]).astype(np.uint16)
    bounds = document_bounds(tokens, 0)
    assert bounds.tolist() == [0, 10, 60, 119, 139, 179]
    places = Places(bounds, [15, 30, 45, 179])
    assert places.within == 30  # three of five documents have 30 tokens, two have 45
    ends = {places.draw(rng) for _ in range(2000)}
    assert ends == {*range(10 + 30, 61), *range(60 + 30, 120), *range(139 + 30, 180)}
    for end in ends:
        assert 0 not in ring_window(tokens, end - 30, 29)
        assert sorted(ring_window(tokens, end - 179, 179)) == sorted(tokens)
    everywhere = Places(bounds, [170])
    assert everywhere.within == 0
    assert {everywhere.draw(rng) for _ in range(5000)} == set(range(1, 180))
    assert document_bounds(tokens, None).tolist() == [0, 179]


def test_intervals_are_those_of_student():
    known = {2: 12.706, 3: 4.303, 5: 2.776, 11: 2.228, 31: 2.042, 1001: 1.962}
    assert {n: student(n) for n in known} == pytest.approx(known, abs=0.01)
    assert interval([1.0]) == {"mean": 1.0, "low": None, "high": None}
    low, high = (interval([1.0, 2.0, 3.0])[key] for key in ("low", "high"))
    assert ratio([2.0, 4.0, 6.0], [1, 2, 3]) == pytest.approx({"mean": 2, "low": 2, "high": 2})
    of_means = ratio([1.0, 2.0, 3.0], [4, 4, 4])
    assert (of_means["low"], of_means["high"]) == pytest.approx((low / 4, high / 4))
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hsa", "llama"])
def test_perplexity_as_a_command(data, stream, tmp_path, kind):
    """On texts and on their tokens, with the same results; windows that the text is too short for are refused."""
    np.save(tmp_path / "tokens.npy", stream)
    flags = {"model": data.folder / kind, "lengths": [64, 256], "samples": 2, "last": 32, "segment": 100}
    results = []
    for name, haystack in (("a", data.folder / "texts.jsonl.gz"), ("b", tmp_path / "tokens.npy")):
        run("ppl", haystack=haystack, output=tmp_path / name, device="cpu", **flags)
        assert (tmp_path / name / "ppl.png").read_bytes().startswith(b"\x89PNG")
        results.append(json.loads((tmp_path / name / "ppl.json").read_text(encoding="utf-8")))
    assert [row["loss"]["mean"] for row in results[0]["rows"][:2]] == [
        row["loss"]["mean"] for row in results[1]["rows"][:2]
    ]
    assert {"cpu", "torch", "transformers", "dtype"} <= results[0]["hardware"].keys()
    assert results[0]["text"]["tokens"] == len(stream)
    with pytest.raises(ValueError, match=f"`--lengths` 1000000 is more than the {len(stream)} tokens"):
        run("ppl", **{**flags, "lengths": [10**6]}, haystack=haystack, output=tmp_path / "c")
    flags |= {"tasks": ["foreign"], "lengths": [64, len(stream) // 2 + 1]}
    with pytest.raises(ValueError, match="so that `foreign` has no other text"):
        run("ppl", **flags, haystack=haystack, output=tmp_path / "d")


# -- babilong --


def test_babi_files_are_read_question_by_question(tmp_path):
    lines = [
        "1 Mary moved to the bathroom.", "2 John went to the hallway.", "3 Where is Mary? \tbathroom\t1",
        "4 Mary went to the garden.", "5 Where is Mary?\tgarden\t4 1", "1 The office is north of the kitchen.",
        "2 What is north of the kitchen?\toffice\t1",
    ]  # fmt: skip
    (tmp_path / "qa9_x_train.txt").write_text("\n".join(lines), encoding="utf-8")
    found = [x for split in SPLITS for x in stories.read_stories(tmp_path, "qa9", split)]
    first, second, third = sorted(found, key=lambda story: -story.question.count("Mary"))
    facts = ("Mary moved to the bathroom.", "John went to the hallway.", "Mary went to the garden.")
    assert first == stories.Story(facts[:2], "Where is Mary?", "bathroom", (0,))
    assert second == stories.Story(facts, "Where is Mary?", "garden", (2, 0))
    assert third == stories.Story(
        ("The office is north of the kitchen.",), "What is north of the kitchen?", "office", (0,)
    )
    with pytest.raises(FileNotFoundError, match="There is no qa2_.*_train.txt"):
        stories.read_stories(tmp_path, "qa2", "train")


def test_no_story_that_is_asked_about_is_trained_on(data, tmp_path, monkeypatch):
    """What BABILong asks, and what rows to train on are made of; solved examples are among the latter."""
    np.save(tmp_path / "books-train.npy", np.array(data.tokenizer(data.texts[0])["input_ids"], np.uint16))
    monkeypatch.setattr(mixture, "TASKS", ("qa1", "qa3"))
    monkeypatch.setattr(mixture, "RowBuilder", lambda *_: None)
    trained = mixture.Materials.load(data.tokenizer, tmp_path, "train", babi=data.babi).stories
    made = []
    monkeypatch.setattr(evaluate, "load", lambda arguments: (data.models["hsa"], data.tokenizer))
    monkeypatch.setattr(Babilong, "run", lambda self: made.append(self))
    flags = {"model": "tiny", "babi": data.babi, "haystack": data.folder / "texts.jsonl.gz", "output": tmp_path}
    asked = {}
    for split in ("validation", "test"):
        run("babilong", tasks=["qa1", "qa3"], split=split, **flags)
        asked[split] = {task: made[-1].orders[task, 0] for task in ("qa1", "qa3")}
        head = data.tokenizer.decode(made[-1].prompts["qa1", 0].head)
        assert any(head.startswith(" ".join(story.facts)) for story in trained["qa1"])
    for task in ("qa1", "qa3"):
        seen = {(story.facts, story.question) for story in trained[task]}
        of = {split: {(story.facts, story.question) for story in asked[split][task]} for split in asked}
        assert len(of["test"]) > 3 and len(of["validation"]) > 3
        assert not seen & of["test"] and not seen & of["validation"] and not of["test"] & of["validation"]


def test_prompts_have_the_facts_in_order_and_the_exact_length(data, stream):
    module, tokenizer = babilong, data.tokenizer
    shots = module.choose_shots(stories.read_stories(data.babi, "qa1", "train"), 2, np.random.default_rng(0))
    assert len({shot.answer for shot in shots}) == 2
    prompts = module.Prompts(module.Background(stream, tokenizer), tokenizer, shots)
    book = "".join(data.texts)
    for index, story in enumerate(stories.read_stories(data.babi, "qa1", "test")[:20]):
        least = prompts.least(story)
        for length in (least, least + 1, least + 100, 1000, len(stream) + 500):
            prompt = prompts.make(story, length, np.random.default_rng(index))
            assert len(prompt.tokens) == length
            assert [tokenizer.decode(prompt.tokens[a:b]) for a, b in prompt.facts] == [f" {f}" for f in story.facts]
            assert prompt.facts == sorted(prompt.facts)
            text = tokenizer.decode(prompt.tokens)
            assert text.startswith(f"{' '.join(shots[0].facts)}\nQuestion: {shots[0].question}\nAnswer: ")
            assert text.endswith(f"\nQuestion: {story.question}\nAnswer:")
            assert text.count("Question:") == 3
            outside = np.ones(length, dtype=bool)
            outside[: len(prompts.head)] = False
            for start, end in prompt.facts:
                outside[start:end] = False
                before = tokenizer.decode(prompt.tokens[:start]).removesuffix("Answer:").rstrip("\"' ")
                assert start == len(prompts.head) or before.endswith((".", "!", "?"))
            outside[len(prompt.tokens) - len(prompts.parts(story)[1]) :] = False
            background = tokenizer.decode(prompt.tokens[outside])
            assert background in book + book + book
    with pytest.raises(ValueError, match=f"takes {least} tokens: `--lengths` {least - 1} is too short"):
        prompts.make(story, least - 1, np.random.default_rng(0))


def test_sentences_end_where_a_reader_says():
    tokenizer = train_tokenizer([{"text": '“Yes.” Mr. Smith said no! "Why?" he asked. It cost 3.50.\nSo.'}] * 2, 400)
    text = 'Mr. Smith said “Yes.” It cost 3.50. "Why?" He asked!\nSo be it.'
    ids = np.array(tokenizer(text)["input_ids"])
    background = babilong.Background(ids, tokenizer)
    pieces = [tokenizer.decode(piece) for piece in np.split(ids, background.sentence_ends(ids))]
    assert pieces == ["Mr. Smith said “Yes.”", " It cost 3.50.", ' "Why?"', " He asked!", "\nSo be it."]


@pytest.mark.parametrize(
    ("output", "question", "answer", "right"),
    [
        (" kitchen", "Where is Mary?", "kitchen", True),
        (" The Kitchen. Then the garden", "Where is Mary?", "kitchen", True),
        (" kitchen\n\nJohn went to the garden", "Where is Mary?", "kitchen", True),
        ("\nkitchen", "Where is Mary?", "kitchen", True),
        (" kitchen or garden", "Where is Mary?", "kitchen", False),
        (" garden", "Where is Mary?", "kitchen", False),
        ("", "Where is Mary?", "kitchen", False),
        (" the kitchen is north of the garden", "What is north of the garden?", "kitchen", True),
        (" north of the garden", "What is north of the garden?", "kitchen", False),
    ],
)
def test_answers_are_checked_as_the_benchmark_does(output, question, answer, right):
    story = stories.Story((), question, answer, ())
    assert babilong.is_correct(output, story, ROOMS) == right


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hsa", "llama"])
def test_babilong_as_a_command(data, tmp_path, kind):
    flags = {
        "model": data.folder / kind, "babi": data.babi, "haystack": data.folder / "texts.jsonl.gz", "samples": 4,
        "lengths": [20, 300, 600], "shots": 1, "max_new_tokens": 3, "segment": 100, "device": "cpu",
    }  # fmt: skip
    run("babilong", tasks=["qa1", "qa3"], output=tmp_path, **flags)
    results = json.loads((tmp_path / "babilong.json").read_text(encoding="utf-8"))
    # No story fits into 20 tokens.
    assert [(row["task"], row["length"]) for row in results["rows"]] == [
        ("qa1", 300), ("qa3", 300), ("qa1", 600), ("qa3", 600),
    ]  # fmt: skip
    for row in results["rows"]:
        assert row["samples"] == 4
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert set(row["records"]["expected"]) <= set(ROOMS)
        assert ("recall" in row) == (kind == "hsa")
    assert results["rows"][0]["records"]["expected"] == results["rows"][2]["records"]["expected"]  # the same stories
    assert (tmp_path / "babilong.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_knows_is_right(data, tmp_path, monkeypatch):
    """One that answers with the room of the last fact about the person that the question names."""

    def answer(self, ids, *options):
        text = data.tokenizer.decode(ids[0])
        person = text.rpartition("Where is ")[2].partition("?")[0]
        room = text.rpartition(f"{person} moved to the ")[2].partition(".")[0]
        return data.tokenizer(f" {room}\n\nJohn")["input_ids"], RetrievalRecorder(None, 0)

    monkeypatch.setattr(Reader, "generate", answer)
    run(
        "babilong", model=data.folder / "llama", babi=data.babi, tasks="qa1", lengths=500,
        haystack=data.folder / "texts.jsonl.gz", samples=30, output=tmp_path, device="cpu",
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "babilong.json").read_text(encoding="utf-8"))["rows"]
    assert row["accuracy"] == 1.0


@pytest.mark.slow
def test_babilong_in_a_process_of_its_own(data, tmp_path):
    """Also with the chunk memory on the CPU, which is where it is here anyway."""
    flags = {"model": data.folder / "hsa", "babi": data.babi, "haystack": data.folder / "texts.jsonl.gz"}
    flags |= {"tasks": "qa1", "lengths": 300, "samples": 1, "device": "cpu", "output": tmp_path / "out"}
    run_it = run_example("evaluate.py", tmp_path, "babilong", "--offload", **flags)
    assert "qa1" in run_it.stdout
    assert (tmp_path / "out" / "babilong.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "qa2"}, "There is no qa2_"),
        ({"lengths": 5}, "`--lengths`: no story fits into any of them"),
    ],
)
def test_flags_that_make_no_sense_are_refused(data, tmp_path, changes, message):
    flags = {"model": data.folder / "llama", "babi": data.babi, "tasks": "qa1", "output": tmp_path, "device": "cpu"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("babilong", **{**flags, "haystack": data.folder / "texts.jsonl.gz", **changes})
