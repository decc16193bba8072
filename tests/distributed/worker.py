"""
Runs cases of `cases.py` in this process, one of several that torchrun started, and writes what came out:

    torchrun --nproc_per_node 2 -m tests.distributed.worker --output results.jsonl [--device cuda] [CASE ...]

A line of the file is a `case` that ended, its `seconds`, and `errors`, the largest relative error of each thing
compared and of all processes (in bf16 `excess`, the error over that of one process), and for tensor parallelism
`trained`, the entries of the plan whose parameters got a gradient; or `refused`, the error that was expected.

A process ends with a traceback when a case fails, since the others then wait for it in vain, and when one takes longer
than `--limit` seconds.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import shutil
import tempfile
import time
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from modeling_hsa import HSAForCausalLM
from tests.distributed.cases import CASES, Case, count_targets, make_steps
from tests.helpers import relative_error
from tests.models import tiny_model


LEARNING_RATE = 0.1


def whole(x: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which this process may hold only a part."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def largest(errors: list[float]) -> float:
    """NaN if one is."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def make_model(case: Case) -> HSAForCausalLM:
    fields = dict(case.model)
    attention = fields.pop("attn_implementation", "sdpa")
    model = tiny_model(**fields)
    model.set_attn_implementation(attention)
    return model


def prepare(model: HSAForCausalLM, case: Case) -> HSAForCausalLM:
    """As every model of a case is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (case.frozen and name.startswith(case.frozen)))
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    return model.train()


class Comparison:
    """What went through one process (`expected`) against what went through several."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.expected = prepare(make_model(case).to(device), case)
        self.vocabulary = self.expected.config.vocab_size
        self.errors: dict[str, float] = {}
        self.excess: dict[str, float] = {}
        self.trained: set[str] = set()

    def steps(self, rank: int) -> list[dict[str, torch.Tensor]]:
        steps = make_steps(self.case, rank, self.vocabulary)
        return [{name: x.to(self.device) for name, x in batch.items()} for batch in steps]

    def report(self, what: str, error: float) -> None:
        self.errors[what] = largest([self.errors.get(what, 0.0), error])

    def train(self, model, backward_passes, ranks: range, share: float) -> None:
        """
        One step of both. `backward_passes(items)` are those of the model on several processes.

        Args:
            ranks: those whose documents are the batch.
            share: the part of the loss that is left of what one process computes, when gradients are averaged.
        """
        steps = [batch for rank in ranks for batch in self.steps(rank)]
        items = count_targets(steps)
        for batch in steps:
            self.expected(**batch, num_items_in_batch=items, use_cache=False).loss.backward()
        backward_passes(items * share)
        actual = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        self.compare_gradients(actual)
        for parameters in (self.expected.parameters(), actual.values()):
            torch.optim.SGD([p for p in parameters if p.requires_grad], lr=LEARNING_RATE).step()
        for name, parameter in self.expected.named_parameters():
            self.report("trained weights", relative_error(whole(actual[name].detach()), parameter.detach()))

    def compare_gradients(self, actual: dict[str, nn.Parameter]) -> None:
        """Relative to the norm of the gradient or, where that is tiny, to that of all gradients."""
        gradients = {name: p.grad for name, p in self.expected.named_parameters()}
        total = torch.stack([x.norm() for x in gradients.values() if x is not None]).norm()
        assert actual.keys() == gradients.keys()
        for name, expected in gradients.items():
            if (actual[name].grad is None) != (expected is None):
                raise AssertionError(f"{name} has a gradient in one of the two only")
            if expected is not None:
                error = (whole(actual[name].grad) - expected).norm() / expected.norm().clamp(min=1e-2 * total)
                self.report("gradients", error.item())

    @torch.no_grad()
    def compare_logits(self, model, what: str) -> None:
        for batch in self.steps(0):
            inputs = {name: x for name, x in batch.items() if name != "labels"}
            expected = self.expected(**inputs, use_cache=False).logits
            self.report(what, relative_error(model(**inputs, use_cache=False).logits, expected))

    def compare_generation(self, model) -> None:
        batch = {name: x for name, x in self.steps(0)[0].items() if name in ("input_ids", "attention_mask")}
        if "attention_mask" in batch:  # `generate` continues rows at their right end
            batch = {name: x.flip(1) for name, x in batch.items()}
        arguments = {**batch, "max_new_tokens": 20, "do_sample": False, "output_logits": True}
        runs = [both.generate(**arguments, return_dict_in_generate=True) for both in (model, self.expected)]
        actual, expected = (torch.stack(run.logits) for run in runs)
        self.report("logits of generate", relative_error(actual, expected))
        self.report("tokens of generate", float((runs[0].sequences != runs[1].sequences).any()))


@contextlib.contextmanager
def shared_folder(comparison: Comparison):
    folder = [tempfile.mkdtemp() if comparison.rank == 0 else None]
    distributed.broadcast_object_list(folder)
    try:
        yield folder[0]
    finally:
        distributed.barrier()
        if comparison.rank == 0:
            shutil.rmtree(folder[0])


def _loaded(case: Case, comparison: Comparison, config: DistributedConfig) -> HSAForCausalLM:
    """The model of the case as Transformers spreads it when loading."""
    with shared_folder(comparison) as folder:
        if comparison.rank == 0:
            make_model(case).save_pretrained(folder)
        distributed.barrier()
        model = HSAForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype), distributed_config=config)
    model.set_attn_implementation(comparison.expected.config._attn_implementation)
    return model


def _saved(model, comparison: Comparison) -> HSAForCausalLM:
    """What all processes together save, as one loads it."""
    with shared_folder(comparison) as folder:
        model.save_pretrained(folder)
        distributed.barrier()
        loaded = HSAForCausalLM.from_pretrained(folder, dtype=torch.float32).to(comparison.device)
    loaded.set_attn_implementation(comparison.expected.config._attn_implementation)
    return loaded


def tensor_parallel(case: Case, comparison: Comparison) -> None:
    """All processes read the same: forward, a step of training, and generation."""
    model = _loaded(case, comparison, DistributedConfig(tp_size=comparison.world))
    for both in (model, comparison.expected):
        both.eval()
    comparison.compare_logits(model, "logits")
    prepare(model, case)
    prepare(comparison.expected, case)

    def backward_passes(items: float) -> None:
        for batch in comparison.steps(0):
            model(**batch, num_items_in_batch=items, use_cache=False).loss.backward()

    comparison.train(model, backward_passes, range(1), 1.0)
    comparison.trained = _trained_entries(model)

    for both in (model, comparison.expected):
        both.eval()
    comparison.compare_logits(model, "logits after training")
    comparison.compare_logits(_saved(model, comparison), "logits of the saved model")
    comparison.compare_generation(model)


def _trained_entries(model) -> set[str]:
    """Entries of the plan that have parameters, all of which got a gradient that is not zero."""
    gradients: dict[str, list[float]] = {}
    for name, parameter in model.named_parameters():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split(".")[:-1])
        if pattern in model.tp_plan and parameter.requires_grad:
            gradients.setdefault(pattern, []).append(whole(parameter.grad).norm().item())
    # Of tied weights PyTorch lists the first name only.
    if model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight:
        gradients["lm_head"] = [whole(model.lm_head.weight.grad).norm().item()]
    return {pattern for pattern, norms in gradients.items() if min(norms) > 0}


def tensor_parallel_bf16(case: Case, comparison: Comparison) -> None:
    """What rounding costs is taken from one process in bf16, against fp32: several may lose up to that again."""
    several = prepare(_loaded(case, comparison, DistributedConfig(tp_size=comparison.world)), case)
    one = prepare(make_model(case).to(comparison.device, torch.bfloat16), case)
    (batch,) = comparison.steps(0)
    results = []
    for model in (comparison.expected, one, several):
        outputs = model(**batch, use_cache=False)
        outputs.loss.backward()
        gradients = [whole(parameter.grad).float().flatten() for parameter in model.parameters()]
        results.append({"logits": outputs.logits.detach(), "gradients": torch.cat(gradients)})
    exact, alone, together = results
    for what, expected in exact.items():
        error = relative_error(together[what], expected)
        comparison.excess[what] = error / relative_error(alone[what], expected)


def pipeline(case: Case, comparison: Comparison) -> None:
    _loaded(case, comparison, DistributedConfig(pp_size=comparison.world))


def _train_in_parallel(model, comparison: Comparison, step_context, backward=torch.Tensor.backward) -> None:
    """Every process reads its own documents; gradients are averaged, so the loss is that of 1 / world of the items."""

    def backward_passes(items: float) -> None:
        steps = comparison.steps(comparison.rank)
        for i, batch in enumerate(steps):
            with step_context(i == len(steps) - 1):
                backward(model(**batch, num_items_in_batch=items, use_cache=False).loss)

    comparison.train(model, backward_passes, range(comparison.world), 1 / comparison.world)
    model.eval()
    comparison.expected.eval()
    comparison.compare_logits(model, "logits after training")
    comparison.compare_generation(model.module if isinstance(model, DistributedDataParallel) else model)


def ddp(case: Case, comparison: Comparison) -> None:
    """`find_unused_parameters` is off: every parameter has to get a gradient on every process."""
    devices = [comparison.device] if comparison.device.type == "cuda" else None
    model = DistributedDataParallel(prepare(make_model(case).to(comparison.device), case), device_ids=devices)
    _train_in_parallel(model, comparison, lambda last: contextlib.nullcontext() if last else model.no_sync())


def fully_sharded(case: Case, comparison: Comparison) -> None:
    model = prepare(make_model(case).to(comparison.device), case)
    mesh = distributed.init_device_mesh(comparison.device.type, (comparison.world,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def step_context(last: bool):
        model.set_requires_gradient_sync(last)
        yield

    _train_in_parallel(model, comparison, step_context)


def transformers_fsdp(case: Case, comparison: Comparison) -> None:
    """As Transformers shards by `base_model_fsdp_plan`."""
    model = prepare(_loaded(case, comparison, DistributedConfig(fsdp_size=comparison.world)), case)
    _train_in_parallel(model, comparison, lambda last: contextlib.nullcontext())


def _accelerate(case: Case, comparison: Comparison, kind: type, **arguments) -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=comparison.device.type == "cpu", **arguments)
    model = prepare(make_model(case), case)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))  # FSDP2 wants both
    assert isinstance(model, kind), f"accelerate made a {type(model).__name__} of it"
    _train_in_parallel(
        model,
        comparison,
        lambda last: contextlib.nullcontext() if last else accelerator.no_sync(model),
        accelerator.backward,
    )


def accelerate_ddp(case: Case, comparison: Comparison) -> None:
    _accelerate(case, comparison, DistributedDataParallel)


def accelerate_fsdp(case: Case, comparison: Comparison) -> None:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", activation_checkpointing=False
    )
    _accelerate(case, comparison, FSDPModule, fsdp_plugin=plugin)


STRATEGIES = {
    "tensor_parallel": tensor_parallel,
    "tensor_parallel_bf16": tensor_parallel_bf16,
    "pipeline": pipeline,
    "ddp": ddp,
    "fully_shard": fully_sharded,
    "transformers_fsdp": transformers_fsdp,
    "accelerate_ddp": accelerate_ddp,
    "accelerate_fsdp": accelerate_fsdp,
}


def run_case(case: Case, device: torch.device) -> dict:
    """What this process adds to the result of a case. A refusal that was expected has no errors."""
    comparison = Comparison(case, device)
    try:
        STRATEGIES[case.strategy](case, comparison)
    except ValueError as error:
        if not case.refused or case.refused not in str(error):
            raise
        return {"refused": str(error)}
    if case.refused:
        raise AssertionError(f"no error that says {case.refused}")
    return {"errors": comparison.errors, "excess": comparison.excess, "trained": sorted(comparison.trained)}


def merge(results: list[dict]) -> dict:
    """Of all processes, with the largest errors."""
    merged = dict(results[0])
    for key in ("errors", "excess"):
        if key in merged:
            merged[key] = {what: largest([result[key][what] for result in results]) for what in merged[key]}
    return merged


def run_together(name: str, device: torch.device) -> dict:
    """The result of a case, of all processes."""
    start = time.perf_counter()
    everyone: list[dict | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, run_case(CASES[name], device))
    # Sharded models lie in reference cycles. They take memory, and one that is left when Python exits can abort it.
    gc.collect()
    return {"case": name, "seconds": round(time.perf_counter() - start, 1), **merge(everyone)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help="a key of `cases.CASES`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a case may take, or the start")
    args = parser.parse_args()

    faulthandler.dump_traceback_later(args.limit, exit=True)
    torch.set_num_threads(1)
    device = torch.device(args.device, *([int(os.environ["LOCAL_RANK"])] if args.device == "cuda" else []))
    if args.device == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        for name in args.cases:
            faulthandler.dump_traceback_later(args.limit, exit=True)
            result = run_together(name, device)
            if distributed.get_rank() == 0:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
    except Exception:
        traceback.print_exc()
        os._exit(1)  # an orderly exit would wait for the others
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
