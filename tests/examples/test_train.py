"""`train.py` and `generate.py` do what their first lines say, run as a user runs them: as commands."""

import gzip
import json
import math
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsa_lab.corpus import train_tokenizer
from hsa_lab.tasks.chronicles import make_document, make_documents
from hsa_lab.training import text
from modeling_hsa import HSAForCausalLM
from tests.commands import REPOSITORY, run_example, train


BOOKS = REPOSITORY.parent / "shared" / "data" / "books"


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
    whole = json.loads((trained / "loss_history.json").read_text(encoding="utf-8"))
    assert {name: resumed[name] for name in ("train", "eval")} == {name: whole[name] for name in ("train", "eval")}


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
def cache(tmp_path, monkeypatch):
    """A cache of `datasets` of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_text_comes_from_a_data_set(cache, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"body": split, "id": 1}) + "\n", encoding="utf-8")
    arguments = text.DataArguments(dataset_name=str(tmp_path), text_column="body")
    texts = text.load_text(arguments, seed=0)
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
def test_unusable_text_is_refused(cache, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        text.load_text(text.DataArguments(**arguments), seed=0)


def test_every_token_of_every_document_is_in_a_block(cache):
    """Joined by end-of-text tokens and cut; only what does not fill the last block is left out."""
    documents = [document.text for document in make_documents(0, 500, 30)]
    texts = datasets.Dataset.from_dict({"text": documents})
    tokenizer = train_tokenizer(texts, 300)
    blocks = text.make_blocks(texts, tokenizer, block_size=32)
    tokens = torch.cat([row["input_ids"] for row in blocks])
    expected = [token for ids in tokenizer(documents)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    assert len(expected) - 32 < len(tokens) <= len(expected)
    assert tokens.tolist() == expected[: len(tokens)]
    with pytest.raises(ValueError, match="shorter than one block of 100000 tokens"):
        text.make_blocks(texts, tokenizer, block_size=100_000)


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
    document = make_document(11, 1500, 2).text
    (tmp_path / "prompt.txt").write_text(document, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    inputs = tokenizer(document + "What is", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    tokens = AutoModelForCausalLM.from_pretrained(trained).generate(**inputs, max_new_tokens=12)[0, length:]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)

    hidden = "import runpy, sys; sys.modules.update(modeling_hsa=None, configuration_hsa=None); sys.argv.pop(0); "
    hidden += "sys.path[0] = sys.argv[0].rpartition('/')[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    run = run_example(
        "generate.py", tmp_path, *([] if with_package else ["--trust_remote_code"]),
        launcher=() if with_package else ("-c", hidden),
        model=trained, prompt_file=tmp_path / "prompt.txt", prompt="What is", max_new_tokens=12,
        prefill_chunk_size=100, device="cpu", dtype="float32",
    )  # fmt: skip
    assert run.stdout.strip() == expected.strip()
    assert "Reading the prompt: 100%" in run.stderr
    # One update a segment: the bar moves while the prompt is read.
    assert run.stderr.count("Reading the prompt:") >= math.ceil(length / 100)
    assert "maximum length" not in run.stderr  # there is none, though the model was trained on blocks of 64 tokens


@pytest.mark.slow
def test_generation_shows_the_retrieved_passages(trained, tmp_path):
    document = make_document(11, 1500, 2).text
    run = run_example(
        "generate.py", tmp_path, "--show_retrieval", "--do_sample", model=trained, prompt=document, max_new_tokens=5,
        temperature=0.7, top_p=0.9, seed=1,
    )  # fmt: skip
    _, of_prompt, of_answer = run.stdout.split("\nRetrieved by ")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(document, return_tensors="pt")["input_ids"]
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
