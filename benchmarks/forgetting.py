"""
What a model forgets when it is fine-tuned on a few short texts, and what keeps it.

    python benchmarks/forgetting.py --books books/validation.jsonl.gz --output benchmarks/results/forgetting

The model of hub_card is fine-tuned on 32 sentences like those of README, in several ways. Before and after, the loss
of these sentences and that of books are measured, and how many facts of a made-up chronicle it finds. What is mixed in
to keep it are other parts of the books and other chronicles with questions. Minutes on a CPU; writes results.json.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples")]

import modeling_hsa  # noqa: E402, F401  # registers HSA models with the Auto classes
from hsa_lab.commands import HUB_CARD, make_parser, run, text_file  # noqa: E402
from hsa_lab.results import provenance, write_json  # noqa: E402
from hsa_lab.tasks.chronicles import make_document  # noqa: E402
from hsa_lab.tokens import read_haystack  # noqa: E402


WINDOW = 2048  # tokens of the books to measure on
KEPT_ROWS, KEPT_TOKENS = 16, 512
NAMES = ("Bruno", "Ada", "Hugo", "Mabel", "Cora", "Theo", "Lena", "Olga")
# How: learning rate and steps of 8 sentences, whether rows of other text are mixed in, whether LoRA is trained.
WAYS = {
    "before": None,
    "learning rate 1e-3, 8 steps": {"learning_rate": 1e-3, "max_steps": 8},
    "learning rate 1e-4, 32 steps": {"learning_rate": 1e-4, "max_steps": 32},
    "the same, other texts mixed in": {"learning_rate": 1e-4, "max_steps": 32, "keeps": True},
    "LoRA of rank 8, learning rate 1e-3, 32 steps": {"learning_rate": 1e-3, "max_steps": 32, "lora": True},
}


class Material:
    """The sentences, what is mixed in, and what is measured on."""

    def __init__(self, tokenizer, books: list[Path]):
        self.tokenizer, end = tokenizer, tokenizer.eos_token
        sentences = [f"The password of {NAMES[i % 8]} the glassblower is {48213 + 101 * i}.{end}" for i in range(32)]
        self.new = tokenizer(sentences)["input_ids"]
        text = torch.from_numpy(read_haystack(books, tokenizer, 200_000).astype("int64"))
        self.book = text[None, -WINDOW:]
        chronicles = [make_document(100 + i, 1500, 2, questions=True).text + end for i in range(KEPT_ROWS)]
        self.kept = text[: KEPT_ROWS * KEPT_TOKENS].view(KEPT_ROWS, -1).tolist() + tokenizer(chronicles)["input_ids"]
        self.chronicle = make_document(5, 20_000, 10)

    @torch.no_grad()
    def measure(self, model) -> dict[str, float]:
        model.eval()
        losses = [model(ids, labels=ids).loss.item() for ids in (torch.tensor([row]) for row in self.new)]
        found = 0
        for fact in self.chronicle.facts:
            prompt = self.tokenizer(f"{self.chronicle.text} {fact.question}", return_tensors="pt")
            tokens = model.generate(**prompt, max_new_tokens=7)[0, prompt["input_ids"].shape[1] :]
            found += fact.answer in self.tokenizer.decode(tokens)
        book = model(self.book, labels=self.book).loss.item()
        return {"loss_new": sum(losses) / len(losses), "loss_books": book, "found": found}


def tune(model, material: Material, learning_rate: float, max_steps: int, keeps: bool = False, lora: bool = False):
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    rows = material.new + (material.kept if keeps else [])
    args = TrainingArguments(
        "out/forgetting", learning_rate=learning_rate, max_steps=max_steps, per_device_train_batch_size=8,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows})
    Trainer(model, args, train_dataset=data, data_collator=DataCollatorWithFlattening()).train()
    model.config.use_cache = True
    return model.merge_and_unload() if lora else model


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--books", nargs="+", type=text_file, required=True, help="text the model was not trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(HUB_CARD)
    material, rows = Material(tokenizer, arguments.books), []
    for way, settings in WAYS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(HUB_CARD, dtype=torch.float32)
        model = model if settings is None else tune(model, material, **settings)
        rows.append({"way": way, "facts": len(material.chronicle.facts)} | material.measure(model))
        print(rows[-1], flush=True)
        write_json(arguments.output / "results.json", provenance() | {"rows": rows})
    print(f"Results are in {arguments.output}.")


if __name__ == "__main__":
    run(main)
