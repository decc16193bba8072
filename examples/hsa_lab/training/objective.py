"""What pretraining optimises and measures: the loss of tokens, the loss of retrieval, and how well tasks are done."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


class Meters:
    """
    Sums on the device, read only when they are logged. `state`: what `state()` of an earlier run gave. `reduce`: makes
    the sum of a tensor over the processes.
    """

    def __init__(self, tasks: list[str], device, state: list | None = None, reduce: Callable = lambda x: x):
        self.tasks, self.reduce = tasks, reduce
        sums, losses = state or ([[0.0] * 4] * len(tasks), [0.0] * 2)
        self.sums = torch.tensor(sums, device=device, dtype=torch.float64)
        self.losses = torch.tensor(losses, device=device, dtype=torch.float64)

    def state(self) -> list:
        return [self.reduce(self.sums).tolist(), self.reduce(self.losses).tolist()]

    @torch.no_grad()
    def add(self, task, predicted, targets, answers, per_token) -> None:
        right = predicted == targets
        row = torch.stack(
            [(right & answers).sum(1), answers.sum(1), (right | ~answers).all(1) & answers.any(1), answers.any(1)], 1
        )
        self.sums.index_add_(0, task, row.double())
        self.losses += torch.stack([(per_token * ~answers).sum(), (~answers).sum()]).double()

    def read(self) -> dict:
        """
        Loss of all tokens but answers, needles among them; for each task the accuracy by answer token and by row (all
        of its answers).
        """
        sums, (loss, count) = self.state()
        result = {"text_loss": loss / max(count, 1)}
        for name, (right, tokens, rows_right, rows) in zip(self.tasks, sums):
            if tokens:
                result[name] = {"accuracy": right / tokens, "row_accuracy": rows_right / rows}
        self.sums.zero_()
        self.losses.zero_()
        return result


def token_losses(
    logits: torch.Tensor, input_ids: torch.Tensor, answers: torch.Tensor, answer_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every token of `input_ids` [B, L] but the first, fp32 [B, L - 1], and how much each counts."""
    targets = input_ids[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).view_as(targets)
    return losses, token_weights(answers, answer_weight)


def token_weights(answers: torch.Tensor, answer_weight: float) -> torch.Tensor:
    return torch.where(answers[:, 1:], answer_weight, 1.0)


def wanted_chunks(source: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """
    int64 [B, L]: for the token before each answer token, which predicts it, the chunk that `source` [B, L] (as of
    `Batches`) is in; -1 for others, and where that chunk is not complete then, so that nothing could retrieve it.
    """
    chunk = torch.where(source >= 0, source // chunk_size, -1).roll(-1, dims=1)
    position = torch.arange(source.shape[1], device=source.device)
    visible = ((chunk + 1) * chunk_size <= position) & (position < source.shape[1] - 1)
    return torch.where(visible, chunk, -1)


def found_weights(layer, chunk: torch.Tensor) -> torch.Tensor:
    """fp32 [B, L, retrieval heads]: how much `chunk` [B, L] counts among what was retrieved, 0 if it is not."""
    return torch.where(layer.indices == chunk[..., None, None], layer.weights, 0.0).sum(-1)


def retrieval_loss(
    retrieval, source: torch.Tensor, chunk_size: int, mean_count: Callable = lambda x: x
) -> torch.Tensor:
    """
    Mean over HSA layers of the mean, over retrieval heads and answer tokens whose chunk was retrieved, of -log of the
    weight of the chunk that the token is copied from. A chunk that was not retrieved is left out; a layer without any
    counts as 0. `mean_count`: the mean over processes of how many were found in each layer, so that the mean of their
    losses is that of all rows.
    """
    chunk = wanted_chunks(source, chunk_size)
    losses, counts = [], []
    for layer in retrieval:
        weight = found_weights(layer, chunk)
        found = (weight > 0) & (chunk[..., None] >= 0)
        losses.append(-(weight.clamp(min=1e-20).log() * found).sum())
        counts.append(found.sum())
    counts = mean_count(torch.stack(counts).float())
    return (torch.stack(losses) / torch.where(counts > 0, counts, 1.0)).mean()


@torch.no_grad()
def measure_retrieval(model, batch, autocast: AbstractContextManager) -> dict[str, list[float]]:
    """
    For every HSA layer, of the chunks that give answer tokens away: "recall", how often such a chunk is among those
    retrieved by any head, and "weight", how much it counts among them, 0 where it is not (the mean of the heads). No
    "weight" with `chunk_weighting="joint"`, which has none; neither where the batch has no such chunk.
    """
    input_ids, _, _, source = (x[:16] for x in batch)
    with autocast:
        retrieval = model(input_ids, use_cache=False, output_retrieval=True, logits_to_keep=1).retrieval
    chunk = wanted_chunks(source, model.config.chunk_size)
    wanted = chunk >= 0
    if not wanted.any():
        return {}
    found = [(layer.indices == chunk[..., None, None]).flatten(2).any(-1) for layer in retrieval]
    measures = {"recall": [x[wanted].double().mean().item() for x in found]}
    if model.config.chunk_weighting != "joint":
        measures["weight"] = [found_weights(layer, chunk)[wanted].mean().item() for layer in retrieval]
    return measures
