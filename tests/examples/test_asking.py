"""`ask.py` and `generate.py` with chat models: prompts, streaming, "not found", the default model and its text."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hsa_lab import built
from hsa_lab.asking import LEAST_CONFIDENCE, AnswerStreamer, Asker, Reply, WholeCharacters
from hsa_lab.chat_rows.evaluation import is_refusal
from hsa_lab.chat_rows.office import make_office
from hsa_lab.commands import HUB_CARD
from hsa_lab.evaluation.found import choose, decisions
from hsa_lab.reading import RetrievalRecorder
from modeling_hsa import convert_to_hsa
from tests.commands import REPOSITORY, run_example

from .test_chat_evaluation import HSA
from .texts import chat_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return convert_to_hsa(tiny_llama(len(tokenizer)), **HSA).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, model) -> Path:
    path = tmp_path_factory.mktemp("chat_model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# -- asking --


def test_a_question_is_asked_in_the_chat_template(model, tokenizer):
    asker, text, question = Asker(model, tokenizer), "The rent is 780 euros. " * 20, "How much is the rent?"
    document = asker.encode(text)
    cache = asker.reader.read(document)
    reply = asker.ask(document, cache, question, 6)
    message = [{"role": "user", "content": f"{text}\n\n{question}"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    end = int(asker.chat.end[0])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    assert reply.tokens == expected[0, ids.shape[1] :].tolist()
    logits = model(expected).logits[0, ids.shape[1] - 1 : -1].softmax(-1)
    assert reply.probabilities == pytest.approx(logits.max(-1).values.tolist(), rel=1e-3)
    assert reply.confidence == min(reply.probabilities) and reply.recorder.weights()
    assert cache.get_seq_length() == document.shape[1]  # further questions go on from the text alone


@pytest.mark.parametrize(
    ("text", "probability", "is_chat", "found"),
    [
        ("The rent is 780 euros.", 0.9, True, True),
        ("The rent is 780 euros.", LEAST_CONFIDENCE / 2, True, False),
        ("The rent is 780 euros.", LEAST_CONFIDENCE / 2, False, True),
        ("The text does not say what the rent is.", 0.9, True, False),
        ("No, the contract says that dogs are forbidden.", 0.9, True, True),
    ],
)
def test_an_answer_is_believed_or_not(text, probability, is_chat, found):
    reply = Reply(text, [1, 2], [0.99, probability], RetrievalRecorder(None, 0), is_chat)
    assert (reply.why_not_found is None) == found


def test_codes_are_no_refusals():
    assert not is_refusal('The sensor "T-472" gives up after 462 ms.')
    assert is_refusal("The text doesn't say.")


def streamed(streamer, tokenizer, text: str, cut: int, capsys) -> str:
    """What is printed of `text` without its last `cut` bytes, a token a byte."""
    ids = [[byte] for byte in text.encode()]
    tokenizer = SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode(errors="replace"))
    streamer.tokenizer = tokenizer
    streamer.put(torch.tensor([1, 2]))  # the prompt
    for token in ids[: len(ids) - cut]:
        streamer.put(torch.tensor(token))
    streamer.end()
    return capsys.readouterr().out


def test_characters_that_are_cut_are_not_shown(tokenizer, capsys):
    assert streamed(WholeCharacters(tokenizer), tokenizer, "so sch\u00f6n \u20ac", 1, capsys) == "so sch\u00f6n \n"
    assert streamed(AnswerStreamer(tokenizer, ""), tokenizer, " 5 \u20ac", 1, capsys) == "5 "
    assert streamed(AnswerStreamer(tokenizer, "."), tokenizer, " It is 5 \u20ac.", 0, capsys) == "It is 5 \u20ac"


# -- the default model --


def test_the_chat_model_is_built_once(tmp_path, monkeypatch):
    calls = []

    def build(command, **_):
        calls.append(command)
        Path(command[-1]).mkdir()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(built, "BUILT", tmp_path / "cache")
    monkeypatch.setattr(built, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(subprocess, "run", build)
    first, again = built.default_model(), built.default_model()
    assert first == again and Path(first).parent == tmp_path / "cache" and Path(first).is_dir()
    assert len(calls) == 1 and calls[0][2] == built.CHAT_MODEL.name


@pytest.mark.parametrize("offline", [True, False])
def test_where_it_cannot_be_built_the_small_model_answers(tmp_path, monkeypatch, capsys, offline):
    failed = SimpleNamespace(returncode=2, stderr="usage: build.py\nbuild.py: error: no network\n")
    monkeypatch.setattr(built, "BUILT", tmp_path / "cache")
    monkeypatch.setattr(built, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert built.default_model() == str(HUB_CARD)
    reason = "HF_HUB_OFFLINE is set" if offline else "no network"
    assert capsys.readouterr().err.splitlines()[-1].endswith(reason)


# -- the default text --


def test_the_default_text_has_what_is_asked_for():
    text, asked = make_office(3, 40_000, 10)
    assert make_office(3, 40_000, 10) == (text, asked) and make_office(4, 40_000, 10) != (text, asked)
    assert 30_000 < len(text) < 50_000 and len(asked) == 10
    told = [question for question in asked if question.expected]
    assert len(told) == 8 and len({question.text for question in asked}) == 10
    # What a function does is said in other words.
    assert sum(all(value in text for value in question.expected) for question in told) >= 6
    with pytest.raises(ValueError, match="A text of 400 characters is too short for 10 questions"):
        make_office(3, 400, 10)


# -- when to believe an answer --


def test_the_threshold_is_that_of_most_right_decisions():
    def record(confidence, right, kind="facts", said=False):
        return {"kind": kind, "said": said, "confidence": confidence, "right": right, "source": None}

    records = [record(0.9, 1.0), record(0.5, 1.0), record(0.2, 0.0), record(0.3, 0.0, "missing")]
    records += [record(0.9, 0.0, "missing", said=True)]
    assert 0.3 < choose(records) <= 0.5
    assert decisions(records, 0.4) == {
        "decided": 1.0, "not_found_answered": 1 / 3, "not_found_missing": 1.0, "right_believed": 1.0,
        "source_believed": None,
    }  # fmt: skip
    assert decisions(records, 0.0)["decided"] == 3 / 5


def test_the_threshold_is_the_measured_one():
    """And what `docs/use.md` says of it is what was measured."""
    results = json.loads((REPOSITORY / "benchmarks/results/ask/found.json").read_text(encoding="utf-8"))
    chosen, measured = results["rows"]
    assert LEAST_CONFIDENCE == results["threshold"] == choose(_records(chosen))
    text = " ".join((REPOSITORY / "docs" / "use.md").read_text(encoding="utf-8").split())
    shares = decisions(_records(measured), LEAST_CONFIDENCE)
    assert f"{100 * shares['decided']:.0f} % of the decisions are right" in text
    told = [f"{100 * shares[name]:.0f} %" for name in ("not_found_missing", "not_found_answered", "right_believed")]
    assert f'"not found" is said of {told[0]} of what the text does not tell and of {told[1]} of what' in text
    assert f"of the answers that are believed {told[2]} are right" in text


def _records(row: dict) -> list[dict]:
    return [dict(zip(row["records"], values)) for values in zip(*row["records"].values())]


# -- the commands --


@pytest.mark.slow
def test_commands_with_a_chat_model(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("The rent is 780 euros. " * 30)
    asked = run_example(
        "ask.py", tmp_path, "--question", "How much?", model=folder, document=tmp_path / "notes.txt", max_new_tokens=5
    )
    assert "\nHow much?\n-> " in asked.stdout
    made = run_example("ask.py", tmp_path, model=folder, characters=8000, facts=4, max_new_tokens=2)
    assert "Made-up minutes" in made.stdout and "of 4 right." in made.stdout
    texts = [
        run_example("generate.py", tmp_path, model=folder, prompt="How much?", chat=chat, max_new_tokens=5).stdout
        for chat in ("auto", "yes", "no")
    ]
    assert texts[0] == texts[1] != texts[2]
