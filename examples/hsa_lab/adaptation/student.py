"""The model with its losses, its teacher, its optimizers, and how they are made fast."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_hsa import HSAForCausalLM, new_parameters
from modeling_hsa.chunk_encoder import HSAEncoderLayer
from modeling_hsa.layers import HSADecoderLayer, HSARetrievalLayer

from .batches import Batch
from .losses import RetrievalLoss, TokenLosses, retrieval_loss, terms, token_losses


class Outcome(NamedTuple):
    loss: torch.Tensor  # fp32 []
    asked: TokenLosses
    plain: TokenLosses
    retrieval: RetrievalLoss


class Student(nn.Module):
    """
    A model with its losses.

    Args:
        retrieval_weight: of the loss of retrieval.
        logits_at_once: tokens whose logits are made at once.
        terms: `losses.terms`, maybe compiled.
    """

    def __init__(self, model: HSAForCausalLM, retrieval_weight: float, logits_at_once: int, terms: Callable = terms):
        super().__init__()
        self.model = model
        self.retrieval_weight, self.logits_at_once, self.terms = retrieval_weight, logits_at_once, terms
        # Not by `output_retrieval=True`, whose hooks on all layers would break compiled ones into pieces.
        self.retrieved = []
        for layer in model.model.layers:
            if layer.retrieves:
                layer.retrieval.register_forward_hook(self._keep)

    def _keep(self, module, args, output) -> None:
        self.retrieved.append(output[0])

    def forward(
        self, batch: Batch, teacher: torch.Tensor | None = None, teacher_head: torch.Tensor | None = None
    ) -> Outcome:
        """`teacher` [M, hidden]: what the teacher says of the tokens `batch.plain`."""
        self.retrieved.clear()
        embeds, device = self.model.get_input_embeddings()(batch.ids), batch.ids.device.type
        if torch.is_autocast_enabled(device):
            # Autocast leaves the residual stream in the dtype of the embeddings. The model runs in this one later.
            embeds = embeds.to(torch.get_autocast_dtype(device))
        hidden = self.model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state.flatten(0, 1)
        head = self.model.lm_head.weight
        asked = token_losses(
            hidden.index_select(0, batch.asked.place), head, batch.asked,
            at_once=self.logits_at_once, terms=self.terms,
        )  # fmt: skip
        plain = token_losses(
            hidden.index_select(0, batch.plain.place), head, batch.plain, teacher, teacher_head,
            at_once=self.logits_at_once, terms=self.terms,
        )  # fmt: skip
        retrieval = retrieval_loss(self.retrieved, batch.seekers, batch.evidence)
        loss = asked.loss + plain.loss + self.retrieval_weight * retrieval.loss
        return Outcome(loss, asked, plain, retrieval)


class Teacher:
    """The base, as it was before it was converted, in the dtype that it computes in."""

    def __init__(self, base: PreTrainedModel):
        self.base = base.requires_grad_(False).eval()
        self.head = base.lm_head.weight

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: int) -> torch.Tensor:
        """What it says of the tokens `batch.plain`, which are in the first `rows` rows: [M, hidden]."""
        hidden = self.base.model(batch.ids[:rows], use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.plain.place)


def compile_layers(student: HSAForCausalLM, teacher: PreTrainedModel | None) -> Callable:
    """
    Compiles what most of the time goes into, each kind of layer once: 30 layers share a graph. HSA layers, a few of
    them, are left as they are but for their MLPs, as their retrieval is to be seen. Returns compiled `losses.terms`.
    """
    torch._dynamo.config.recompile_limit = 64  # a graph a kind of layer and a stage
    for layer in student.model.modules():
        if isinstance(layer, HSARetrievalLayer):
            layer.mlp.compile(dynamic=False)
        elif isinstance(layer, (HSADecoderLayer, HSAEncoderLayer)):
            layer.compile(dynamic=False)
    if teacher is not None:
        for layer in teacher.model.layers:
            layer.compile(dynamic=False)
    return torch.compile(terms, dynamic=False)


def make_optimizers(model: HSAForCausalLM, settings: dict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that are new, AdamW for the rest of what is trained."""
    new = set(new_parameters(model))
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if name in new and parameter.dim() == 2 else others).append(parameter)
    decay = settings["weight_decay"]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=settings["muon_learning_rate"], weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, lr=settings["learning_rate"], weight_decay=0.0, betas=(0.9, 0.95),
            fused=others[0].device.type == "cuda",
        ),
    ]  # fmt: skip
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
