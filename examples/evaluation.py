"""
What the evaluations of long contexts share: flags, models, haystacks, prompts of millions of tokens, scores, results.

A prompt is read in segments into the model's own cache (`read`), so that memory beyond the cache is that of one
segment whatever its length; then its last tokens are scored (`score_last`) or continued (`generate`). Every cell of a
table (a task at a length) keeps one record a sample; `summarise` gives its accuracy with a Wilson 95 % interval.
"""

import argparse
import importlib.util
import inspect
import json
import math
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import hardware
from prepare_corpus import cut_document, open_documents
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


# Registers HSA models with the Auto classes. Where the package is not installed, a model folder brings its code along.
if importlib.util.find_spec("modeling_hsa"):
    import modeling_hsa  # noqa: F401

SEGMENT = 4096


# -- flags --


def make_parser(doc: str, tasks: Sequence[str], lengths: Sequence[int], haystack: bool = True):
    """
    A parser with the flags that the evaluations share. `doc`: docstring of the script; `tasks`: what `--tasks` may
    name, all by default; `lengths`: default of `--lengths`; `haystack`: whether `--haystack` is required.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or Hub id, of any causal language model")
    parser.add_argument("--tasks", nargs="+", default=list(tasks), choices=list(tasks), metavar="TASK")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(lengths), help="tokens, question included")
    parser.add_argument("--samples", type=int, default=100, help="per task, length and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--haystack", nargs="+", type=Path, default=[], required=haystack, metavar="FILE",
        help="text to hide things in: .txt, .jsonl or .jsonl.gz with 'text', or token ids as .npy",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder for the results and plots")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: as saved")
    parser.add_argument("--attn_implementation", help="sdpa, eager, flash_attention_2, ...")
    parser.add_argument(
        "--config", nargs="+", type=_setting, default=[], metavar="NAME=VALUE",
        help="fields of the model's configuration to change, such as chunk_topk=16",
    )  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    parser.add_argument("--batch_size", type=int, default=1, help="samples scored at a time")
    parser.add_argument(
        "--segment", type=int, default=SEGMENT, help="tokens of a prompt read at a time; 0: all at once"
    )
    parser.add_argument("--offload", action="store_true", help="keep the chunk memory of an HSA model on the CPU")
    return parser


def _setting(text: str) -> tuple[str, object]:
    """The name and value of NAME=VALUE: of JSON where it is JSON, a string otherwise."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked: the parser ends the program with the name of a flag that makes no sense, and the fix."""
    arguments = parser.parse_args(words)
    arguments.config = dict(arguments.config)
    for name, least in (("lengths", 1), ("samples", 1), ("batch_size", 1), ("segment", 0), ("seeds", 0)):
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) < least:
            parser.error(f"`--{name}` must be at least {least}, got {value}")
    for file in arguments.haystack:
        if not file.name.endswith((".txt", ".jsonl", ".jsonl.gz", ".npy")):
            parser.error(f"`--haystack` takes .txt, .jsonl, .jsonl.gz and .npy files, got {file}")
        if not file.is_file():
            parser.error(f"`--haystack`: there is no file {file}")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("`--device`: there is no CUDA device here, leave it out or pass `--device cpu`")
    if arguments.dtype not in ("auto", "float32", "bfloat16", "float16"):
        parser.error(f"`--dtype` must be auto, float32, bfloat16 or float16, got {arguments.dtype}")
    return arguments


def load(arguments: argparse.Namespace):
    """The model, in eval mode on its device, and its tokenizer."""
    options = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **options)
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.config:
        config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
        if unknown := arguments.config.keys() - config.to_dict():
            raise SystemExit(f"`--config`: a model of type {config.model_type!r} has no field {sorted(unknown)}")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, **options, **arguments.config)
    if arguments.offload and cache_class(model) is None:
        raise SystemExit(f"`--offload` is for HSA models, not for {model.config.model_type!r}: leave it out")
    return model.to(arguments.device).eval(), tokenizer


# -- text --


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, without special tokens. (Quiet about texts longer than the model was trained on.)"""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def read_haystack(files: Sequence[Path], tokenizer, most: int | None = None) -> np.ndarray:
    """
    One stream of token ids [N], uint16 or int32: all documents in a row, with the end-of-text token after each. .npy
    files hold such ids and are mapped, not read. Stops after about `most` tokens.
    """
    mapped = [np.load(file, mmap_mode="r") for file in files if file.suffix == ".npy"]
    if mapped:
        if len(mapped) < len(files) or any(x.ndim != 1 or x.dtype.kind not in "ui" for x in mapped):
            raise ValueError("`--haystack`: .npy files hold one row of token ids each, and do not mix with texts.")
        return mapped[0] if len(mapped) == 1 else np.concatenate(mapped)
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts, size = [], 0
    for document in open_documents(str(file) for file in files):
        for piece in cut_document(document):
            parts.append(np.array(encode(tokenizer, piece), dtype=kind))
            size += len(parts[-1])
            if most is not None and size >= most:
                return np.concatenate(parts)
        parts.append(np.array(end, dtype=kind))
    if not size:
        raise ValueError(f"`--haystack`: there is no text in {', '.join(map(str, files))}.")
    return np.concatenate(parts)


def sample_rng(seed: int, task: str, length: int, index: int) -> np.random.Generator:
    """The random numbers of one sample: the same whatever else is evaluated, and in whatever order."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), length, index])


# -- models --


def cache_class(model):
    """`HSACache`, of the code that the model came with; None for models of another kind."""
    return getattr(sys.modules[type(model).__module__], "HSACache", None)


def _keeps_logits(model) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "logits_to_keep" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def read(model, input_ids: torch.Tensor, segment: int = SEGMENT, offload: bool = False):
    """
    Reads `input_ids` [B, L] in segments, computing the logits of one token only.

    Returns: the cache of the prompt; None for L = 0.

    Raises: ValueError if the model has no cache to read a prompt of several segments into.
    """
    length = input_ids.shape[1]
    if length == 0:
        return None
    make = cache_class(model)
    cache = None if make is None else make(model.config, offloading=offload)
    if cache is not None:
        cache.reserve(length + segment)
    options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    for part in input_ids.split(segment or length, dim=1):
        output = model(part, past_key_values=cache, use_cache=True, **options)
        cache = output.get("past_key_values")
        if cache is None:
            raise ValueError(
                f"{type(model).__name__} returns no `past_key_values`, so its prompts cannot be read in segments."
            )
    return cache


class RetrievalRecorder:
    """
    A context in which what the tokens from `start` on retrieve is kept, for HSA models; for others it does nothing.
    `chunks()` [B, tokens, layers, Hr * K] then are the chunks, -1 for none, of every HSA layer.
    """

    def __init__(self, model, start: int):
        self.base = None if cache_class(model) is None else model.base_model
        self.start, self.position, self.calls, self.hooks = start, 0, [], []

    def __enter__(self):
        if self.base is not None:
            self.hooks = [
                self.base.register_forward_pre_hook(self._ask, with_kwargs=True),
                self.base.register_forward_hook(self._keep),
            ]
        return self

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()

    def _ask(self, module, args, kwargs):
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        # Only of calls with tokens that are asked for: the rest of the prompt costs no memory.
        return args, {**kwargs, "output_retrieval": self.position + ids.shape[1] > self.start}

    def _keep(self, module, args, output):
        length = output.last_hidden_state.shape[1]
        if self.position + length > self.start:
            skip = max(self.start - self.position, 0)
            layers = [layer.indices[:, skip:].flatten(2).cpu() for layer in output.retrieval]
            self.calls.append(torch.stack(layers, dim=2))
        self.position += length

    def chunks(self) -> torch.Tensor | None:
        return torch.cat(self.calls, dim=1) if self.calls else None


@torch.inference_mode()
def score_last(
    model, input_ids: torch.Tensor, count: int, segment: int = SEGMENT, offload: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Teacher forcing: whether each of the last `count` tokens of `input_ids` [B, L] is the argmax after those before it.

    Returns: bool [B, count] and, for HSA models, the chunks that the tokens before them retrieved,
    [B, count, layers, Hr * K].

    Raises: ValueError if there is no token before the last `count`.
    """
    length = input_ids.shape[1]
    if not 0 < count < length:
        raise ValueError(f"Can score from 1 to {length - 1} of the {length} tokens, not {count}.")
    start = length - count - 1
    with RetrievalRecorder(model, start) as recorder:
        cache = read(model, input_ids[:, :start], segment, offload)
        logits = model(input_ids[:, start:-1], past_key_values=cache, use_cache=cache is not None).logits
    return (logits.argmax(-1) == input_ids[:, start + 1 :]).cpu(), recorder.chunks()


@torch.inference_mode()
def nll(model, input_ids: torch.Tensor, count: int, segment: int = SEGMENT, offload: bool = False) -> torch.Tensor:
    """Negative log-likelihood of each of the last `count` tokens of `input_ids` [B, L], fp32 [B, count]."""
    start = input_ids.shape[1] - count - 1
    if count < 1 or start < 0:
        raise ValueError(f"Can score from 1 to {input_ids.shape[1] - 1} tokens, not {count}.")
    cache = read(model, input_ids[:, :start], segment, offload)
    losses = []
    for part in input_ids[:, start:].unfold(1, 2, 1).split(segment or count, dim=1):  # [B, n, 2]: token and next one
        output = model(part[..., 0], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        targets = part[..., 1]
        losses.append(torch.nn.functional.cross_entropy(output.logits.float().mT, targets, reduction="none"))
    return torch.cat(losses, dim=1)


@torch.inference_mode()
def generate(
    model, input_ids: torch.Tensor, count: int, segment: int = SEGMENT, offload: bool = False, **options
) -> tuple[list[int], torch.Tensor | None]:
    """
    Greedy continuation of one prompt, `input_ids` [1, L], by up to `count` tokens. `options` go to `model.generate`.

    Returns: the new token ids and, for HSA models, the chunks that the tokens before them retrieved,
    [1, tokens, layers, Hr * K].
    """
    length = input_ids.shape[1]
    with RetrievalRecorder(model, length - 1) as recorder:
        cache = read(model, input_ids[:, :-1], segment, offload)
        tokens = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=model.generation_config.pad_token_id or 0,
            **options,
        )
    return tokens[0, length:].tolist(), recorder.chunks()


def retrieval_recall(chunks: torch.Tensor, needles: Sequence[tuple[int, int]], chunk_size: int) -> list[float]:
    """
    recall@K of the needles in one sample, per HSA layer and, last, of all layers together: the share of the chunks
    holding tokens of `needles` [(start, end), ...] that at least one token of `chunks` [tokens, layers, Hr * K]
    retrieved.
    """
    wanted = sorted({c for start, end in needles for c in range(start // chunk_size, (end - 1) // chunk_size + 1)})
    found = [set(layer.flatten().tolist()) for layer in chunks.unbind(1)]
    return [sum(c in layer for c in wanted) / len(wanted) for layer in (*found, set().union(*found))]


# -- scores and results --


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson 95 % interval of a proportion. Fractional successes (parts of an answer) give a wider one: safe."""
    if trials == 0:
        return 0.0, 1.0
    p, w = successes / trials, z * z / trials
    middle, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / trials + w / trials / 4) / (1 + w)
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(records: Sequence[dict]) -> dict:
    """
    Accuracy of records with a `score` in [0, 1] each, and its interval. With `recall` (of `retrieval_recall`) also its
    mean, by layer and in total, and the accuracy of the samples all whose needles were retrieved.
    """
    total = sum(record["score"] for record in records)
    low, high = wilson(total, len(records))
    row = {"samples": len(records), "accuracy": total / max(len(records), 1), "low": low, "high": high}
    with_recall = [record for record in records if record.get("recall") is not None]
    if with_recall:
        mean = np.mean([record["recall"] for record in with_recall], axis=0)
        found = [record["score"] for record in with_recall if record["recall"][-1] == 1]
        row |= {"recall": float(mean[-1]), "recall_by_layer": mean[:-1].tolist(), "retrieved": len(found)}
        row["accuracy_if_retrieved"] = sum(found) / len(found) if found else None
    return row


def columns(records: Sequence[dict]) -> dict[str, list]:
    """Records, all of the same fields, as one list a field: compact in JSON."""
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()} for record in records]
    return {name: [record[name] for record in rounded] for name in rounded[0]} if rounded else {}


class Results:
    """
    `<output>/<name>.json`: hardware and versions, the arguments, and one row a task and length, each with its summary
    and records. Written after every row, so that a run that was cut short leaves what it had.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, model):
        self.file = arguments.output / f"{name}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        versions = {}
        if cache_class(model) is not None and importlib.util.find_spec("configuration_hsa"):
            from configuration_hsa.versions import __version__

            versions["hsa"] = __version__
        self.content = {
            "hardware": hardware() | versions | {"device": str(model.device), "dtype": str(model.dtype)},
            "model": {
                "name": Path(arguments.model).name if Path(arguments.model).is_dir() else arguments.model,
                "type": model.config.model_type,
                "parameters": model.num_parameters(),
            },
            "arguments": {k: _plain(v) for k, v in vars(arguments).items() if k not in ("model", "output")},
            "rows": [],
        }

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    def add(self, task: str, length: int, records: Sequence[dict], seconds: float, **more) -> dict:
        row = {"task": task, "length": length} | summarise(records) | {"seconds": round(seconds, 3)} | more
        self._write(row | {"records": columns(records)})
        return row

    def fail(self, task: str, length: int, reason: str) -> None:
        """A row without results."""
        self._write({"task": task, "length": length, "error": reason})

    def _write(self, row: dict) -> None:
        self.rows.append(row)
        # One line a row: readable, and small with thousands of records.
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        head = json.dumps(self.content | {"rows": None}, indent=1).removesuffix("null\n}")
        self.file.write_text(f"{head}[\n{rows}\n]\n}}\n", encoding="utf-8")

    def table(self) -> str:
        """Tasks by lengths: accuracy in percent, with its interval."""
        lengths = sorted({row["length"] for row in self.rows})
        cells = {(row["task"], row["length"]): row for row in self.rows}
        lines = [f"{'':18}" + "".join(f"{short(length):>18}" for length in lengths)]
        for task in dict.fromkeys(row["task"] for row in self.rows):
            line = f"{task:18}"
            for length in lengths:
                row = cells.get((task, length))
                text = "" if row is None else row.get("error")
                if text is None:
                    text = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.0f}-{100 * row['high']:.0f}]"
                line += f"{text:>18}"
            lines.append(line)
        return "\n".join(lines)


def _plain(value):
    """For JSON; of files only the names, since folders say nothing elsewhere."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.name if isinstance(value, Path) else value


def short(tokens: int) -> str:
    """4096 -> 4K, 1048576 -> 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def batches(arguments: argparse.Namespace, task: str, length: int, size: int | None = None):
    """Lists of up to `size` (default `--batch_size`) pairs (seed, index) of one cell, under a progress bar."""
    pairs = [(seed, index) for seed in arguments.seeds for index in range(arguments.samples)]
    size = arguments.batch_size if size is None else size
    with tqdm(total=len(pairs), desc=f"{task} {short(length)}", unit="sample") as bar:
        for i in range(0, len(pairs), size):
            yield pairs[i : i + size]
            bar.update(len(pairs[i : i + size]))


class Clock:
    """Seconds since it was made."""

    def __init__(self):
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def heat_map(cells: dict[tuple[float, int], float], file: Path, title: str) -> None:
    """`cells`: accuracy by (depth in [0, 1], length). Draws depth (down) x length (to the right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths, lengths = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    grid = [[cells.get((depth, length), math.nan) for length in lengths] for depth in depths]
    figure, axis = plt.subplots(figsize=(2.2 + 0.6 * len(lengths), 1.6 + 0.3 * len(depths)))
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axis.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axis.set(title=title, xlabel="tokens", ylabel="depth")
    figure.colorbar(image, label="accuracy")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
