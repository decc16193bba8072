"""
What it takes to keep a document that was read: saving it as a session, loading it, and the first answer after that.

    python examples/benchmark.py sessions --output benchmarks/results/sessions/cpu --device cpu --lengths 65536

For every length and place of the chunk memory: seconds to read the document, to save it, to save it again after a few
tokens more, to load it, and from there to the last of 16 tokens of an answer to a question of 16; milliseconds a token
of decoding; and whether the answer is that of the cache that was never saved. All in one process, so that model and
libraries are warm and the files are in the page cache of the system. Writes sessions.json. The weights are random: on
a GPU of the default model in bf16, on a CPU of a smaller one.
"""

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from configuration_hsa import HSAConfig
from modeling_hsa import HSACache

from ..reading import CACHE, HSAReader
from ..results import provenance, write_json
from .cpu import CONFIG
from .models import TOY, build
from .timing import MIB, Timer


QUESTION, ANSWER = 16, 16
DECODED = 128  # two chunks, so that the cost of encoding a chunk is in


class PlacedReader(HSAReader):
    """Reads into a cache whose chunk memory is where it is told."""

    options: dict

    def make_cache(self, tokens: int):
        cache = HSACache(self.model.config, **self.options)
        cache.reserve(tokens)
        return cache


class Sessions:
    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--output", type=Path, required=True, help="folder for sessions.json")
        parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 1 << 20], help="tokens of the document")
        parser.add_argument(
            "--memory", nargs="+", default=["device", "host", "disk"], choices=["device", "host", "disk"],
            help="places of the chunk memory",
        )  # fmt: skip
        parser.add_argument("--kv_dtype", choices=["int8"], help="format of the chunk memory; by default the model's")
        parser.add_argument("--segment", type=int, default=4096, help="tokens read at a time")
        parser.add_argument(
            "--folder", type=Path, help="for sessions and memory on disk; by default that of the system"
        )
        parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
        parser.add_argument("--toy", action="store_true", help="a tiny model, to see that everything runs")

    def __init__(self, arguments: Namespace):
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device: use `--device cpu`")
        self.arguments, self.timer = arguments, Timer(arguments.device)
        config = HSAConfig(**(TOY if arguments.toy else {} if self.timer.on_gpu else CONFIG))
        self.model = build("hsa", config).to(self.timer.device, self.timer.dtype).eval()

    def run(self) -> None:
        results = provenance() | {
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype),
            "rows": [],
        }
        results |= {"segment": self.arguments.segment, "kv_dtype": self.arguments.kv_dtype}
        for length in self.arguments.lengths:
            for memory in self.arguments.memory:
                with tempfile.TemporaryDirectory(dir=self.arguments.folder) as folder:
                    row = {"tokens": length, "memory": memory, **self.measure(length, memory, Path(folder))}
                print(" ".join(f"{name}={_short(value)}" for name, value in row.items()), flush=True)
                results["rows"].append(row)
                write_json(self.arguments.output / "sessions.json", results)

    @torch.inference_mode()
    def measure(self, length: int, memory: str, folder: Path) -> dict:
        model, timer = self.model, self.timer
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(model.config.vocab_size, (1, length + QUESTION), generator=generator).to(model.device)
        reader = PlacedReader(model, self.arguments.segment)
        reader.options = {"memory": memory, "kv_dtype": self.arguments.kv_dtype}
        if memory == "disk":
            reader.options["folder"] = folder / "pages"
        reader.generate(ids[:, :300], 2)  # warm
        made, kept = [], folder / "session"
        row = {"read_s": self.seconds(lambda: made.append(reader.read(ids[:, :length])))}
        cache = made[0]
        row["save_s"] = self.seconds(lambda: cache.save_pretrained(kept, model=model))
        row["bytes_per_token"] = sum(file.stat().st_size for file in kept.iterdir()) / length
        answers = [reader.generate(ids, ANSWER, cache=cache.fork())[0]]
        row["load_s"] = self.seconds(
            lambda: made.append(HSACache.from_pretrained(kept, model.config, model=model, memory=memory))
        )
        row["answer_s"] = self.seconds(lambda: answers.append(reader.generate(ids, ANSWER, cache=made[1].fork())[0]))
        row["same_answer"] = answers[0] == answers[1]
        token = ids[:, :1]
        steps = lambda: [model(token, **{CACHE: made[1]}, use_cache=True) for _ in range(DECODED)]  # noqa: E731
        steps()
        row["decode_ms"] = self.seconds(steps) / DECODED * 1e3
        row["save_again_s"] = self.seconds(lambda: made[1].save_pretrained(kept, model=model))
        if timer.on_gpu:
            row["device_mib"] = torch.cuda.max_memory_allocated() / MIB
            torch.cuda.reset_peak_memory_stats()
        return row

    def seconds(self, function) -> float:
        return self.timer.clock_ms(function) / 1e3


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
