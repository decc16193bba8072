"""Training an HSA model with `Trainer`, accelerate and PEFT gives what the same steps by hand give."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from modeling_hsa import layers
from modeling_hsa.layout import build_layout
from modeling_hsa.ops import chunk_attention
from tests.commands import train
from tests.helpers import relative_error
from tests.models import tiny_model
from tests.rows import random_ids


VOCABULARY = 99
PADDING = 0
# In tokens; chunks have 16, so that some documents have none and one has three.
LENGTHS = (5, 16, 17, 33, 40, 2, 50, 15)


def documents(lengths=LENGTHS, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents that repeat a short random phrase, which a model can learn within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    phrase = torch.randint(1, VOCABULARY, (7,), generator=generator).repeat(max(lengths) // 7 + 2)
    starts = torch.randint(0, 7, (len(lengths),), generator=generator).tolist()
    return [{"input_ids": phrase[start : start + n].tolist()} for start, n in zip(starts, lengths)]


def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collates documents to a batch padded on the right, without loss on the padding."""
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    batch = {
        "input_ids": (rows, PADDING),
        "labels": (rows, -100),
        "attention_mask": ([torch.ones_like(row) for row in rows], 0),
    }
    return {
        name: nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        for name, (values, fill) in batch.items()
    }


def make_trainer(folder, model=None, data=None, collator=pad, **arguments) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    return Trainer(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(**arguments),
        train_dataset=documents() if data is None else data,
        data_collator=collator,
    )


def losses(trainer: Trainer) -> dict[int, float]:
    """Step -> loss as logged."""
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    """Of the loss, for every parameter."""
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5):
    """Every tensor agrees, relative to its own norm or, where that is tiny, to the norm of all of them."""
    total = torch.stack([x.double().norm() for x in expected.values()]).norm()
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        error = (actual[name].double() - x.double()).norm()
        assert error <= tolerance * max(x.double().norm(), 1e-2 * total), f"{name}: {error / x.norm():.1e}"


# -- Trainer --


@pytest.mark.parametrize(
    ("dtype", "bf16"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16 autocast", "bf16 weights"],
)
def test_trainer_trains_every_parameter(tmp_path, dtype, bf16):
    model = tiny_model(initializer_range=0.05).to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = documents([40] * 8)
    trainer = make_trainer(tmp_path, model, data, max_steps=15, bf16=bf16, weight_decay=0.0)
    trainer.train()

    logged = losses(trainer)
    assert all(torch.isfinite(torch.tensor(list(logged.values()))))
    assert logged[15] < logged[1] / 2
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"


def test_gradient_accumulation_equals_a_big_batch(tmp_path):
    """Rows have different numbers of tokens: only a loss normalised by `num_items_in_batch` makes the two agree."""
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        results.append((losses(trainer), dict(trainer.model.state_dict())))
    (big_losses, big), (small_losses, small) = results
    assert small_losses == pytest.approx(big_losses, rel=1e-5)
    assert_close(small, big)


@pytest.mark.parametrize("fields", [{}, {"retrieval_stride": 4}, {"chunk_weighting": "joint"}], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, fields):
    model = tiny_model(**fields).train()
    inputs = pad(documents())
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close(gradients(model, **inputs), expected)


def test_gradient_checkpointing_keeps_less():
    """Checkpointing is on in every layer: what backward needs is recomputed, not kept."""

    def kept_elements() -> int:
        count = 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**inputs, use_cache=False)
        return count

    model = tiny_model().train()
    inputs = pad(documents([200] * 2))
    without = kept_elements()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept_elements() < without / 3


def test_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    whole = make_trainer(tmp_path, **arguments)
    whole.train()
    resumed = make_trainer(tmp_path, tiny_model(seed=1), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert_close(dict(resumed.model.state_dict()), dict(whole.model.state_dict()), tolerance=0)


# -- documents in a batch --


@pytest.mark.parametrize("weighting", ["softmax", "stick_breaking", "joint"])
@pytest.mark.parametrize("collator", [DataCollatorWithFlattening(), pad], ids=["packed", "padded"])
def test_batched_documents_train_like_documents_alone(collator, weighting):
    model = tiny_model(chunk_weighting=weighting).train()
    features = documents()
    items = sum(len(feature["input_ids"]) - 1 for feature in features)

    alone = [
        gradients(model, input_ids=ids, labels=ids, num_items_in_batch=items)
        for ids in (torch.tensor([feature["input_ids"]]) for feature in features)
    ]
    expected = {name: sum(one[name] for one in alone) for name in alone[0]}
    batch = collator(features)
    assert_close(gradients(model, **batch, num_items_in_batch=items), expected)

    model.eval()
    losses_alone = [
        model(ids, labels=ids, num_items_in_batch=items).loss
        for ids in (torch.tensor([feature["input_ids"]]) for feature in features)
    ]
    assert relative_error(model(**batch, num_items_in_batch=items).loss, sum(losses_alone)) < 1e-5


def test_trainer_takes_packed_documents(tmp_path):
    """A step on documents packed in one row is the step on the same documents padded."""
    arguments = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    packed = make_trainer(tmp_path, collator=DataCollatorWithFlattening(), **arguments)
    padded = make_trainer(tmp_path, **arguments)
    for trainer in (packed, padded):
        trainer.train()
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    assert_close(dict(packed.model.state_dict()), dict(padded.model.state_dict()))


# -- several processes --


@pytest.mark.parametrize("length", [1, 2, 15, 16, 40])
@pytest.mark.parametrize(
    "fields", [{}, {"chunk_landmark": "mean", "num_encoder_layers": 0}, {"chunk_weighting": "joint"}], ids=str
)
def test_every_parameter_gets_a_gradient_at_any_length(length, fields):
    """Where a text is shorter than a chunk the gradient of the chunk memory is zero, not missing: data-parallel
    training waits for all."""
    ids = torch.randint(1, VOCABULARY, (2, length))
    model = tiny_model(**fields).train()
    model(ids, use_cache=False).logits.sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("length", [5, 40])
def test_backward_of_the_encoder_reaches_its_input_at_any_length(length):
    """Where it ends FSDP reduces its gradients, which all processes have to do in the same order."""
    model = tiny_model().train()
    hidden_states = torch.randn(2, length, model.config.hidden_size, requires_grad=True)
    layout = build_layout(2, length, hidden_states.device, chunk_size=model.config.chunk_size)
    encoded = model.model.chunk_encoder(hidden_states, layout)
    assert encoded.keys.shape[1] == length // model.config.chunk_size
    sum(x.sum() for x in encoded).backward()
    assert hidden_states.grad is not None and hidden_states.grad.any() == (length > 16)


# `accelerate launch --cpu` starts several processes through MPI only: `--multi_gpu` is what does here too.
LAUNCHERS = {
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "block_size"), [("accelerate", 64), ("torchrun", 8)], ids=["chunks", "shorter than a chunk"]
)
def test_two_processes_match_one(tmp_path, launcher, block_size):
    """The same global batch. Parameters without a gradient would be an error: DDP is not told to look for them."""
    arguments = {
        "block_size": block_size,
        "max_steps": 3,
        "ddp_find_unused_parameters": False,
        "train_sampling_strategy": "sequential",
        "per_device_eval_batch_size": 1,  # of unequal batches `Trainer` averages the means
    }
    one = train(tmp_path / "one", per_device_train_batch_size=4, **arguments)
    two = train(tmp_path / "two", launcher=("-m", *LAUNCHERS[launcher]), per_device_train_batch_size=2, **arguments)
    assert two["train"] == pytest.approx(one["train"], rel=1e-5)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)


@pytest.fixture
def process_group():
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("lengths", [LENGTHS, (5, 3)], ids=["chunks", "shorter than a chunk"])
def test_fully_sharded_model_gives_the_same_gradients(process_group, lengths, checkpointing):
    """
    Sharded parameters exist inside of the forward of their module only: anything that reads them elsewhere fails, or
    goes without its gradient.
    """
    inputs = pad(documents(lengths))
    expected = gradients(tiny_model().train(), **inputs)
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=process_group)
    fully_shard(model, mesh=process_group)
    sharded = gradients(model, **inputs)
    assert_close({name: gradient.full_tensor() for name, gradient in sharded.items()}, expected)


# -- PEFT --


def lora_model(seed: int = 0):
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    return get_peft_model(tiny_model(), config)


def test_lora_reaches_and_trains_every_linear_layer(tmp_path):
    model = lora_model()
    linear = [name for name, module in tiny_model().named_modules() if isinstance(module, nn.Linear)]
    adapted = {name for name, _ in model.named_parameters() if "lora_B" in name}
    for name in linear:
        assert any(f".{name}." in parameter for parameter in adapted) == (name != "lm_head"), name

    make_trainer(tmp_path, model, documents([40] * 8), max_steps=5).train()
    for name, parameter in model.named_parameters():
        if name in adapted:  # starts at zero
            assert parameter.abs().max() > 0, f"{name} was not trained"


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_lora_trains_with_gradient_checkpointing(tmp_path, use_reentrant):
    results = []
    for arguments in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
    ):
        trainer = make_trainer(tmp_path, lora_model(), max_steps=3, **arguments)
        trainer.train()
        results.append(losses(trainer))
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_lora_adapters_save_load_and_merge(tmp_path):
    model = lora_model()
    make_trainer(tmp_path, model, max_steps=3).train()
    model.eval()
    ids = torch.randint(1, VOCABULARY, (2, 50))
    with torch.no_grad():
        expected = model(ids).logits
        assert relative_error(tiny_model()(ids).logits, expected) > 1e-3  # the adapters do something

        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(ids).logits, expected)
        merged = loaded.merge_and_unload()
        assert relative_error(merged(ids).logits, expected) < 1e-4

        merged.save_pretrained(tmp_path / "merged")
        reloaded = type(merged).from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(reloaded(ids).logits, merged(ids).logits)


def test_autocast_runs_chunk_attention_in_half_precision_as_it_does_attention(monkeypatch):
    model, dtypes = tiny_model(), []

    def spy(query, keys, values, *arguments, **keywords):
        dtypes.append((query.dtype, keys.dtype, values.dtype))
        return chunk_attention(query, keys, values, *arguments, **keywords)

    monkeypatch.setattr(layers, "chunk_attention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(1, 60))
    assert dtypes == [(torch.bfloat16,) * 3] * model.config.num_upper_groups
