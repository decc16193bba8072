"""
Training, prefill and decoding of the default HSA model and of a Llama of the same size, on a GPU.

    python examples/benchmark_models.py --output benchmarks/results/gpu --parts models prefill decode static

`models`: forward and backward of the loss (no optimizer), `--compile` for `torch.compile`. `prefill`: reading a prompt
of one row into a cache (HSA: in segments, as `generate` does it). `decode`: one token at a time after it. `static`: as
`decode`, with a static cache and a compiled step, HSA only. Prints every row and writes models.json, with
hardware and versions, and a plot. `--device cpu --toy` runs the same on tiny models.

Model FLOPs of a training step are three times those of the forward, which are: 2 per token and element of every weight
matrix (of tied embeddings, once, as the head; recomputation and the CLS token of a chunk do not count); 4 D per query
head and pair of query and key in attention; and 2 d_r per pair of query and visible landmark. MFU is what of them is
done per second, over the measured speed of a matmul (`mfu`) and over the 989e12 FLOP/s of the data sheet of an H100
SXM (`mfu_of_h100_peak`).
"""

from functools import partial

import torch
from benchmark import cache_bytes, prefill, train_step
from measuring import (
    MIB,
    attempt,
    clock_ms,
    device,
    draw,
    dtype,
    extra_memory,
    median_ms,
    on_gpu,
    parse,
    run,
)
from transformers import LlamaConfig, LlamaForCausalLM

from configuration_hsa import HSAConfig
from modeling_hsa import HSAForCausalLM, HSAStaticCache
from modeling_hsa.modeling_hsa import PREFILL_CHUNK_SIZE


H100_PEAK_FLOP_PER_S = 989e12
# Batch and length.
TRAINING = [(8, 4096), (2, 16384), (1, 65536)]
CONTEXTS = [4096, 16384, 65536, 131072, 262144, 524288]
TOY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_lower_layers": 2, "num_upper_layers": 2, "num_upper_groups": 1, "sliding_window": 32, "chunk_size": 16,
    "chunk_topk": 2, "retrieval_dim": 16,
}  # fmt: skip


def hsa_config(arguments) -> HSAConfig:
    return HSAConfig(**TOY if arguments.toy else {}, hsa_implementation=arguments.hsa_implementation)


def count(model_class, config) -> int:
    with torch.device("meta"):
        return model_class(config).num_parameters()


def llama_config(hsa: HSAConfig) -> LlamaConfig:
    """As wide and deep as the HSA model; its MLP is as wide as makes the parameters as many."""
    make = partial(
        LlamaConfig, vocab_size=hsa.vocab_size, hidden_size=hsa.hidden_size, num_hidden_layers=hsa.num_hidden_layers,
        num_attention_heads=hsa.num_attention_heads, num_key_value_heads=hsa.num_key_value_heads,
        max_position_embeddings=1 << 20, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    wanted, step = count(HSAForCausalLM, hsa), 16
    narrow = count(LlamaForCausalLM, make(intermediate_size=step))
    per_step = count(LlamaForCausalLM, make(intermediate_size=2 * step)) - narrow
    config = make(intermediate_size=step * (1 + round((wanted - narrow) / per_step)))
    if abs(count(LlamaForCausalLM, config) / wanted - 1) > 0.02:
        raise ValueError("No Llama of this depth and width has as many parameters, to 2 %.")
    return config


def build(name: str, arguments):
    """`hsa` or `llama`, randomly initialised, in bf16 on the GPU."""
    torch.manual_seed(0)
    hsa = hsa_config(arguments)
    model = HSAForCausalLM(hsa) if name == "hsa" else LlamaForCausalLM(llama_config(hsa))
    return model.to(device(), dtype())


def forward_flop(model, batch: int, length: int) -> float:
    """As the head of this file says."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # `parameters` yields tied ones once
    causal = length * (length + 1) / 2
    scores = 0.0
    if isinstance(config, HSAConfig):
        size, window = config.chunk_size, min(config.sliding_window, length)
        in_window = window * (window + 1) / 2 + (length - window) * window
        visible = torch.arange(length) // size
        windows = config.num_hidden_layers - config.num_upper_groups * (not config.hsa_local_attention)
        pairs = windows * in_window + config.num_encoder_layers * (length // size) * (size + 1) ** 2
        pairs += config.num_upper_groups * visible.clamp(max=config.chunk_topk).sum().item() * size
        scores = 2 * config.num_retrieval_heads * config.retrieval_dim * visible.sum().item()
        scores *= config.num_upper_groups
    else:
        pairs = config.num_hidden_layers * causal
    attention = 4 * config.head_dim * config.num_attention_heads * pairs
    return batch * (2.0 * weights * length + attention + scores)


# -- training --


def measure_step(model, step_model, input_ids, limits) -> dict:
    step = lambda: train_step(step_model, input_ids, with_backward=True)  # noqa: E731
    first = clock_ms(step)
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    clock_ms(step)
    peak = torch.cuda.max_memory_allocated() / MIB if on_gpu() else None  # weights, activations and gradients
    ms = median_ms(step)
    flop = 3 * forward_flop(model, *input_ids.shape) / ms * 1e3
    return {
        "first_call_s": first / 1e3,
        "ms": ms,
        "tokens_per_s": input_ids.numel() / ms * 1e3,
        "peak_mib": peak,
        "mfu": flop / limits["matmul_flop_per_s"],
        "mfu_of_h100_peak": flop / H100_PEAK_FLOP_PER_S,
    }


def measure_models(arguments, limits):
    for compiled in arguments.compile:
        for batch, length in [(2, 64), (1, 256)] if arguments.toy else TRAINING:
            if arguments.lengths and length not in arguments.lengths:
                continue
            for name in arguments.models:
                model = build(name, arguments).train()
                checkpointing = length in arguments.gradient_checkpointing
                if checkpointing:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                torch.compiler.reset()
                step_model = torch.compile(model, dynamic=False) if compiled == "on" else model
                input_ids = torch.randint(model.config.vocab_size, (batch, length), device=device())
                yield {
                    "model": name, "batch": batch, "length": length, "compile": compiled,
                    "gradient_checkpointing": checkpointing, "parameters": model.num_parameters(),
                } | attempt(measure_step, model, step_model, input_ids, limits)  # fmt: skip
                del model, step_model


# -- generation --


def contexts(arguments) -> list[int]:
    return arguments.lengths or ([64, 256] if arguments.toy else CONTEXTS)


@torch.inference_mode()
def measure_prefill(model, input_ids) -> dict:
    prefill(model, input_ids[:, :4096])
    ms = median_ms(lambda: prefill(model, input_ids), repeats=3)
    # The cache is no tensor, so its memory is not that of a result: it is in `extra`.
    extra = extra_memory(lambda: prefill(model, input_ids))
    cache = cache_bytes(prefill(model, input_ids)) / MIB
    beyond = None if extra is None else extra - cache
    return {"ms": ms, "tokens_per_s": input_ids.numel() / ms * 1e3, "cache_mib": cache, "beyond_cache_mib": beyond}


@torch.inference_mode()
def measure_decode(model, input_ids, steps: int) -> dict:
    """By the clock over `steps` tokens, of which every 64th completes a chunk."""
    cache, token = prefill(model, input_ids), input_ids[:, :1]

    def decode(steps):
        for _ in range(steps):
            model(token, past_key_values=cache, use_cache=True)

    decode(8)
    return {"ms_per_token": clock_ms(lambda: decode(steps)) / steps}


@torch.no_grad()
def measure_static(arguments, limits):
    """
    Decoding as in `measure_decode`, by one compiled step: CUDA graphs of it, and a static cache with room for the
    longest context, which all contexts share.
    """
    lengths, steps = contexts(arguments), 8 if arguments.toy else 128
    model = build("hsa", arguments).eval()
    cache = HSAStaticCache(model.config, max(lengths) + 2 * steps)
    mode = {"mode": "reduce-overhead"} if on_gpu() else {"backend": "aot_eager"}
    step = torch.compile(model.forward, fullgraph=True, **mode)
    for length in lengths:
        cache.reset()
        input_ids = torch.randint(model.config.vocab_size, (1, length), device=device())
        for segment in input_ids.split(PREFILL_CHUNK_SIZE, dim=1):
            model(segment, past_key_values=cache, logits_to_keep=1)

        def decode(steps):
            token = torch.zeros(1, 1, dtype=torch.int64, device=device())
            for _ in range(steps):
                token = step(token, past_key_values=cache).logits.argmax(-1)

        first = clock_ms(lambda: decode(8))
        row = {"model": "hsa", "length": length, "max_length": cache.max_length}
        yield row | {"ms_per_token": clock_ms(lambda: decode(steps)) / steps, "first_steps_s": first / 1e3}


def measure_generation(measure, arguments, limits):
    for length in contexts(arguments):
        for name in arguments.models:
            torch.compiler.reset()
            model = build(name, arguments).eval()
            input_ids = torch.randint(model.config.vocab_size, (1, length), device=device())
            yield {"model": name, "length": length} | attempt(measure, model, input_ids)
            del model


def measure_decoding(measure, arguments, limits):
    yield from measure_generation(partial(measure, steps=8 if arguments.toy else 128), arguments, limits)


PARTS = {
    "models": measure_models,
    "prefill": partial(measure_generation, measure_prefill),
    "decode": partial(measure_decoding, measure_decode),
    "static": measure_static,
}


def plot(results: dict, folder) -> None:
    panels = []
    for part, field, title in (
        ("models", "tokens_per_s", "training, tokens/s"),
        ("models", "peak_mib", "training, peak MiB"),
        ("prefill", "ms", "prefill, ms"),
        ("prefill", "beyond_cache_mib", "prefill beyond the cache, MiB"),
        ("decode", "ms_per_token", "decoding, ms per token"),
        ("static", "ms_per_token", "decoding, static cache, ms per token"),
    ):
        lines = {}
        for row in results.get(part, {}).get("rows", []):
            if row.get(field) is not None:
                label = row["model"] + (", compiled" if row.get("compile") == "on" else "")
                x, y = lines.setdefault(label, ([], []))
                x.append(row["length"])
                y.append(row[field])
        panels.append((title, "tokens", [(label, x, y) for label, (x, y) in lines.items()]))
    draw(panels, folder / "models.png")


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=["hsa", "llama"], choices=["hsa", "llama"])
    parser.add_argument("--compile", nargs="+", default=["off"], choices=["off", "on"], help="of `models`")
    parser.add_argument(
        "--gradient_checkpointing", type=int, nargs="*", default=[], help="lengths to train with it, of `models`"
    )
    parser.add_argument("--hsa_implementation", default="auto", choices=["auto", "triton", "torch"])


if __name__ == "__main__":
    run("models", PARTS, parse(__doc__, PARTS, add_arguments), plot)
