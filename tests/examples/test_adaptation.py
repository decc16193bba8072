"""`adapt.py`: what its losses are, what its batches hold, and that a run that was stopped goes on the same."""

import json
import signal
from pathlib import Path

import adapt
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsa_lab.adaptation.batches import FAMILIES, Batches, Tokens
from hsa_lab.adaptation.chats import sample_chats
from hsa_lab.adaptation.losses import retrieval_loss, token_losses
from hsa_lab.adaptation.low_rank import (
    LowRankLinear,
    add_low_rank,
    freeze_base,
    load_adapter,
    merged_weights,
    save_adapter,
)
from hsa_lab.adaptation.recipe import rate_at, read_recipe
from hsa_lab.adaptation.run import Run
from hsa_lab.adaptation.student import Student, Teacher
from hsa_lab.chat_rows.mixture import Materials
from hsa_lab.chat_rows.rows import ANSWER
from hsa_lab.tasks.chronicles import make_document
from hsa_lab.tokens import encode_chats
from modeling_hsa import convert_to_hsa, new_parameters
from modeling_hsa.retrieval import ChunkRetrieval
from tests.commands import REPOSITORY

from .texts import chat_tokenizer, tiny_llama


RECIPE = {
    "model": {"placement": [1, 2], "sliding_window": 64, "chunk_topk": 4, "chunk_size": 16, "retrieval_dim": 16},
    "train": {"base": "lora", "rank": 2, "alpha": 4},
    "optimizer": {
        "muon_learning_rate": 0.01, "learning_rate": 0.01, "weight_decay": 0.0, "warmup": 0.1, "decay": 0.5,
    },
    "losses": {
        "answers": 1.0, "value_weight": 2.0, "text": 0.5, "distill_text": 0.25, "distill_chat": 0.75, "retrieval": 0.3,
    },
    "sampled": {"text": 0.5, "distill": 0.5},
    "stages": [
        {
            "name": "short", "length": 384, "batch_tokens": 1536, "tokens": 4608, "chunk_topk": 24,
            "families": {"facts": 0.5, "ruler": 0.1, "text": 0.2, "chat": 0.2}, "questions": {"256": 3},
        },
        {
            "name": "long", "length": 512, "batch_tokens": 1024, "tokens": 2048, "sliding_window": 32,
            "families": {"facts": 0.5, "chat": 0.5}, "questions": {"256": 3},
        },
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny chat model in "base", books in "streams", chats, and the recipe."""
    folder = tmp_path_factory.mktemp("adaptation")
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "base")
    (folder / "streams").mkdir()
    for number, split in enumerate(("train", "validation")):
        ids = tokenizer(make_document(number + 1, 40_000).text, add_special_tokens=False)["input_ids"]
        np.save(folder / "streams" / f"books-{split}.npy", np.array(ids, np.uint16))
    chats = [{"prompt": f"What is {i}?", "answer": f"{i} is a number, the one after {i - 1}."} for i in range(20)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture(scope="module")
def materials(folder) -> Materials:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return Materials.load(tokenizer, folder / "streams", "train", chats=folder / "chats.jsonl")


def train(folder: Path, output: Path, *more: str) -> None:
    flags = {"recipe": "recipe.json", "base": "base", "streams": "streams", "chats": "chats.jsonl"}
    words = [word for name, file in flags.items() for word in (f"--{name}", str(folder / file))]
    adapt.main([
        "train", *words, "--output", str(output), "--device", "cpu", "--workers", "0", "--log_every", "1",
        "--logits_at_once", "32", *more,
    ])  # fmt: skip


# -- batches --


def test_a_batch_says_where_its_tokens_are_and_what_they_count(materials):
    data = Batches(materials, RECIPE, 0, 4, 0, 16, 32)
    assert (data.taught, data.asked) == (2, 2)
    batch = next(batch for batch in map(data.__getitem__, range(20)) if len(batch.families) >= 4)
    flat, losses = batch.ids.flatten(), RECIPE["losses"]
    turns = len(batch.families)
    assert batch.ids.shape == (4, 384) and turns >= 4 and set(batch.families.tolist()) <= set(range(len(FAMILIES)))
    for tokens, rows in ((batch.asked, (2, 4)), (batch.plain, (0, 2))):
        real = tokens.label < turns + 2
        assert len(tokens.place) % 32 == 0 and not tokens.weight[~real].any() and not tokens.taught[~real].any()
        assert torch.equal(flat[tokens.place + 1][real], tokens.target[real])
        row = tokens.place[real] // 384
        assert rows[0] <= row.min() and row.max() < rows[1]
    text = torch.cat([x.weight[x.label == turns] for x in (batch.asked, batch.plain)])
    torch.testing.assert_close(text.sum().item(), losses["text"], atol=1e-5, rtol=0)
    answers_weight = batch.asked.weight[batch.asked.label < turns]
    torch.testing.assert_close(answers_weight.sum().item(), losses["answers"], atol=1e-5, rtol=0)
    torch.testing.assert_close(answers_weight.max() / answers_weight.min(), torch.tensor(2.0))
    for label, name in ((turns, "distill_text"), (turns + 1, "distill_chat")):
        taught = batch.plain.taught[batch.plain.label == label].sum().item()
        assert taught == pytest.approx(losses[name], abs=1e-5) or taught == 0
    assert batch.asked.taught.sum() == 0  # what is hidden is never learned from the base


def test_evidence_is_complete_chunks_of_the_same_row_that_hold_what_is_asked_for(materials):
    data = Batches(materials, RECIPE | {"losses": RECIPE["losses"]}, 0, 8, 0, 16, 32)
    decode = materials.builder.tokenizer.decode
    seen = 0
    for number in range(4):
        batch = data[number]
        for place, chunks in zip(batch.seekers.tolist(), batch.evidence.tolist()):
            row, token = divmod(place, 384)
            wanted = [chunk for chunk in chunks if chunk >= 0]
            assert wanted and row >= data.taught and all((chunk + 1) * 16 <= token for chunk in wanted)
            target = batch.ids[row, token + 1].item()
            around = " ".join(decode(batch.ids[row, 16 * chunk : 16 * chunk + 16]) for chunk in wanted)
            seen += decode([target]).strip() in around
        assert len(batch.seekers)
    assert seen > 30


def test_a_batch_depends_on_its_number_alone(materials):
    data = Batches(materials, RECIPE, 0, 4, 0, 16, 32)
    first, again, other = data[2], Batches(materials, RECIPE, 0, 4, 0, 16, 32)[2], data[1]
    assert torch.equal(first.ids, again.ids) and torch.equal(first.asked.place, again.asked.place)
    assert not torch.equal(first.ids, other.ids)
    assert not torch.equal(first.ids, Batches(materials, RECIPE, 0, 4, 1, 16, 32)[2].ids)


def test_chat_rows_are_learned_from_the_base_alone(materials):
    recipe = RECIPE | {"stages": [RECIPE["stages"][0] | {"families": {"chat": 1.0}}]}
    data = Batches(materials, recipe, 0, 2, 0, 16, 32)
    batch = data[0]
    assert data.asked == 0 and len(batch.asked.place) == 0 and len(batch.seekers) == 0
    assert batch.plain.weight.sum() == 0 and batch.plain.taught.sum().item() == pytest.approx(0.75, abs=1e-5)
    rows = [materials.builder.chat_row(materials.conversations, 384, __import__("random").Random(0))]
    assert (rows[0].roles >= ANSWER).any()


# -- losses --


def test_token_losses_are_those_of_all_logits_with_their_gradients():
    torch.manual_seed(0)
    hidden, teacher = torch.randn(12, 8, requires_grad=True), torch.randn(12, 8)
    head, teacher_head = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8)
    target, weight, taught = torch.randint(0, 20, (12,)), torch.rand(12), torch.rand(12)
    tokens = Tokens(torch.arange(12), target, weight, taught, torch.zeros(12, dtype=torch.int64))
    log_p, log_t = (hidden @ head.T).log_softmax(-1), (teacher @ teacher_head.T).log_softmax(-1)
    entropy = torch.nn.functional.nll_loss(log_p, target, reduction="none")
    divergence = torch.nn.functional.kl_div(log_p, log_t, log_target=True, reduction="none").sum(-1)
    expected = (entropy * weight).sum() + (divergence * taught).sum()
    found = token_losses(hidden, head, tokens, teacher, teacher_head, at_once=4)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.entropy, entropy.detach())
    torch.testing.assert_close(found.divergence, divergence.detach())
    assert torch.equal(found.right, log_p.argmax(-1) == target)
    wanted = torch.autograd.grad(3 * expected, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(3 * found.loss, (hidden, head)), wanted)


def test_without_a_teacher_and_without_tokens():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8)
    tokens = Tokens(torch.arange(4), torch.arange(4), torch.ones(4), torch.zeros(4), torch.zeros(4))
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, torch.arange(4), reduction="sum")
    torch.testing.assert_close(token_losses(hidden, head, tokens, at_once=4).loss, expected)
    nothing = token_losses(hidden[:0], head, Tokens(*(x[:0] for x in tokens)))
    assert nothing.loss.item() == 0 and nothing.right.shape == (0,)


def test_retrieval_loss_counts_all_chunks_with_evidence():
    indices = torch.tensor([[[[3, 2, 1]], [[3, 2, 0]], [[5, 4, 3]]]], dtype=torch.int32)  # [1, 3, 1, 3]
    weights = torch.tensor([[[[0.5, 0.3, 0.2]], [[0.6, 0.3, 0.1]], [[1.0, 0.0, 0.0]]]])
    layer = ChunkRetrieval(indices, weights, weights)
    seekers, evidence = torch.tensor([0, 1, 2]), torch.tensor([[3, 1], [0, -2], [9, -2]])
    found = retrieval_loss([layer], seekers, evidence)
    torch.testing.assert_close(found.loss, -(torch.tensor([0.7, 0.1]).log().mean()))  # the third was not retrieved
    torch.testing.assert_close(found.recall, torch.tensor([2 / 3]))
    torch.testing.assert_close(found.weight, torch.tensor([0.8 / 3]))
    none = retrieval_loss([layer], seekers[:0], evidence[:0])
    assert none.loss.item() == 0 and none.recall.tolist() == [0.0]


def test_a_student_that_sees_everything_starts_as_its_teacher(folder, materials):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = convert_to_hsa(base, **RECIPE["model"] | {"sliding_window": 512})
    data, teacher = Batches(materials, RECIPE, 0, 4, 0, 16, 32), Teacher(base)
    batch = data[0]
    outcome = Student(model, 0.3, 32)(batch, teacher(batch, data.taught), teacher.head)
    known = batch.plain.label <= len(batch.families) + 1
    torch.testing.assert_close(outcome.plain.divergence[known], torch.zeros(known.sum()), atol=1e-5, rtol=0)
    logits = base(batch.ids).logits.flatten(0, 1)[batch.asked.place]
    expected = torch.nn.functional.cross_entropy(logits, batch.asked.target, reduction="none")
    torch.testing.assert_close(outcome.asked.entropy, expected, atol=1e-4, rtol=1e-4)
    total = outcome.asked.loss + outcome.plain.loss + 0.3 * outcome.retrieval.loss
    torch.testing.assert_close(outcome.loss, total)


# -- low-rank changes --


def test_low_rank_changes_are_those_of_peft(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = convert_to_hsa(base, **RECIPE["model"])
    plain = convert_to_hsa(base, **RECIPE["model"])
    plain.load_state_dict(model.state_dict())
    freeze_base(model)
    add_low_rank(model, 2, 4)
    new = set(new_parameters(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == new | {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }
    changed = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(changed) == 7 * 3  # every matrix of the three layers of the base, and none that is new
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    ids = torch.randint(0, 900, (2, 200))
    expected = model(ids).logits
    merged = type(plain)(plain.config)
    merged.load_state_dict(merged_weights(model, torch.float32))
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    save_adapter(model, tmp_path, "base", torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="low-rank"):
        save_adapter(merged, tmp_path, "base", torch.float32)

    again = convert_to_hsa(base, **RECIPE["model"])
    add_low_rank(again, 2, 4)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)
    other = convert_to_hsa(base, **RECIPE["model"])
    add_low_rank(other, 3, 4)
    with pytest.raises(ValueError, match="`--adapter`: .* another shape"):
        load_adapter(other, tmp_path)


def test_a_run_can_begin_with_the_adapter_of_another(folder, run, tmp_path):
    """Without a step that changes anything, it ends with the model that the other run ended with."""
    recipe = RECIPE | {"optimizer": {**RECIPE["optimizer"], "muon_learning_rate": 0.0, "learning_rate": 0.0}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    train(folder, tmp_path / "run", "--recipe", str(tmp_path / "recipe.json"), "--adapter", str(run / "adapter"))
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6)


# -- recipes --


def test_learning_rates_rise_stay_and_fall():
    settings = {"warmup": 0.1, "decay": 0.5}
    rates = [rate_at(settings, x) for x in (0.0, 0.05, 0.3, 0.75, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "examples/recipes/adaptation").glob("*.json")), ids=lambda x: x.name
)
def test_recipes_are_whole(file):
    recipe = read_recipe(file)
    assert max(stage["length"] for stage in recipe["stages"]) <= 4096


def test_recipes_are_refused_by_the_name_of_what_is_wrong(tmp_path):
    file = tmp_path / "recipe.json"
    for changed, message in (
        (RECIPE | {"losses": {"answers": 1.0}}, "`losses` lacks .*'text'"),
        (RECIPE | {"stages": [RECIPE["stages"][0] | {"chunk_size": 3}]}, "`stage` does not take .*'chunk_size'"),
        (RECIPE | {"train": {"base": "some", "rank": 1, "alpha": 1}}, "train.base"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            read_recipe(file)


# -- runs --


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(folder, output)
    return output


def test_a_run_trains_logs_and_saves(folder, run):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(e["stage"], e["batch"]) for e in log] == [
        ("short", 1),
        ("short", 2),
        ("short", 3),
        ("long", 1),
        ("long", 2),
    ]
    assert log[-1]["tokens"] == 4608 + 2048 and log[-1]["learning_rate"] < log[1]["learning_rate"] == 1.0
    assert {"text_loss", "all", "recall", "weight", "tokens_per_second"} <= log[0].keys() and "distill_chat" in log[-1]
    assert log[0]["recall"] == [1.0, 1.0]  # while `chunk_topk` covers everything
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert (model.config.sliding_window, model.config.chunk_topk) == (32, 4)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    converted = convert_to_hsa(base, **RECIPE["model"] | {"sliding_window": 32})
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)
    adapted = PeftModel.from_pretrained(converted, run / "adapter")
    ids = torch.randint(0, 900, (1, 100))
    torch.testing.assert_close(adapted(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


def test_a_run_that_was_stopped_goes_on_the_same(folder, run, tmp_path):
    train(folder, tmp_path, "--max_seconds", "0")
    state = json.loads((next(tmp_path.glob("checkpoint-*")) / "state.json").read_text())
    assert (state["stage"], state["batch"], state["tokens"]) == (0, 1, 1536)
    with pytest.raises(ValueError, match="--resume"):
        train(folder, tmp_path)
    with pytest.raises(ValueError, match="`seed` 0, not 1"):
        train(folder, tmp_path, "--resume", "--seed", "1")
    for _ in range(3):
        train(folder, tmp_path, "--resume", "--max_seconds", "0")
    train(folder, tmp_path, "--resume")
    ours, theirs = (load_file(x / "model" / "model.safetensors") for x in (tmp_path, run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [(x / "log.jsonl").read_text().splitlines() for x in (tmp_path, run)]
    whole, expected = ([json.loads(line)["all"] for line in log] for log in lines)
    assert whole == expected


def test_a_run_that_was_killed_goes_on_from_what_it_saved_on_the_way(folder, run, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def step(self, *args):
        if self.state["stage"] == 1:
            raise Killed
        return steps(self, *args)

    steps = Run.step
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Run, "step", step)
        train(folder, tmp_path, "--save_minutes", "0")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (file,) = tmp_path.glob("checkpoint-*/state.json")
    assert json.loads(file.read_text())["batch"] == 3
    train(folder, tmp_path, "--resume")
    ours, theirs = (load_file(x / "model" / "model.safetensors") for x in (tmp_path, run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("base", ["all", "none"])
def test_what_is_trained_is_up_to_the_recipe(folder, tmp_path, base):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | {"train": {"base": base, "rank": 0, "alpha": 0}}))
    train(folder, tmp_path / "out", "--recipe", str(tmp_path / "recipe.json"), "--max_seconds", "0")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    before = load_file(folder / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name], before[name]) == (base == "none")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"]) == (base == "none")
    assert not (tmp_path / "out" / "adapter").exists()


# -- chats --


class Parrot:
    """Says what it is told to, one after another."""

    device = torch.device("cpu")

    def __init__(self, says: list[list[list[int]]]):
        self.says, self.prompts = says, []

    def generate(self, prompt, max_new_tokens, **options):
        self.prompts.append((prompt, options["attention_mask"]))
        rows = [(row + [1] * max_new_tokens)[:max_new_tokens] for row in self.says.pop(0)]
        return torch.cat([prompt, torch.tensor(rows)], dim=1)


def test_chats_are_sampled_from_the_beginning_of_a_turn(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    questions = [
        encode("Who are you?"),
        encode("Who are you?"),
        encode("a") * 40,
    ]  # twice the same, and an endless one
    parrot = Parrot([questions, [encode("A parrot.")], [encode("Why?")] * 3, [encode("So.")]])
    found = list(sample_chats(parrot, tokenizer, 2, 3, 20, 10, 0))
    assert found == [{"prompt": "Who are you?", "answer": "A parrot."}, {"prompt": "Why?", "answer": "So."}]
    assert tokenizer.decode(parrot.prompts[0][0][0]) == "<|im_start|>user\n"
    assert tokenizer.decode(parrot.prompts[1][0][0]).endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")


def test_chats_of_different_lengths_end_together(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "What is the highest mountain of Wales, please?")]
    inputs = encode_chats(tokenizer, chats)
    alone = [encode_chats(tokenizer, [chat])["input_ids"][0].tolist() for chat in chats]
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"][0, 0]
    assert [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])] == alone
    assert alone[0] == tokenizer.apply_chat_template(chats[0], add_generation_prompt=True)["input_ids"]
