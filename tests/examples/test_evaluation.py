"""Reading, scoring and the evaluations of retrieval and facts: scores are right, and they run as commands."""

import json
import types
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from hsa_lab import commands
from hsa_lab.evaluation.harness import Evaluation
from hsa_lab.evaluation.retrieval import ONE_NEEDLE, POOL_SEED, Paper
from hsa_lab.evaluation.wordings import Wordings
from hsa_lab.reading import CACHE, Reader, RetrievalRecorder, make_reader, retrieval_recall
from hsa_lab.results import columns, summarise, wilson
from hsa_lab.tasks.retrieval import RetrievalTasks
from hsa_lab.tokens import encode
from tests.commands import REPOSITORY
from tests.models import tiny_model

from .texts import TEXT, TOKENIZER, VOCABULARY, WORDS, make_ruler


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


# -- reading --


@pytest.mark.parametrize("segment", [0, 7, 64, 4096])
def test_reading_in_segments_equals_one_pass(any_model, segment):
    ids = torch.randint(1, 99, (2, 150))
    with torch.no_grad():
        logits = any_model(ids).logits
    reader = make_reader(any_model, segment)
    right, _ = reader.score_last(ids, 20)
    assert torch.equal(right, logits[:, -21:-1].argmax(-1) == ids[:, -20:])
    expected = torch.nn.functional.cross_entropy(logits[:, -71:-1].mT, ids[:, -70:], reduction="none")
    torch.testing.assert_close(reader.losses(ids, 70), expected, atol=1e-4, rtol=1e-4)
    tokens, _ = reader.generate(ids[:1], 8)
    whole = any_model.generate(ids[:1], max_new_tokens=8, do_sample=False)[0, 150:].tolist()
    assert tokens == whole


def test_questions_read_together_are_answered_as_alone(any_model):
    """Of prompts that share nothing, and about one text, which is read once."""
    text, longer = torch.randint(1, 99, (150,)), torch.randint(1, 99, (190,))
    asked = [torch.randint(1, 99, (n,)) for n in (5, 17, 1)]
    about_one = [torch.cat([text, question]) for question in asked]
    reader, read = make_reader(any_model, 48), []

    def count(module, args, output) -> None:
        read.append(output.last_hidden_state.shape[1])

    hook = any_model.base_model.register_forward_hook(count)
    for generate, prompts in (
        (reader.generate_on_text, about_one), (reader.generate_batch, [*about_one, longer]),
        (reader.generate_on_text, [longer]),
    ):  # fmt: skip
        read.clear()
        found = generate(prompts, 6)
        assert sum(read) <= (150 + 17 + 6 if prompts is about_one else 190 + 6)
        for prompt, (tokens, chunks) in zip(prompts, found):
            expected, recorder = reader.generate(prompt[None], 6)
            assert tokens == expected
            assert chunks is None if recorder.chunks is None else torch.equal(chunks, recorder.chunks[0])
    hook.remove()
    first = found[0][0][2]  # an answer ends where its end is said to be
    (tokens, _), *_ = reader.generate_batch([longer, text], 6, eos_token_id=first)
    assert tokens == found[0][0][: found[0][0].index(first) + 1]


def test_recorded_retrieval_is_that_of_the_scored_tokens(model):
    ids = torch.randint(1, 99, (2, 200))
    with torch.no_grad():
        layers = model(ids, output_retrieval=True).retrieval
    expected = torch.stack([layer.indices[:, -21:-1] for layer in layers], dim=2)
    for offload in (False, True):
        reader = make_reader(model, 48, offload)
        _, chunks = reader.score_last(ids, 20)
        assert torch.equal(chunks, expected)
    tokens, recorder = reader.generate(ids[:1, :-20], 5)
    chunks = recorder.chunks
    assert torch.equal(chunks[0, 0], expected[0, 0]) and chunks.shape[1] == len(tokens)
    # Of a prompt whose beginning was read before, and the weights as the model gives them.
    cache = reader.read(ids[:1, :150])
    again, recorder = reader.generate(ids[:1, :-20], 5, cache=cache)
    assert again == tokens and torch.equal(recorder.chunks, chunks)
    wanted = {}
    for layer in layers:
        for chunk, weight in zip(layer.indices[0, -21].flatten().tolist(), layer.weights[0, -21].flatten().tolist()):
            wanted[chunk] = wanted.get(chunk, 0.0) + weight / len(layers) / layer.indices.shape[2]
    assert recorder.weights(tokens=slice(0, 1)) == pytest.approx(wanted, abs=1e-5)
    assert list(recorder.weights().values()) == sorted(recorder.weights().values(), reverse=True)
    assert not model.base_model._forward_hooks and not model.base_model._forward_pre_hooks


def test_recall():
    chunks = torch.tensor([[[3, -1], [4, 4]], [[0, 1], [7, 2]]])[:, :, None]  # two tokens, two layers, K = 2
    assert retrieval_recall(chunks, [(48, 64)], 16) == [1, 0, 1]
    assert retrieval_recall(chunks, [(60, 70), (85, 90)], 16) == pytest.approx([1 / 3, 1 / 3, 2 / 3])


class Stub(torch.nn.Module):
    """A model that knows the sequences it will be given, so that its logits are right, or all but those at `wrong`."""

    def __init__(self, vocabulary: int, wrong: int | None = None):
        super().__init__()
        self.vocabulary, self.wrong, self.known, self.rows = vocabulary, wrong, [], None
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = types.SimpleNamespace(model_type="stub")

    def num_parameters(self) -> int:
        return 0

    def forward(self, input_ids, use_cache=None, logits_to_keep=0, **kwargs):
        past = kwargs[CACHE]
        if past is None:
            self.rows, self.known = self.known[: len(input_ids)], self.known[len(input_ids) :]
            past = 0
        end = past + input_ids.shape[1]
        following = torch.stack([torch.roll(row, -1)[past:end] for row in self.rows]).clone()
        if self.wrong is not None:
            following[:, torch.arange(past, end) == len(self.rows[0]) - 1 + self.wrong] = 0
        logits = torch.nn.functional.one_hot(following, self.vocabulary).float()[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=logits, **{CACHE: end})


def words_for(folders, output, command: str, *words, model: str = "hsa") -> list[str]:
    flags = ["--model", folders[model], "--output", output, "--haystack", folders["text.txt"], "--device", "cpu"]
    return [command, *map(str, (*flags, *words))]


@pytest.fixture
def build(folders, tmp_path, monkeypatch):
    """Makes an evaluation of a model, with the arguments of a command."""

    def make(model, *words):
        made = []
        monkeypatch.setattr(evaluate, "load", lambda arguments: (model, TOKENIZER))
        monkeypatch.setattr(Evaluation, "run", lambda self: made.append(self))
        evaluate.main(words_for(folders, tmp_path, *words))
        return made[0]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("task", Paper.tasks)
def test_scores_of_a_cheat_a_near_miss_and_a_guess(build, task):
    words = ("paper", "--samples", 4, "--seeds", 0, 1, "--batch_size", 3, "--segment", 200)
    for wrong, score in ((None, 1.0), (-1, 0.0), (-30, 1.0)):  # wrong about the last token; about one of the question
        model = Stub(VOCABULARY, wrong)
        protocol = build(model, *words)
        for seed in (0, 1):
            for i in range(4):
                tokens = protocol.sample(task, 600, seed, i)[0].tokens
                model.known.append(torch.from_numpy(tokens.astype(np.int64)))
        summary = summarise(protocol.records(task, 600))
        assert summary["accuracy"] == score and summary["samples"] == 8
    records = build(tiny_model(vocab_size=VOCABULARY), *words).records(task, 600)
    assert summarise(records)["accuracy"] == 0
    assert all(len(record["recall"]) == 3 for record in records)


def test_ruler_answers_are_matched(build, folders, monkeypatch):
    protocol = build(Stub(VOCABULARY), "ruler", "--words", folders["words.json"], "--samples", 2)
    protocol.generator, task = make_ruler(), "niah_multiquery"
    nothing = RetrievalRecorder(None, 0)
    for share, score in ((4, 1.0), (2, 0.5), (0, 0.0)):
        outputs = [protocol.questions(task, 2000, 0, i, 1)[0].record["expected"][:share] for i in range(2)]
        answers = iter(encode(TOKENIZER, f" they are {', '.join(x)}. And then") for x in outputs)
        monkeypatch.setattr(Reader, "generate", lambda *_, answers=answers: (next(answers), nothing))
        assert [record["score"] for record in protocol.records(task, 2000)] == [score, score]


def test_records_become_columns():
    assert columns([{"a": 1}, {"b": 0.123456}]) == {"a": [1, None], "b": [None, 0.1235]}


def test_wilson_interval():
    assert wilson(0, 0) == (0, 1)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927, by hand
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


# -- the commands --


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsa", "llama"])
@pytest.mark.parametrize("protocol", ["paper", "ruler"])
def test_protocols_from_a_folder(folders, tmp_path, capsys, name, protocol):
    lengths = (400, 512) if protocol == "paper" else (900,)
    words = ["--samples", 2, "--depths", 2, "--segment", 256, "--lengths", *lengths]
    if protocol == "ruler":
        words += ["--words", folders["words.json"], "--tasks", "niah_single_1", "vt"]
    evaluate.main(words_for(folders, tmp_path, protocol, *words, model=name))
    results = json.loads((tmp_path / f"{protocol}.json").read_text(encoding="utf-8"))
    assert {"cpu", "torch", "transformers", "python", "hsa", "device", "dtype"} <= results["hardware"].keys()
    assert "commit" in results and results["model"]["type"] == name and results["model"]["parameters"] > 0
    assert str(tmp_path.parent) not in json.dumps(results)
    assert len(results["rows"]) == (6 if protocol == "paper" else 2)
    for row in results["rows"]:
        assert row["samples"] == 2 and 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["seconds"] > 0
        assert len(row["records"]["score"]) == len(row["records"]["index"]) == 2
        assert ("recall" in row) == (name == "hsa")
        if row["task"] in ONE_NEEDLE:
            assert row["records"]["depth"] == [0, 1]
    printed = capsys.readouterr().out
    assert all(row["task"] in printed for row in results["rows"])
    map_file = "paper_s_niah.png" if protocol == "paper" else "ruler_niah_single_1.png"
    assert (tmp_path / map_file).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("right", [None, True, False])
def test_answers_to_wordings_are_matched(folders, tmp_path, monkeypatch, right):
    def say(self, ids, *options):
        """The value of the fact in the prompt, or something else."""
        text = asked[-1].record["expected"] if right else "Nothing of the kind."
        return TOKENIZER(text)["input_ids"], RetrievalRecorder(None, 0)

    def question(self, *sample):
        asked.append(make(self, *sample))
        return asked[-1]

    asked, make = [], Wordings.question
    if right is not None:
        monkeypatch.setattr(Wordings, "question", question)
        monkeypatch.setattr(Reader, "generate", say)
    evaluate.main(words_for(folders, tmp_path, "wordings", "--lengths", 300, "--samples", 2))
    rows = json.loads((tmp_path / "wordings.json").read_text())["rows"]
    assert [row["task"] for row in rows] == list(Wordings.tasks) and all(
        ("recall" in row) == (right is None) for row in rows
    )
    assert right is None or [row["accuracy"] for row in rows] == [float(right)] * 4 and rows[0]["samples"] == 2


def test_what_does_not_fit_into_memory_is_reported(folders, tmp_path, monkeypatch, capsys):
    def records(self, task, length):
        if length > 400:
            raise torch.OutOfMemoryError
        return [{"seed": 0, "index": 0, "score": 1.0, "depth": 0.5}]

    monkeypatch.setattr(Paper, "records", records)
    evaluate.main(words_for(folders, tmp_path, "paper", "--tasks", "s_niah", "--lengths", 400, 500, model="llama"))
    rows = json.loads((tmp_path / "paper.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["accuracy"] == 1 and rows[1] == {"task": "s_niah", "length": 500, "error": "out of memory"}
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paper"], "the following arguments are required: --haystack"),
        (["ruler"], "`--haystack` is needed by niah_single_2"),
        (["paper", "--tasks", "cwe"], "argument --tasks: invalid choice: 'cwe'"),
        (["ruler", "--words", "no.json", "--tasks", "cwe"], "argument --words: there is no file no.json"),
        (["paper", "--haystack", "a.csv"], "--haystack: takes .txt, .jsonl, .jsonl.gz and .npy files, got a.csv"),
        (["paper", "--haystack", "no.txt"], "argument --haystack: there is no file no.txt"),
        (["paper", "--samples", "0"], "argument --samples: must be at least 1, got 0"),
        (["paper", "--lengths", "100", "-1"], "argument --lengths: must be at least 1"),
        (["paper", "--lengths", "many"], "argument --lengths: invalid int value: 'many'"),
        (["paper", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["ruler", "--depths", "1", "--tasks", "vt"], "`--depths` must be 0 or at least 2, got 1"),
        (["paper", "--config", "chunk_topk"], "argument --config: takes NAME=VALUE, got 'chunk_topk'"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_a_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words, "--model", "m", "--output", "o"])
    with pytest.raises(SystemExit) as end:
        commands.run(evaluate.main)
    said = capsys.readouterr().err if end.value.code == 2 else end.value.code
    assert message in said.splitlines()[-1]


def test_names_are_of_another_list_than_those_of_training(build):
    """With the tokenizer of the shipped model, of which the page of results says how many they share."""
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "hub_card" / "hsa-books-10m")
    assert build(Stub(VOCABULARY), "paper", "--tasks", "s_niah").generator.pool_seed == POOL_SEED
    trained, evaluated = (
        {ids.tobytes() for ids in RetrievalTasks(tokenizer, **options).names.pool}
        for options in ({}, {"pool_seed": POOL_SEED})
    )
    said = f"{len(trained & evaluated)} of the {len(evaluated):,} names"
    text = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    assert said in " ".join(text.split())


def test_words_of_ruler_come_from_their_package(build, monkeypatch):
    pytest.importorskip("wonderwords")
    words = build(Stub(VOCABULARY), "ruler", "--tasks", "cwe").words()
    assert {kind: len(of) for kind, of in words.items()} == {"nouns": 6782, "adjectives": 912, "verbs": 1042}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the words of cwe are missing: `pip install wonderwords`, or --words"):
        build(Stub(VOCABULARY), "ruler", "--tasks", "cwe")
    assert build(Stub(VOCABULARY), "ruler", "--tasks", "vt").words() is None


def test_commands_end_quietly(monkeypatch):
    """By Ctrl-C; and what a user can mend is one line, without a traceback unless it is asked for."""
    monkeypatch.setattr("sys.argv", ["dir/ask.py"])

    def end(error: BaseException):
        def main():
            raise error

        with pytest.raises(SystemExit) as end:
            commands.run(main)
        return end.value.code

    assert end(KeyboardInterrupt()) == 130
    assert end(ValueError("two\n  lines")) == "ask.py: two lines"
    with pytest.raises(RuntimeError):
        end(RuntimeError("a fault of ours"))


def test_prompts_too_short_for_a_task_end_the_program_at_once(folders, tmp_path):
    with pytest.raises(ValueError, match="`length` must be at least"):
        evaluate.main(words_for(folders, tmp_path, "paper", "--lengths", 30, model="llama"))


def test_fields_of_the_configuration_can_be_changed(folders, tmp_path, monkeypatch):
    models, load = [], evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda arguments: models.append(load(arguments)) or models[-1])
    words = ["--tasks", "s_niah", "--lengths", 400, "--samples", 1, "--config"]
    changes = ["chunk_topk=3", "retrieval_distance_penalty=0.5", "chunk_weighting=stick_breaking"]
    evaluate.main(words_for(folders, tmp_path, "paper", *words, *changes))
    expected = {"chunk_topk": 3, "retrieval_distance_penalty": 0.5, "chunk_weighting": "stick_breaking"}
    assert {name: getattr(models[0][0].config, name) for name in expected} == expected
    assert json.loads((tmp_path / "paper.json").read_text())["arguments"]["config"] == expected
    with pytest.raises(ValueError, match=r"`--config`: a model of type 'hsa' has no field \['chunk_top'\]"):
        evaluate.main(words_for(folders, tmp_path / "other", "paper", *words, "chunk_top=3"))


def test_offloading_is_for_hsa_models(folders, tmp_path):
    with pytest.raises(ValueError, match="`--offload` is for HSA models, not for 'llama'"):
        evaluate.main(words_for(folders, tmp_path, "paper", "--offload", model="llama"))
