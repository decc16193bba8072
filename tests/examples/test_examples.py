"""The examples do what their first lines say, run as a user runs them: as commands."""

import gzip
import importlib
import json
import math
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.synthetic_text import Fact, make_document, make_documents
from modeling_hsa import HSAForCausalLM
from tests.commands import REPOSITORY, run_example, train


BOOKS = REPOSITORY.parent / "shared" / "data" / "books"


# -- synthetic_text.py --


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


def test_text_generator_as_a_command(tmp_path):
    files = {"output": tmp_path / "new" / "text.txt", "facts_output": tmp_path / "facts.json"}
    run_example("synthetic_text.py", tmp_path, characters=3000, seed=1, facts=2, **files)
    document = make_document(1, 3000, 2)
    assert files["output"].read_text(encoding="utf-8") == document.text
    facts = json.loads(files["facts_output"].read_text(encoding="utf-8"))
    assert tuple(Fact(**fact) for fact in facts) == document.facts
    printed = run_example("synthetic_text.py", tmp_path, characters=3000, seed=1, facts=2).stdout
    assert printed == document.text


# -- train.py --


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run on generated text."""
    output = tmp_path_factory.mktemp("examples") / "model"
    train(output, eval_strategy="steps", eval_steps=10, save_strategy="steps", save_steps=10)
    return output


@pytest.mark.slow
def test_training_leaves_model_tokenizer_and_losses(trained):
    history = json.loads((trained / "loss_history.json").read_text(encoding="utf-8"))
    assert list(history["train"]) == [str(step) for step in range(1, 21)]
    assert list(history["eval"]) == ["10", "20"]
    assert history["train"]["20"] < history["train"]["1"] - 0.3
    assert history["eval"]["20"] < history["eval"]["10"]
    assert (trained / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((trained / "eval_results.json").read_text(encoding="utf-8"))
    assert results["perplexity"] == pytest.approx(math.exp(history["eval"]["20"]))

    model = AutoModelForCausalLM.from_pretrained(trained)
    assert isinstance(model, HSAForCausalLM)
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    text = "Größe: 48213 → 7.\n"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert [tokenizer.decode(token) for token in tokens if tokenizer.decode(token).isdigit()] == list("482137")


@pytest.mark.slow
def test_resumed_training_repeats_the_uninterrupted_one(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-10", tmp_path / "model" / "checkpoint-10")
    resumed = train(
        tmp_path / "model", resume_from_checkpoint="last", eval_strategy="steps", eval_steps=10, save_strategy="no"
    )
    assert resumed == json.loads((trained / "loss_history.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_training_continues_a_model_on_files(trained, tmp_path):
    """A .txt, a .jsonl and a .jsonl.gz file with the text in a column of another name, and a file to validate on."""
    texts = [document.text for document in make_documents(7, 3000, 6, 2, questions=True)]
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    lines = [json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "b.jsonl").write_text("".join(lines[1:3]), encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(lines[3:5])
    (tmp_path / "d.txt").write_text(texts[5], encoding="utf-8")

    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]
    history = train(
        tmp_path / "model", "--train_files", *files, text_column="body", validation_files=tmp_path / "d.txt",
        model=trained, max_steps=10,
    )  # fmt: skip
    first = json.loads((trained / "loss_history.json").read_text(encoding="utf-8"))["train"]
    assert history["train"]["1"] < first["10"]  # it starts from what was learned
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() > 0


@pytest.fixture
def train_module(tmp_path, monkeypatch):
    """examples/train.py as a module."""
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return importlib.import_module("train")


def test_text_comes_from_a_data_set(train_module, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"body": split, "id": 1}) + "\n", encoding="utf-8")
    arguments = train_module.DataArguments(dataset_name=str(tmp_path), text_column="body")
    texts = train_module.load_text(arguments, seed=0)
    assert {split: rows.to_list() for split, rows in texts.items()} == {
        "train": [{"text": "train"}],
        "validation": [{"text": "validation"}],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_files": ["a.txt"], "dataset_name": "b"}, "not both"),
        ({"train_files": ["a.txt", "b.csv"]}, r"must end in .txt, .jsonl or .jsonl.gz, got b.csv"),
        ({"train_files": ["text.jsonl"], "text_column": "body"}, "no column 'body', only text"),
    ],
)
def test_unusable_text_is_refused(train_module, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        train_module.load_text(train_module.DataArguments(**arguments), seed=0)


def test_every_token_of_every_document_is_in_a_block(train_module):
    """Joined by end-of-text tokens and cut; only what does not fill the last block is left out."""
    documents = [document.text for document in make_documents(0, 500, 30)]
    texts = datasets.Dataset.from_dict({"text": documents})
    tokenizer = train_module.train_tokenizer(texts, 300)
    blocks = train_module.make_blocks(texts, tokenizer, block_size=32)
    tokens = torch.cat([row["input_ids"] for row in blocks])
    expected = [token for ids in tokenizer(documents)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    assert len(expected) - 32 < len(tokens) <= len(expected)
    assert tokens.tolist() == expected[: len(tokens)]
    with pytest.raises(ValueError, match="shorter than one block of 100000 tokens"):
        train_module.make_blocks(texts, tokenizer, block_size=100_000)


@pytest.mark.slow
@pytest.mark.skipif(not BOOKS.is_dir(), reason=f"needs the books in {BOOKS}")
def test_training_and_generation_on_books(tmp_path):
    model = tmp_path / "model"
    history = train(
        model, "--train_files", str(BOOKS / "validation.jsonl.gz"), vocab_size=512, block_size=128, max_steps=30
    )
    assert history["train"]["30"] < history["train"]["1"] - 0.5

    with gzip.open(BOOKS / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        book = json.loads(file.readline())["text"][:40_000]
    prompt = tmp_path / "book.txt"
    prompt.write_text(book, encoding="utf-8")
    run = run_example("generate.py", tmp_path, model=model, prompt_file=prompt, max_new_tokens=10)
    tokens = len(AutoTokenizer.from_pretrained(model)(book)["input_ids"])
    assert tokens > 2 * 4096  # more than one segment
    assert "Reading the prompt: 100%" in run.stderr
    assert run.stdout.strip()


# -- generate.py --


@pytest.mark.slow
@pytest.mark.parametrize("with_package", [True, False], ids=["package", "code of the model"])
def test_generation_streams_what_generate_returns(trained, tmp_path, with_package):
    text = make_document(11, 1500, 2).text
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    inputs = tokenizer(text + "What is", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    tokens = AutoModelForCausalLM.from_pretrained(trained).generate(**inputs, max_new_tokens=12)[0, length:]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)

    hidden = "import runpy, sys; sys.modules.update(modeling_hsa=None, configuration_hsa=None); sys.argv.pop(0); "
    run = run_example(
        "generate.py", tmp_path,
        launcher=() if with_package else ("-c", hidden + "runpy.run_path(sys.argv[0], run_name='__main__')"),
        model=trained, prompt_file=tmp_path / "prompt.txt", prompt="What is", max_new_tokens=12,
        prefill_chunk_size=100, trust_remote_code=not with_package, device="cpu", dtype="float32",
    )  # fmt: skip
    assert run.stdout.strip() == expected.strip()
    assert "Reading the prompt: 100%" in run.stderr
    # One update a segment: the bar moves while the prompt is read.
    assert run.stderr.count("Reading the prompt:") >= math.ceil(length / 100)
    assert "maximum length" not in run.stderr  # there is none, though the model was trained on blocks of 64 tokens


@pytest.mark.slow
def test_generation_shows_the_retrieved_passages(trained, tmp_path):
    text = make_document(11, 1500, 2).text
    run = run_example(
        "generate.py", tmp_path, "--show_retrieval", "--do_sample", model=trained, prompt=text, max_new_tokens=5,
        temperature=0.7, top_p=0.9, seed=1,
    )  # fmt: skip
    _, of_prompt, of_answer = run.stdout.split("\nRetrieved by ")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(trained)
    with torch.no_grad():
        (retrieval,) = model(ids, output_retrieval=True).retrieval
    assert of_prompt.startswith("the last token of the prompt:\n  layer 1\n")
    for chunk, weight in zip(retrieval.indices[0, -1, 0].tolist(), retrieval.weights[0, -1, 0].tolist()):
        passage = " ".join(tokenizer.decode(ids[0, 16 * chunk : 16 * chunk + 16]).split())
        assert f"{weight:5.2f}  tokens {16 * chunk:,}-{16 * chunk + 15:,}: {passage}\n" in of_prompt
    assert of_answer.startswith("the generated tokens, on average:\n  layer 1\n")
    weights = [float(line.split()[0]) for line in of_answer.splitlines()[2:]]
    assert weights == sorted(weights, reverse=True)
    assert 0 < sum(weights) <= 1.01


# -- the GPU benchmarks, at the size of a toy on the CPU --


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "models"])
def test_gpu_benchmarks(tmp_path, name):
    run_example(f"benchmark_{name}.py", tmp_path, "--toy", device="cpu", output=tmp_path / "results")
    results = json.loads((tmp_path / "results" / f"{name}.json").read_text(encoding="utf-8"))
    parts = {"kernels": {"kernels", "selection", "window"}, "models": {"models", "prefill", "decode", "static"}}
    assert results.keys() == parts[name]
    for part, result in results.items():
        assert {"cpu", "torch", "transformers"} <= result["hardware"].keys()
        assert result["rows"]
        assert part == "static" or not any("error" in row for row in result["rows"]), result["rows"]


def test_chunks_of_the_kernel_benchmark(monkeypatch):
    """Distinct visible chunks, nearest first; of the second kind, most of a query's are also its predecessor's."""
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    kernels = importlib.import_module("benchmark_kernels")
    for pattern, agreement in (("random", (0.0, 0.3)), ("shared", (0.85, 0.95))):
        chunks = kernels.make_indices(pattern, 1, 4096, 2, 8)[0].transpose(0, 1)
        visible = torch.arange(4096) // kernels.CHUNK_SIZE
        assert chunks.shape == (2, 4096, 8) and (chunks < visible[:, None]).all()
        assert ((chunks >= 0).sum(-1) == visible.clamp(max=8)).all()
        assert ((chunks.diff(dim=-1) < 0) | (chunks[..., 1:] < 0)).all()
        late = chunks[:, 3000:]
        same = (late[:, 1:, :, None] == late[:, :-1, None]).any(-1).float().mean()
        assert agreement[0] <= same <= agreement[1]
