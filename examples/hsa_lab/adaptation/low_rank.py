"""Low-rank changes of frozen matrices (LoRA, arXiv 2106.09685), computed as one matrix product."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_hsa import HSAForCausalLM, new_parameters


class LowRankLinear(nn.Linear):
    """
    A frozen linear layer with the change `alpha / rank * lora_B @ lora_A`, which starts as zero.

    The sum of both matrices is made in every call, which costs nothing beside thousands of tokens. The usual form, a
    path of its own for the change, reads and writes every input and output again: for a small model that takes longer
    than the gradient of the whole matrix.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def merged(self) -> torch.Tensor:
        """The changed matrix [out, in]."""
        return self.weight + self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.merged(), self.bias)


def freeze_base(model: HSAForCausalLM) -> None:
    """Leaves only what is new to be trained."""
    new = set(new_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new)


def add_low_rank(model: HSAForCausalLM, rank: int, alpha: float) -> None:
    """Gives every matrix of the base but the embeddings a low-rank change, in place."""
    new = set(new_parameters(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.weight" not in new and module is not model.lm_head:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, LowRankLinear(module, rank, alpha))


@torch.no_grad()
def merged_weights(model: HSAForCausalLM, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of the model as of one that never had low-rank changes, on the CPU."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            weights[f"{name}.weight"] = module.merged()
    return {name: tensor.to("cpu", dtype, copy=True) for name, tensor in weights.items()}


@torch.no_grad()
def save_adapter(model: HSAForCausalLM, folder: Path, base: str, dtype: torch.dtype) -> None:
    """
    What was trained, as an adapter that `PeftModel.from_pretrained` puts on the converted model: the low-rank changes,
    and what is new whole.

    Raises: ValueError if the matrices of the base were trained themselves, of which there is no adapter.
    """
    from peft import LoraConfig  # which nothing else needs

    changed = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not changed:
        raise ValueError("Only a model with low-rank changes has an adapter.")
    any_changed = next(iter(changed.values()))
    rank = any_changed.lora_A.shape[0]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=any_changed.scale * rank,
        target_modules=sorted(changed),
        modules_to_save=new_parameters(model, modules=True),
        inference_mode=True,
    )
    tensors = dict(_trained(model, changed))
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {f"base_model.model.{name}": x.to("cpu", dtype, copy=True).contiguous() for name, x in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: HSAForCausalLM, folder: Path) -> None:
    """
    Gives a model with low-rank changes what `save_adapter` wrote.

    Raises: ValueError if the adapter is of another model, or its changes are of another rank.
    """
    changed = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    trained = dict(_trained(model, changed))
    saved = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    wrong = sorted(trained.keys() ^ saved.keys()) or [n for n, x in trained.items() if x.shape != saved[n].shape]
    if wrong:
        raise ValueError(
            f"`--adapter`: {folder} does not fit the model of the recipe, whose `model` and `train.rank` must be "
            f"those that it was trained with: {', '.join(wrong[:3])} are not in both, or of another shape."
        )
    for name, tensor in trained.items():
        tensor.copy_(saved[name])


def _trained(model: HSAForCausalLM, changed: dict[str, LowRankLinear]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, module in changed.items():
        yield f"{name}.lora_A.weight", module.lora_A
        yield f"{name}.lora_B.weight", module.lora_B
    parameters = dict(model.named_parameters())
    for name in new_parameters(model):
        yield name, parameters[name]
