"""
The cases in which a model on several processes is compared with the same model on one: what the model is, what it
reads, and how it is spread. `worker.py` runs them.
"""

from typing import NamedTuple

import torch

from tests.models import VARIANTS


class Case(NamedTuple):
    strategy: str  # a key of `worker.STRATEGIES`
    model: dict = {}  # fields of the configuration away from `tiny_config`, and `attn_implementation`
    # The documents of every process, by their lengths; with tensor parallelism all processes read those of the first.
    lengths: tuple[tuple[int, ...], ...] = ((300, 300), (300, 300))
    packed: bool = False
    accumulate: int = 1  # into how many backward passes the documents of a process are divided
    checkpointing: str = ""  # "reentrant", "non-reentrant" or none
    dtype: str = "float32"
    frozen: str = ""  # parameters whose name starts like this are not trained
    refused: str = ""  # what the error says, where the model cannot be spread like this


# The vocabulary of the tiny model is odd, which Transformers before 5.24 cannot split.
EVEN = {"vocab_size": 100}
BIASES = {"attention_bias": True, "encoder_attention_bias": True, "mlp_bias": True}

TENSOR_PARALLEL = {
    **{name: Case("tensor_parallel", {**EVEN, **fields}) for name, fields in VARIANTS.items()},
    "batch_of_one": Case("tensor_parallel", EVEN, ((150,),)),
    "shorter_than_a_chunk": Case("tensor_parallel", EVEN, ((5, 3),)),
    "shorter_than_a_block": Case("tensor_parallel", EVEN, ((100, 100),)),
    "padded": Case("tensor_parallel", EVEN, ((150, 5, 40),)),
    "packed": Case("tensor_parallel", EVEN, ((70, 5, 75, 40),), packed=True),
    "untied": Case("tensor_parallel", {**EVEN, "tie_word_embeddings": False}),
    "biases": Case("tensor_parallel", {**EVEN, **BIASES}),
    "accumulation": Case("tensor_parallel", EVEN, ((300, 5, 150, 40),), accumulate=4),
    "non_reentrant_checkpointing": Case("tensor_parallel", EVEN, checkpointing="non-reentrant"),
    "reentrant_checkpointing": Case("tensor_parallel", EVEN, checkpointing="reentrant"),
    "frozen_backbone": Case("tensor_parallel", EVEN, frozen="model.layers"),
    "frozen_chunk_encoder": Case("tensor_parallel", EVEN, frozen="model.chunk_encoder"),
    "joint_two_heads_checkpointing": Case(
        "tensor_parallel",
        {**EVEN, "chunk_weighting": "joint", "hsa_num_key_value_heads": 2, "num_retrieval_heads": 2},
        accumulate=2,
        checkpointing="non-reentrant",
    ),
    "bf16": Case("tensor_parallel_bf16", EVEN, dtype="bfloat16"),
    "bf16_joint": Case(
        "tensor_parallel_bf16",
        {**EVEN, "chunk_weighting": "joint", "hsa_num_key_value_heads": 2},
        ((70, 5, 75, 40),),
        packed=True,
        dtype="bfloat16",
    ),
    "odd_hidden_size": Case("tensor_parallel", {**EVEN, "hidden_size": 33, "head_dim": 8}),
    "one_key_value_head": Case("tensor_parallel", {**EVEN, "num_key_value_heads": 1}, refused="`num_key_value_heads`"),
    "odd_mlp": Case("tensor_parallel", {**EVEN, "intermediate_size": 47}, refused="`intermediate_size`"),
    "odd_encoder_mlp": Case(
        "tensor_parallel", {**EVEN, "encoder_intermediate_size": 47}, refused="`encoder_intermediate_size`"
    ),
    "three_heads": Case(
        "tensor_parallel",
        {**EVEN, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
        refused="`num_attention_heads`",
    ),
}


def _data_parallel(strategy: str, **fields) -> dict[str, Case]:
    uneven = ((5, 3), (50, 33))  # the documents of one process have no chunk
    return {
        "uneven": Case(strategy, fields, uneven),
        "no_chunks": Case(strategy, fields, ((5, 3), (2, 15))),
        "long": Case(strategy, fields, ((300, 40), (16, 150))),
        "packed": Case(strategy, fields, ((5, 3, 4), (70, 5, 75)), packed=True),
        "joint": Case(strategy, {**fields, "chunk_weighting": "joint"}, uneven),
        "no_encoder": Case(strategy, {**fields, "chunk_landmark": "mean", "num_encoder_layers": 0}, uneven),
        "untied": Case(strategy, {**fields, "tie_word_embeddings": False}, uneven),
        "accumulation": Case(strategy, fields, ((5, 50, 17, 3), (33, 3, 40, 16)), accumulate=2),
        "checkpointing": Case(strategy, fields, uneven, checkpointing="non-reentrant"),
        # Layers run between the encoder and the first that retrieves.
        "early_encoder": Case(strategy, {**fields, **VARIANTS["early_encoder"]}, uneven),
        "frozen_backbone": Case(strategy, fields, uneven, frozen="model.layers"),
        "frozen_chunk_encoder": Case(strategy, fields, uneven, frozen="model.chunk_encoder"),
    }


GROUPS = {
    "tp": TENSOR_PARALLEL,
    "pp": {"refused": Case("pipeline", refused="`pp_size`")},
    "ddp": _data_parallel("ddp"),
    "fsdp": _data_parallel("fully_shard"),
    "accelerate_ddp": _data_parallel("accelerate_ddp"),
    "accelerate_fsdp": _data_parallel("accelerate_fsdp"),
    "transformers_fsdp": {
        **_data_parallel("transformers_fsdp", **EVEN),
        "odd_vocabulary": Case("transformers_fsdp", refused="`vocab_size`"),
    },
}
CASES = {f"{group}-{name}": case for group, cases in GROUPS.items() for name, case in cases.items()}
# To shard a model, accelerate wants a GPU.
ON_CPU = tuple(name for name in CASES if not name.startswith("accelerate_fsdp"))
# One of each kind, within seconds.
FEW = ("tp-default", "tp-three_heads", "pp-refused", "ddp-uneven", "fsdp-uneven")
# What may differ between devices, without every switch of the model. First one of each kind.
ON_GPUS = tuple(dict.fromkeys([
    *("tp-default", "ddp-uneven", "fsdp-uneven", "accelerate_fsdp-uneven", "transformers_fsdp-uneven"),
    *(f"tp-{name}" for name in (
        "stick_breaking", "joint", "no_local_attention", "two_retrieval_heads", "two_memory_heads",
        "no_qk_norm", "shorter_than_a_chunk", "padded", "packed", "untied", "accumulation",
        "non_reentrant_checkpointing", "bf16", "bf16_joint",
    )),
    *(f"{group}-{name}" for group in ("ddp", "fsdp", "accelerate_fsdp", "transformers_fsdp") for name in (
        "uneven", "packed", "accumulation", "frozen_chunk_encoder",
    )),
]))  # fmt: skip


def make_batch(lengths: tuple[int, ...], packed: bool, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """Random documents of these lengths, padded on the right with 0, or packed in one row; labels are the tokens."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(1, vocabulary, (n,), generator=generator) for n in lengths]
    if packed:
        ids = torch.cat(documents)[None]
        labels = torch.cat([torch.cat([torch.tensor([-100]), document[1:]]) for document in documents])[None]
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        }
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(documents, True, 0), "labels": pad(documents, True, -100)}
    if len(set(lengths)) > 1:
        batch["attention_mask"] = pad([torch.ones_like(document) for document in documents], True, 0)
    return batch


def make_steps(case: Case, rank: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """The batches of the backward passes of a process."""
    lengths = case.lengths[rank]
    size = -(-len(lengths) // case.accumulate)
    return [
        make_batch(lengths[start : start + size], case.packed, vocabulary, seed=100 * rank + start)
        for start in range(0, len(lengths), size)
    ]


def count_targets(steps: list[dict[str, torch.Tensor]]) -> int:
    """Tokens that are predicted: the labels but for the first of every row."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in steps)
