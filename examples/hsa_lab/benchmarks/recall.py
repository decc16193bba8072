"""
Does the retrieval path learn? Multi-query associative recall, far beyond the sliding window.

    python examples/benchmark.py recall --output out/recall

A sequence is a memory of key-value pairs scattered over filler tokens, a gap longer than the window, and questions: a
key, to be answered with its value. Nothing but retrieval can answer. A tiny model is trained on a task that grows,
from a few chunks up to the training length, whenever it is mastered; the same weights are then tested at 4 and 16
times that length, and once more with the output of the HSA layers switched off. Writes results.json, plots and the
model.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from tqdm import tqdm

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM

from ..commands import add_device_flag, find_device
from ..plots import draw_curves
from ..results import provenance, write_json
from ..tasks.associative_recall import CHUNK_SIZE, NUM_VALUES, VOCAB_SIZE, make_batch, make_local_batch


@torch.no_grad()
def evaluate(model, memory_chunks: int, arguments, sequences: int = 256) -> dict[str, float]:
    """Accuracy of the answers, and how often the chunk of the answer is among those the question retrieved."""
    model.eval()
    generator = torch.Generator(model.device).manual_seed(arguments.seed + 1000)
    correct = found = total = 0
    batch = max(1, min(sequences, arguments.batch_size * arguments.memory_chunks // memory_chunks // 4))
    for _ in range(-(-sequences // batch)):
        input_ids, labels, chunk = make_batch(
            batch, memory_chunks, arguments.questions, arguments.gap, model.device, generator
        )
        outputs = model(input_ids, use_cache=False, output_retrieval=True)
        answers = labels[:, 1:] != -100
        predicted = outputs.logits[:, :-1].argmax(-1)
        correct += (predicted == labels[:, 1:])[answers].sum().item()
        retrieved = outputs.retrieval[-1].indices[:, :-1, 0][answers].view(*chunk.shape, -1)
        found += (retrieved == chunk[..., None]).any(-1).sum().item()
        total += chunk.numel()
    model.train()
    return {"accuracy": correct / total, "recall": found / total, "questions": total}


def switch_off_hsa(model):
    """Makes every HSA layer retrieve nothing. Returns the hooks, to be removed to switch it on again."""
    layers = [layer for layer, is_hsa in zip(model.model.layers, model.config.hsa_layers) if is_hsa]
    return [layer.o_proj.register_forward_hook(lambda module, inputs, output: output * 0) for layer in layers]


def train(model, arguments) -> list[dict]:
    """Grows the task from `--first_chunks` to `--memory_chunks` chunks; returns the history of the training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / arguments.warmup_steps)
    )
    chunks, history = 0, []  # no memory yet: first the task inside the window
    start = time.time()
    bar = tqdm(range(1, arguments.max_steps + 1), mininterval=5)
    for step in bar:
        # Some batches stay smaller than the present size, so that what is mastered stays so.
        if chunks == 0 or step % 8 == 0:
            tokens = arguments.batch_size * arguments.memory_chunks * CHUNK_SIZE
            input_ids, labels = make_local_batch(tokens // 128, 8, model.device)
        else:
            size = chunks if step % 2 else int(torch.randint(arguments.first_chunks, chunks + 1, ()))
            batch = arguments.batch_size * arguments.memory_chunks // max(size, arguments.memory_chunks // 4)
            input_ids, labels, _ = make_batch(batch, size, arguments.questions, arguments.gap, model.device)
        outputs = model(input_ids, labels=labels, use_cache=False)
        optimizer.zero_grad(set_to_none=True)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % arguments.eval_steps == 0:
            if chunks == 0:
                answers = labels[:, 1:] != -100
                hits = (outputs.logits[:, :-1].argmax(-1) == labels[:, 1:])[answers]
                result = {"accuracy": hits.float().mean().item(), "recall": 1.0, "questions": hits.numel()}
            else:
                result = evaluate(model, chunks, arguments, 64)
            entry = {
                "step": step,
                "chunks": chunks,
                "loss": outputs.loss.item(),
                "seconds": time.time() - start,
            } | result
            history.append(entry)
            bar.set_postfix(chunks=chunks, loss=f"{entry['loss']:.3f}", accuracy=f"{entry['accuracy']:.3f}")
            if arguments.log_file:
                with arguments.log_file.open("a") as log:
                    log.write(json.dumps(entry) + "\n")
            if entry["accuracy"] >= arguments.target and chunks == arguments.memory_chunks:
                break
            if entry["accuracy"] >= arguments.grow_at:
                chunks = min(max(chunks * 2, arguments.first_chunks), arguments.memory_chunks)
        if time.time() - start > arguments.max_seconds:
            break
    return history


def plot(results: dict, folder: Path) -> None:
    """The course of the training, and accuracy by length with and without the HSA layers."""
    history, by_length = results["history"], results["by_length"]
    steps = [entry["step"] for entry in history]
    lines = {"accuracy": "accuracy", "chunk of the answer retrieved": "recall"}
    draw_curves(
        {label: (steps, [entry[name] for entry in history]) for label, name in lines.items()},
        folder / "training.png", "training", "training step (grey: the memory doubles)", "",
        [a["step"] for a, b in zip(history, history[1:]) if a["chunks"] != b["chunks"]], ylim=(0, 1.02),
    )  # fmt: skip
    tokens = [entry["tokens"] for entry in by_length]
    lines = {"HSA": "accuracy", "HSA layers off": "accuracy_hsa_off"}
    draw_curves(
        {label: (tokens, [entry[name] for entry in by_length]) for label, name in lines.items()},
        folder / "recall.png", "same weights, longer memory", "tokens (grey: longest in training)", "accuracy",
        [results["train_tokens"]], ylim=(0, 1.02), xscale="log",
    )  # fmt: skip


def make_model(arguments: Namespace) -> HSAForCausalLM:
    fields = (
        "hidden_size", "sliding_window", "chunk_topk", "chunk_landmark", "chunk_weighting", "hsa_residual",
        "landmark_norm", "initializer_range",
    )  # fmt: skip
    config = HSAConfig(
        vocab_size=VOCAB_SIZE,
        intermediate_size=2 * arguments.hidden_size,
        num_lower_layers=2,
        num_upper_layers=1,
        num_upper_groups=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        hsa_num_key_value_heads=4,
        chunk_size=CHUNK_SIZE,
        retrieval_dim=arguments.hidden_size,
        rope_parameters={"rope_type": "default", "rope_theta": arguments.rope_theta},
        **{name: getattr(arguments, name) for name in fields},
    )
    return HSAForCausalLM(config).to(find_device(arguments.device))


def measure_lengths(model: HSAForCausalLM, arguments: Namespace) -> list[dict]:
    by_length = []
    for factor in (1, 2, 4, 8, 16):
        chunks = arguments.memory_chunks * factor
        result = evaluate(model, chunks, arguments)
        hooks = switch_off_hsa(model)
        result["accuracy_hsa_off"] = evaluate(model, chunks, arguments)["accuracy"]
        for hook in hooks:
            hook.remove()
        tokens = chunks * CHUNK_SIZE + arguments.gap + 2 * arguments.questions
        by_length.append({"factor": factor, "chunks": chunks, "tokens": tokens} | result)
        print(by_length[-1])
    return by_length


class Recall:
    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("--output", type=Path, required=True, help="folder for results.json, plots and the model")
        add("--memory_chunks", type=int, default=16, help="chunks of 16 tokens in the longest training task")
        add("--first_chunks", type=int, default=4, help="chunks of the first task")
        add("--questions", type=int, default=8, help="of a sequence")
        add("--batch_size", type=int, default=64, help="sequences of the longest task; more of shorter ones")
        add("--learning_rate", type=float, default=1e-3, help="after the warm-up")
        add("--warmup_steps", type=int, default=200, help="of the learning rate")
        add("--max_steps", type=int, default=20000, help="of training")
        add("--max_seconds", type=float, default=float("inf"), help="of training")
        add("--eval_steps", type=int, default=100, help="steps between evaluations")
        add("--grow_at", type=float, default=0.9, help="accuracy at which the memory doubles")
        add("--target", type=float, default=0.99, help="accuracy at the longest task at which training ends")
        add("--seed", type=int, default=0, help="of weights and data")
        add("--log_file", type=Path, help="append the history to this file, one JSON object a line")
        add_device_flag(parser)
        add = parser.add_argument_group("model").add_argument
        add("--chunk_topk", type=int, default=4, help="chunks that a token retrieves")
        add("--chunk_weighting", default="softmax", help="softmax, stick_breaking or joint")
        add("--hsa_residual", default="bypass", help="bypass or standard")
        add("--landmark_norm", type=lambda s: s.lower() == "true", default=True, help="true or false")
        add("--chunk_landmark", default="cls", help="cls or mean")
        add("--sliding_window", type=int, default=8, help="tokens")
        add("--rope_theta", type=float, default=100.0, help="of the window attention")
        add("--hidden_size", type=int, default=128, help="width")
        add("--initializer_range", type=float, default=0.05, help="of the weights")

    def __init__(self, arguments: Namespace):
        arguments.gap = arguments.sliding_window * 4 + CHUNK_SIZE  # beyond the reach of the four stacked windows
        self.arguments = arguments

    def run(self) -> None:
        arguments = self.arguments
        torch.manual_seed(arguments.seed)
        model = make_model(arguments)
        history = train(model, arguments)
        by_length = measure_lengths(model, arguments)
        results = provenance() | {
            "device": str(model.device),
            "parameters": model.num_parameters(),
            "guessing": 1 / NUM_VALUES,
            "train_tokens": by_length[0]["tokens"],
            "seconds": history[-1]["seconds"] if history else 0.0,
            "arguments": {
                k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "output"
            },
            "by_length": by_length,
            "history": history,
        }
        write_json(arguments.output / "results.json", results)
        plot(results, arguments.output)
        model.save_pretrained(arguments.output / "model")
