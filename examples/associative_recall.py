"""
Does the retrieval path learn? Multi-query associative recall, far beyond the sliding window.

    python examples/associative_recall.py --output out/recall

A sequence is a memory of key-value pairs scattered over filler tokens, a gap longer than the window, and questions: a
key, to be answered with its value. Nothing but retrieval can answer. A tiny model is trained on a task that grows,
from a few chunks up to the training length, whenever it is mastered; the same weights are then tested at 4 and 16
times that length, and once more with the output of the HSA layers switched off. Writes results.json, a plot and the
model.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM


NUM_KEYS, NUM_VALUES, NUM_FILLERS = 64, 64, 32
VOCAB_SIZE = NUM_KEYS + NUM_VALUES + NUM_FILLERS
CHUNK_SIZE = 16


def make_batch(batch: int, memory_chunks: int, questions: int, gap: int, device: torch.device, generator=None):
    """
    As many pairs as chunks (at most as many as there are keys) at random even places of the memory, the rest fillers;
    then `gap` fillers; then the questions.

    Returns:
        input_ids, labels (-100 except for the answers), both int64 [batch, memory_chunks * 16 + gap + 2 * questions],
        and the chunk that holds each answer, [batch, questions].
    """

    def integers(high, *shape):
        return torch.randint(high, shape, device=device, generator=generator)

    def distinct(high, count):
        return torch.rand(batch, high, device=device, generator=generator).argsort(1)[:, :count]

    pairs = min(memory_chunks, NUM_KEYS)
    fillers = NUM_KEYS + NUM_VALUES + integers(NUM_FILLERS, batch, memory_chunks * CHUNK_SIZE + gap)
    keys, values = distinct(NUM_KEYS, pairs), NUM_KEYS + integers(NUM_VALUES, batch, pairs)
    place = 2 * distinct(memory_chunks * CHUNK_SIZE // 2, pairs)
    memory = fillers.scatter(1, place, keys).scatter(1, place + 1, values)

    pair = distinct(pairs, min(questions, pairs))
    asked = torch.stack([keys.gather(1, pair), values.gather(1, pair)], dim=-1).flatten(1)
    input_ids = torch.cat([memory, asked], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, memory.shape[1] + 1 :: 2] = asked[:, 1::2]
    return input_ids, labels, place.gather(1, pair) // CHUNK_SIZE


def make_local_batch(batch: int, groups: int, device: torch.device):
    """
    The same task inside the window: groups of eight tokens, two pairs and then both keys asked in random order. It
    teaches the window layers to mark a value with the key before it, which is what the memory is later searched by.
    """
    keys = torch.rand(batch, groups, NUM_KEYS, device=device).argsort(-1)[..., :2]
    values = NUM_KEYS + torch.randint(NUM_VALUES, (batch, groups, 2), device=device)
    pairs = torch.stack([keys, values], dim=-1)
    asked = torch.where(torch.rand(batch, groups, 1, 1, device=device) < 0.5, pairs, pairs.flip(2))
    input_ids = torch.cat([pairs, asked], dim=2).flatten(1)
    labels = torch.full_like(input_ids, -100).view(batch, groups, 8)
    labels[..., 5::2] = asked[..., 1]
    return input_ids, labels.flatten(1)


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
                with Path(arguments.log_file).open("a") as log:
                    log.write(json.dumps(entry) + "\n")
            if entry["accuracy"] >= arguments.target and chunks == arguments.memory_chunks:
                break
            if entry["accuracy"] >= arguments.grow_at:
                chunks = min(max(chunks * 2, arguments.first_chunks), arguments.memory_chunks)
        if time.time() - start > arguments.max_seconds:
            break
    return history


def plot(results: dict, file: Path) -> None:
    """The course of the training, and accuracy by length with and without the HSA layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    steps = [entry["step"] for entry in results["history"]]
    left.plot(steps, [entry["accuracy"] for entry in results["history"]], label="accuracy")
    left.plot(
        steps, [entry["recall"] for entry in results["history"]], label="chunk of the answer retrieved", alpha=0.7
    )
    grown = [a["step"] for a, b in zip(results["history"], results["history"][1:]) if a["chunks"] != b["chunks"]]
    for step in grown:
        left.axvline(step, color="0.8", zorder=0)
    left.set(xlabel="training step (grey: the memory doubles)", title="training", ylim=(0, 1.02))
    left.legend(frameon=False)
    lengths = [entry["tokens"] for entry in results["by_length"]]
    right.plot(lengths, [entry["accuracy"] for entry in results["by_length"]], "o-", label="HSA")
    right.plot(lengths, [entry["accuracy_hsa_off"] for entry in results["by_length"]], "s--", label="HSA layers off")
    right.axvline(results["train_tokens"], color="0.8", zorder=0)
    right.set(xlabel="tokens (grey: longest in training)", title="same weights, longer memory", ylim=(0, 1.02))
    right.set_xscale("log", base=2)
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for results.json, recall.png and the model")
    parser.add_argument(
        "--memory_chunks", type=int, default=16, help="chunks of 16 tokens in the longest training task"
    )
    parser.add_argument("--first_chunks", type=int, default=4, help="chunks of the first task")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--chunk_topk", type=int, default=4)
    parser.add_argument("--chunk_weighting", default="softmax")
    parser.add_argument("--hsa_residual", default="bypass")
    parser.add_argument("--landmark_norm", type=lambda s: s.lower() == "true", default=True)
    parser.add_argument("--chunk_landmark", default="cls")
    parser.add_argument("--sliding_window", type=int, default=8)
    parser.add_argument("--rope_theta", type=float, default=100.0)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--initializer_range", type=float, default=0.05)
    parser.add_argument(
        "--batch_size", type=int, default=64, help="sequences of the longest task; more of shorter ones"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--max_steps", type=int, default=20000)
    parser.add_argument("--max_seconds", type=float, default=float("inf"))
    parser.add_argument("--eval_steps", type=int, default=100)
    parser.add_argument("--grow_at", type=float, default=0.9, help="accuracy at which the memory doubles")
    parser.add_argument(
        "--target", type=float, default=0.99, help="accuracy at the longest task at which training ends"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log_file", help="append the history to this file, one JSON object a line")
    arguments = parser.parse_args()
    arguments.gap = arguments.sliding_window * 4 + CHUNK_SIZE  # beyond the reach of the four stacked windows
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    config = HSAConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=arguments.hidden_size,
        intermediate_size=2 * arguments.hidden_size,
        num_lower_layers=2,
        num_upper_layers=1,
        num_upper_groups=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        hsa_num_key_value_heads=4,
        sliding_window=arguments.sliding_window,
        chunk_size=CHUNK_SIZE,
        chunk_topk=arguments.chunk_topk,
        chunk_landmark=arguments.chunk_landmark,
        chunk_weighting=arguments.chunk_weighting,
        hsa_residual=arguments.hsa_residual,
        retrieval_dim=arguments.hidden_size,
        landmark_norm=arguments.landmark_norm,
        rope_parameters={"rope_type": "default", "rope_theta": arguments.rope_theta},
        initializer_range=arguments.initializer_range,
    )
    model = HSAForCausalLM(config).to(arguments.device)
    history = train(model, arguments)

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

    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "CPU"
    results = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": model.num_parameters(),
        "guessing": 1 / NUM_VALUES,
        "train_tokens": by_length[0]["tokens"],
        "seconds": history[-1]["seconds"] if history else 0.0,
        "arguments": {k: v for k, v in vars(arguments).items() if k != "output"},
        "by_length": by_length,
        "history": history,
    }
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, output / "recall.png")
    model.save_pretrained(output / "model")


if __name__ == "__main__":
    main()
