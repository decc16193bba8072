"""What HSA models need beyond the plans of `HSAConfig` to be spread over several devices by Transformers."""

import contextlib

import torch
from torch import nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer


class HeadNormParallel(TensorParallelLayer):
    """
    A norm that is the same for every head, where a device has only some of the heads: the whole weight on every
    device, and its gradient summed over them.

    The style of Transformers for it, `replicated_with_grad_allreduce`, sums what `grad` holds after a backward pass,
    and so counts the earlier passes of gradient accumulation several times.
    """

    @contextlib.contextmanager
    def context_around_forward(self, module: nn.Module, mesh):
        if not torch.is_grad_enabled():
            yield
            return
        from torch.distributed.tensor import DTensor, Partial, Replicate

        weights = dict(module._parameters)
        for name, weight in weights.items():
            shared = DTensor.from_local(weight, mesh, [Replicate()], run_check=False)
            module._parameters[name] = shared.to_local(grad_placements=[Partial()])
        try:
            yield
        finally:
            module._parameters.update(weights)


ALL_PARALLEL_STYLES.register("hsa_head_norm", HeadNormParallel())


def check_parallelism(config, distributed_config) -> None:
    """
    Raises `ValueError` for a `DistributedConfig` that the model cannot follow; the message names the field and the
    fix. None, of a model that is not distributed, is right.
    """
    if distributed_config is None:
        return
    if (distributed_config.pp_size or 1) > 1:
        raise ValueError(
            f"`pp_size` ({distributed_config.pp_size}) must be 1: the chunk memory, which the upper layers retrieve "
            "from, does not pass from one stage of a pipeline to the next. Use `tp_size` or `fsdp_size`, or "
            "`device_map='auto'`."
        )
    devices = distributed_config.tp_size or 1
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "encoder_intermediate_size"):
        if getattr(config, field) % devices:
            raise ValueError(
                f"Tensor parallelism splits the heads of attention and the MLPs evenly: `{field}` "
                f"({getattr(config, field)}) must be a multiple of the number of devices (`tp_size` {devices}). Use "
                "fewer devices, or `fsdp_size` or `device_map='auto'` instead."
            )
    shards = distributed_config.fsdp_size or 1
    if config.tie_word_embeddings and config.vocab_size % shards:
        # Of tied weights that are sharded unevenly, Transformers leaves the output ones as they were before a step.
        raise ValueError(
            f"With `tie_word_embeddings`, `vocab_size` ({config.vocab_size}) must be a multiple of `fsdp_size` "
            f"({shards}). Call `model.resize_token_embeddings(..., pad_to_multiple_of={shards})` and save the model, "
            "or shard it with `accelerate`."
        )
