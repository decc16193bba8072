"""
Continue a prompt, of any length, with a model folder or a model of the Hub.

    python examples/generate.py --model out/chronicle --prompt_file chronicle.txt --prompt "What is the password of"
    python examples/generate.py --model out/chronicle --prompt "On May 3," --show_retrieval

The prompt is what `--prompt_file` holds followed by `--prompt`. HSA models read it in segments, so that little memory
beyond the cache is needed whatever its length, while a bar counts its tokens; the answer is printed as it comes.
`--show_retrieval` then prints the passages that the model looked up.
"""

import importlib.util
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TextStreamer, set_seed


# Registers HSA models with the Auto classes. Where the package is not installed, a model folder brings its code along.
if importlib.util.find_spec("modeling_hsa"):
    import modeling_hsa  # noqa: F401


@dataclass
class Arguments:
    model: str = field(metadata={"help": "model folder or Hub id"})
    prompt: str = field(default="", metadata={"help": "text to continue"})
    prompt_file: str | None = field(default=None, metadata={"help": "file with text that comes before `--prompt`"})
    max_new_tokens: int = 64
    do_sample: bool = field(default=False, metadata={"help": "draw tokens at random; else take the likeliest"})
    temperature: float = 1.0
    top_k: int = field(default=50, metadata={"help": "0 for all"})
    top_p: float = 1.0
    seed: int = 0
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, ...; auto: cuda where there is one"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, float16; auto: as saved"})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    prefill_chunk_size: int | None = field(default=None, metadata={"help": "tokens of the prompt read at a time"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that comes with the model"})
    show_retrieval: bool = field(default=False, metadata={"help": "print the passages that were retrieved"})


def read_prompt(args: Arguments) -> str:
    text = "" if args.prompt_file is None else Path(args.prompt_file).read_text(encoding="utf-8")
    return text + args.prompt


class PromptBar:
    """A progress bar over the prompt, for any model: counts the tokens that its base model has read."""

    def __init__(self, model: torch.nn.Module, tokens: int):
        self.bar = tqdm(total=tokens, desc="Reading the prompt", unit="token", unit_scale=True)
        self.hook = model.base_model.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs, output):
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids", args[0] if args else None)
        self.bar.update((ids if embeds is None else embeds).shape[1])
        if self.bar.n >= self.bar.total:
            self.close()

    def close(self):
        self.hook.remove()
        self.bar.close()


class RetrievalLog:
    """Keeps what the last token of the prompt and each generated token but the last retrieved, per HSA layer."""

    def __init__(self, model: torch.nn.Module, prompt_tokens: int):
        self.left = prompt_tokens
        self.steps = []  # of tuples, one ChunkRetrieval per HSA layer, of one token
        self.hooks = [
            model.base_model.register_forward_pre_hook(self.ask, with_kwargs=True),
            model.base_model.register_forward_hook(self.keep),
        ]

    def ask(self, module, args, kwargs):
        return args, {**kwargs, "output_retrieval": True}

    def keep(self, module, args, output):
        self.left -= output.last_hidden_state.shape[1]
        if self.left <= 0:
            last = slice(-1, None)
            self.steps.append([[None if x is None else x[0, last] for x in layer] for layer in output.retrieval])

    def close(self):
        for hook in self.hooks:
            hook.remove()

    def weights(self, layer: int, steps: slice) -> dict[int, float]:
        """Chunk -> its weight, averaged over the retrieval heads and the steps, the heaviest first."""
        total = {}
        for indices, weights, scores in (step[layer] for step in self.steps[steps]):
            # Joint weighting has no weights of chunks. What a softmax of the scores would give still ranks them.
            weights = scores.softmax(-1) if weights is None else weights
            share = weights / (len(self.steps[steps]) * indices.shape[1])
            for chunk, weight in zip(indices.flatten().tolist(), share.flatten().tolist()):
                if chunk >= 0:
                    total[chunk] = total.get(chunk, 0.0) + weight
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def print_retrieval(log: RetrievalLog, config, tokenizer, tokens: torch.Tensor) -> None:
    """`tokens` [L]: prompt and answer."""
    layers = [index for index, is_hsa in enumerate(config.hsa_layers) if is_hsa]
    groups = {"the last token of the prompt": slice(0, 1), "the generated tokens, on average": slice(1, None)}
    for name, steps in groups.items():
        if not log.steps[steps]:
            continue
        print(f"\nRetrieved by {name}:")
        for i, layer in enumerate(layers):
            print(f"  layer {layer}")
            chunks = log.weights(i, steps)
            for chunk, weight in list(chunks.items())[: config.chunk_topk]:
                start, end = chunk * config.chunk_size, (chunk + 1) * config.chunk_size
                passage = " ".join(tokenizer.decode(tokens[start:end]).split())
                print(f"    {weight:5.2f}  tokens {start:,}-{end - 1:,}: {passage}")
            if not chunks:
                print("    nothing: there is no complete chunk before it")


def main() -> None:
    parser = HfArgumentParser(Arguments, description=__doc__.strip().splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses()
    if not args.prompt and args.prompt_file is None:
        parser.error("give a `--prompt`, a `--prompt_file`, or both")
    set_seed(args.seed)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    ).to(device)
    if args.show_retrieval and model.config.model_type != "hsa":
        parser.error(f"`--show_retrieval` needs an HSA model, not one of type {model.config.model_type!r}")
    inputs = tokenizer(read_prompt(args), return_tensors="pt", return_token_type_ids=False, verbose=False).to(device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        parser.error("the prompt is empty")

    options = {"do_sample": args.do_sample}
    if args.do_sample:
        options |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.prefill_chunk_size is not None:
        options["prefill_chunk_size"] = args.prefill_chunk_size
    with ExitStack() as stack:
        bar = PromptBar(model, prompt_tokens)
        stack.callback(bar.close)
        if args.show_retrieval:
            log = RetrievalLog(model, prompt_tokens)
            stack.callback(log.close)
        tokens = model.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **options,
        )
    if args.show_retrieval:
        print_retrieval(log, model.config, tokenizer, tokens[0])


if __name__ == "__main__":
    main()
