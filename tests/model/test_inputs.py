"""
Contract 9 of the design, bad input gets a clear error that names it, and what the forward of the models offers:
losses, logits of some tokens, hidden states, attentions, what was retrieved, attention and HSA backends, heads,
embeddings.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_hsa import (
    HSACache,
    HSAForCausalLM,
    HSAForQuestionAnswering,
    HSAForSequenceClassification,
    HSAForTokenClassification,
    HSAModel,
)
from modeling_hsa.naming import CACHE
from tests.helpers import relative_error
from tests.models import tiny_config, tiny_model


VOCABULARY, HIDDEN = 99, 32


def tokens(batch: int = 2, length: int = 70, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> HSAForCausalLM:
    """Shared: do not change it."""
    return tiny_model()


def make_head(cls, **overrides):
    torch.manual_seed(0)
    return cls(tiny_config(pad_token_id=0, **overrides)).eval()


# -- bad inputs -------------------------------------------------------------------------------------------------------


BAD_TOKENS = {  # inputs, the error, and what it says
    "empty batch": (
        {"input_ids": torch.zeros(0, 5, dtype=torch.long)},
        ValueError,
        r"`input_ids`.*at least one row.*\[0, 5\]",
    ),
    "no tokens": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ValueError, r"`input_ids`.*one token.*\[2, 0\]"),
    "one dimension": ({"input_ids": torch.zeros(5, dtype=torch.long)}, ValueError, r"`input_ids`.*\[batch, tokens\]"),
    "float ids": ({"input_ids": torch.zeros(2, 5)}, ValueError, "`input_ids`.*int64.*torch.float32"),
    "bool ids": ({"input_ids": torch.zeros(2, 5).bool()}, ValueError, "`input_ids`.*int64.*torch.bool"),
    "list of ids": ({"input_ids": [[1, 2, 3]]}, TypeError, "`input_ids`.*tensor.*list"),
    "id too large": (
        {"input_ids": torch.tensor([[3, 99]])},
        ValueError,
        r"`input_ids`.*\[0, 99\).*3 to 99.*tokenizer",
    ),
    "negative id": ({"input_ids": torch.tensor([[3, -100]])}, ValueError, r"`input_ids`.*\[0, 99\).*-100 to 3"),
    "neither": ({}, ValueError, "exactly one of `input_ids` and `inputs_embeds`"),
    "both": (
        {"input_ids": tokens(), "inputs_embeds": torch.zeros(2, 70, HIDDEN)},
        ValueError,
        "exactly one of `input_ids` and `inputs_embeds`",
    ),
    "empty embeddings": (
        {"inputs_embeds": torch.zeros(0, 5, 32)},
        ValueError,
        r"`inputs_embeds`.*one row.*\[0, 5, 32\]",
    ),
    "no embeddings": (
        {"inputs_embeds": torch.zeros(2, 0, 32)},
        ValueError,
        r"`inputs_embeds`.*one token.*\[2, 0, 32\]",
    ),
    "flat embeddings": ({"inputs_embeds": torch.zeros(2, 32)}, ValueError, r"`inputs_embeds`.*hidden_size.*\[2, 32\]"),
    "embeddings of another width": (
        {"inputs_embeds": torch.zeros(2, 5, 31)},
        ValueError,
        r"`inputs_embeds`.*hidden_size.*32.*\[2, 5, 31\]",
    ),
    "integer embeddings": (
        {"inputs_embeds": torch.zeros(2, 5, 32).long()},
        ValueError,
        "`inputs_embeds`.*torch.int64",
    ),
    "half-precision embeddings": (
        {"inputs_embeds": torch.zeros(2, 5, 32, dtype=torch.float16)},
        ValueError,
        r"`inputs_embeds` is torch.float16, but the model is torch.float32.*`inputs_embeds.to\(model.dtype\)`",
    ),
    "list of embeddings": ({"inputs_embeds": [[[0.0] * 32]]}, TypeError, "`inputs_embeds`.*tensor.*list"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_refused(model, name):
    inputs, error, message = BAD_TOKENS[name]
    with pytest.raises(error, match=message):
        model(**inputs)


BESIDE_TWO_ROWS_OF_70_TOKENS = {
    "short mask": ({"attention_mask": torch.ones(2, 69)}, ValueError, r"`attention_mask`.*\[2, 70\].*got \[2, 69\]"),
    "mask of one row": ({"attention_mask": torch.ones(1, 70)}, ValueError, r"`attention_mask`.*got \[1, 70\]"),
    "flat mask": ({"attention_mask": torch.ones(70)}, ValueError, r"`attention_mask`.*\[2, 70\].*got \[70\]"),
    "4D mask": ({"attention_mask": torch.ones(2, 1, 70, 70)}, ValueError, r"`attention_mask`.*got \[2, 1, 70, 70\]"),
    "mask to be added": (
        {"attention_mask": torch.zeros(2, 70).masked_fill(torch.arange(70) < 3, float("-inf"))},
        ValueError,
        "`attention_mask`.*0 for padding.*got -inf",
    ),
    "NaN in the mask": (
        {"attention_mask": torch.ones(2, 70).index_fill(1, torch.tensor(3), float("nan"))},
        ValueError,
        "`attention_mask`.*got nan",
    ),
    "complex mask": (
        {"attention_mask": torch.ones(2, 70, dtype=torch.complex64)},
        ValueError,
        "`attention_mask`.*com",
    ),
    "list as mask": ({"attention_mask": [[1] * 70] * 2}, TypeError, "`attention_mask`.*tensor.*list"),
    "masks by layer type": (
        {"attention_mask": {"full_attention": torch.ones(2, 70)}},
        TypeError,
        "`attention_mask`.*tensor.*dict",
    ),
    "short positions": ({"position_ids": torch.arange(69)[None]}, ValueError, r"`position_ids`.*\[2, 70\].*\[1, 69\]"),
    "positions of three rows": (
        {"position_ids": torch.arange(70).expand(3, -1)},
        ValueError,
        r"`position_ids`.*\[3, 70\]",
    ),
    "flat positions": ({"position_ids": torch.arange(70)}, ValueError, r"`position_ids`.*got \[70\]"),
    "float positions": ({"position_ids": torch.arange(70.0)[None]}, ValueError, "`position_ids`.*torch.float32"),
    "boolean positions": ({"position_ids": torch.ones(1, 70).bool()}, ValueError, "`position_ids`.*torch.bool"),
    "complex positions": (
        {"position_ids": torch.zeros(1, 70, dtype=torch.complex64), "use_cache": True},
        ValueError,
        "`position_ids`.*torch.complex64",
    ),
    "positions that fp64 does not tell apart": (
        {"position_ids": torch.arange(70)[None] + 2**60},
        ValueError,
        r"`position_ids`.*2\*\*53.*1152921504606847045",
    ),
    "list of positions": ({"position_ids": [list(range(70))]}, TypeError, "`position_ids`.*tensor.*list"),
    "foreign cache": (
        {"past_key_values": DynamicCache()},
        TypeError,
        "`past_key_values`.*HSACache, got DynamicCache.*use_cache",
    ),
    "tuple as cache": ({"past_key_values": ((1, 2),)}, TypeError, "`past_key_values`.*HSACache, got tuple"),
    "bounds that are a list": ({"cu_seq_lens_q": [0, 70]}, TypeError, "`cu_seq_lens_q`.*tensor.*list"),
    "bounds of two rows": (
        {"cu_seq_lens_q": torch.tensor([0, 30, 70])},
        ValueError,
        r"`cu_seq_lens_q`.*one row, got \[3\] for 2 rows",
    ),
    "short indices of documents": (
        {"seq_idx": torch.zeros(2, 69).int()},
        ValueError,
        r"`seq_idx`.*\[2, 70\], got \[2, 69\]",
    ),
    "float indices of documents": ({"seq_idx": torch.zeros(2, 70)}, ValueError, "`seq_idx` must be int64 or int32"),
    "indices of documents with a mask": (
        {"seq_idx": torch.zeros(2, 70).int(), "attention_mask": torch.ones(2, 70)},
        ValueError,
        "`seq_idx` beside an `attention_mask`.*needs `position_ids`",
    ),
    "segments": (
        {"token_type_ids": torch.ones(2, 70).long()},
        ValueError,
        r"`token_type_ids` must be zeros of the shape \[2, 70\].*Leave it out",
    ),
    "two directions": ({"is_causal": False}, ValueError, "`is_causal=False`.*Leave it out"),
    "misspelt keyword": ({"output_retreival": True}, TypeError, "`output_retreival`.*Did you mean `output_retrieval`"),
    "misspelt argument": ({"atention_mask": torch.ones(2, 70)}, TypeError, "`atention_mask`.*mean `attention_mask`"),
    "unknown keyword": ({"foo": 1}, TypeError, "`foo` is not an argument.*Leave it out"),
    "labels that are too large": (
        {"labels": torch.full((2, 70), 99)},
        ValueError,
        r"`labels` must be in \[0, 99\) or -100, got labels from 99 to 99",
    ),
    "negative labels": ({"labels": torch.full((2, 70), -1)}, ValueError, r"`labels`.*\[0, 99\) or -100"),
    "float labels": ({"labels": torch.ones(2, 70)}, ValueError, "`labels` must be int64, got torch.float32"),
    "short labels": ({"labels": torch.ones(2, 69).long()}, ValueError, r"`labels`.*\[2, 70\], got \[2, 69\]"),
    "list of labels": ({"labels": [[1] * 70] * 2}, TypeError, "`labels`.*tensor.*list"),
    "shifted labels that are too large": (
        {"shift_labels": torch.full((2, 70), 99)},
        ValueError,
        r"`shift_labels` must be in \[0, 99\)",
    ),
    "labels without logits": (
        {"labels": tokens(), "logits_to_keep": 1},
        ValueError,
        "`labels` need the logits of all tokens.*`logits_to_keep`",
    ),
    "a fraction of the logits": ({"logits_to_keep": 0.5}, ValueError, "`logits_to_keep` must be an integer.*got 0.5"),
    "negative number of logits": ({"logits_to_keep": -1}, ValueError, "`logits_to_keep`.*at least 0.*got -1"),
    "a switch for logits": ({"logits_to_keep": True}, ValueError, "`logits_to_keep` must be an integer.*got True"),
    "logits of tokens beyond": (
        {"logits_to_keep": torch.tensor([3, 70])},
        ValueError,
        r"`logits_to_keep` must be in \[0, 70\), got indices from 3 to 70",
    ),
    "a mask of logits": ({"logits_to_keep": torch.ones(70).bool()}, ValueError, "`logits_to_keep`.*torch.bool"),
    "logits by row": ({"logits_to_keep": torch.zeros(2, 3).long()}, ValueError, r"`logits_to_keep`.*\[2, 3\]"),
    "attentions of sdpa": ({"output_attentions": True}, ValueError, "`output_attentions=True` needs.*'eager'.*'sdpa'"),
}


@pytest.mark.parametrize("name", BESIDE_TWO_ROWS_OF_70_TOKENS)
def test_what_does_not_fit_the_tokens_is_refused(model, name):
    inputs, error, message = BESIDE_TWO_ROWS_OF_70_TOKENS[name]
    with pytest.raises(error, match=message):
        model(tokens(), **inputs)


@torch.no_grad()
def test_mask_has_to_cover_the_cached_tokens_too(model):
    cache = HSACache(model.config)
    model(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"`attention_mask`.*\[2, 75\].*cached \+ new.*got \[2, 5\]"):
        model(tokens(2, 5), attention_mask=torch.ones(2, 5), past_key_values=cache)


@torch.no_grad()
def test_cache_of_another_batch_size_is_refused(model):
    cache = HSACache(model.config)
    model(tokens(2), past_key_values=cache)
    with pytest.raises(ValueError, match="`past_key_values` holds 2 rows but the tokens have 3"):
        model(tokens(3), past_key_values=cache)


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_size": 32},
        {"sliding_window": 20},
        {"num_lower_layers": 3},
        {"num_upper_groups": 1},
        {"retrieval_stride": 2},
    ],
    ids=str,
)
def test_cache_of_another_model_is_refused(model, changes):
    (field,) = changes
    # Counts of layers are short for their kinds.
    field = "layer_types" if field in ("num_lower_layers", "num_upper_groups") else field
    with pytest.raises(ValueError, match=f"`past_key_values`.*{field}.*HSACache"):
        model(tokens(), past_key_values=HSACache(tiny_config(**changes)))


@pytest.mark.parametrize("cls", [HSAModel, HSAForCausalLM, HSAForTokenClassification])
def test_configuration_of_another_model_is_refused(cls):
    with pytest.raises(TypeError, match=f"{cls.__name__} needs an HSAConfig, got LlamaConfig.*'llama'"):
        cls(LlamaConfig(num_hidden_layers=1))


def test_labels_are_for_models_with_a_head(model):
    with pytest.raises(TypeError, match="`labels`.*with a head"):
        model.model(tokens(), labels=tokens())


@torch.no_grad()
def test_bad_arguments_of_the_head_leave_the_cache_as_it_was(model):
    cache = HSACache(model.config)
    for bad in ({"labels": tokens() + 99}, {"logits_to_keep": -1}, {"foo": 1}):
        with pytest.raises((TypeError, ValueError)):
            model(tokens(), past_key_values=cache, **bad)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_keywords_that_others_pass_go_through(model):
    expected = model(tokens()).logits
    for keywords in (
        {"token_type_ids": torch.zeros(2, 70).long()},  # tokenizers of other models
        {"return_loss": True, "num_items_in_batch": 3},  # Trainer
        {"output_hidden_states": True, "output_attentions": False, "output_retrieval": True, "return_dict": True},
        {"is_causal": True},
        {"max_length_q": 70, "max_length_k": 70},
        {"head_mask": None, "cache_position": None, "labels": None},  # what is None asks for nothing
    ):
        assert torch.equal(model(tokens(), **keywords).logits, expected), keywords


@torch.no_grad()
def test_embeddings_of_another_dtype_are_cast_by_autocast(model):
    embeddings = model.get_input_embeddings()(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(inputs_embeds=embeddings.bfloat16()).logits.isfinite().all()
    half = tiny_model().to(torch.bfloat16)
    assert half(inputs_embeds=embeddings.bfloat16()).logits.dtype == torch.bfloat16


# -- documents told of in other forms ---------------------------------------------------------------------------------


def packed(collator) -> dict:
    """Documents of 23, 1, 40 and 6 tokens in one row, as the collator gives them."""
    return collator([{"input_ids": ids.tolist()} for ids in tokens(1)[0].split([23, 1, 40, 6])])


FORMS = {
    "flash attention": {"return_flash_attn_kwargs": True},
    "indices of documents": {"return_seq_idx": True},
    "both": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("with_positions", [True, False])
def test_bounds_of_documents_are_obeyed_in_every_form(model, form, with_positions):
    batch = packed(DataCollatorWithFlattening(return_position_ids=with_positions, **form))
    assert ("position_ids" in batch) is with_positions
    expected = [model(ids[None], labels=ids[None]) for ids in tokens(1)[0].split([23, 1, 40, 6])]
    outputs = model(**batch)
    assert relative_error(outputs.logits, torch.cat([one.logits for one in expected], dim=1)) <= 1e-5
    counts = torch.tensor([22, 0, 39, 5])
    mean = sum(one.loss * n for one, n in zip(expected, counts) if n) / counts.sum()
    assert outputs.loss.item() == pytest.approx(mean.item(), rel=1e-5)


@torch.no_grad()
def test_keys_alone_tell_where_documents_start(model):
    bounds = torch.tensor([0, 30, 30, 70])  # a document without tokens changes nothing
    expected = model(tokens(1), cu_seq_lens_q=bounds).logits
    assert relative_error(expected[:, 30:], model(tokens(1)[:, 30:]).logits) <= 1e-5
    assert torch.equal(model(tokens(1), cu_seq_lens_k=bounds).logits, expected)
    with pytest.raises(ValueError, match="`cu_seq_lens_k` and `cu_seq_lens_q` do not agree"):
        model(tokens(1), cu_seq_lens_q=bounds, cu_seq_lens_k=torch.tensor([0, 70]))


@pytest.mark.parametrize("bounds", [[0, 30], [1, 70], [0, 40, 30, 70], [0, 71], [70]], ids=str)
def test_bounds_that_are_none_of_the_row_are_refused(model, bounds):
    with pytest.raises(ValueError, match="`cu_seq_lens_q`"):
        model(tokens(1), cu_seq_lens_q=torch.tensor(bounds))


def test_bounds_that_do_not_agree_with_the_positions_are_refused(model):
    restart = torch.cat([torch.arange(30), torch.arange(40)])[None]
    for name, value in (
        ("cu_seq_lens_q", torch.tensor([0, 31, 70])),
        ("seq_idx", (torch.arange(70) > 30).int()[None]),
    ):
        for position_ids in (restart, torch.arange(70)[None]):
            with pytest.raises(ValueError, match=f"`{name}` and `position_ids` do not agree"):
                model(tokens(1), position_ids=position_ids, **{name: value})


@torch.no_grad()
def test_bounds_beside_cached_tokens_need_positions(model):
    cache = model(tokens(1)[:, :20], use_cache=True)[CACHE]
    bounds = torch.tensor([0, 20, 50])
    with pytest.raises(ValueError, match="`cu_seq_lens_q` beside.*cached tokens needs `position_ids`"):
        model(tokens(1)[:, 20:], past_key_values=cache, cu_seq_lens_q=bounds)


def test_forced_triton_is_refused_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="'triton'"):
        tiny_model(hsa_implementation="triton")(tokens())


def test_unknown_cache_implementation_is_refused(model):
    with pytest.raises(ValueError, match="`cache_implementation='quantized'`.*'offloaded'"):
        model.generate(tokens(), max_new_tokens=2, cache_implementation="quantized")


# -- bad folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_folder_of_another_model_is_refused(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama'"):
        HSAForCausalLM.from_pretrained(tmp_path)


def test_configuration_that_says_another_model_type_is_refused(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama'"):
        HSAForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(OSError, match=missing):
        HSAForCausalLM.from_pretrained(folder)


def test_configuration_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match="config.json.*not a valid JSON"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=lambda n: f"{n} bytes")
def test_truncated_weights_are_refused(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(Exception, match="(?i)header|incomplete|safetensors"):
        HSAForCausalLM.from_pretrained(folder)


def test_tampered_header_is_refused(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:8] + content[8:].replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1))
    with pytest.raises(Exception, match="(?i)header|offset"):
        HSAForCausalLM.from_pretrained(folder)


def change_weights(folder, change) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_weights_of_another_shape_are_refused(folder):
    name = "model.chunk_encoder.landmark_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(8, HIDDEN)}))
    with pytest.raises(RuntimeError, match="mismatched"):
        HSAForCausalLM.from_pretrained(folder)


def test_missing_and_unexpected_weights_are_reported(folder):
    name = "model.chunk_encoder.cls_token"

    def rename(weights):
        weights["model.cls_token"] = weights.pop(name)

    change_weights(folder, rename)
    _, report = HSAForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    assert set(report["unexpected_keys"]) == {"model.cls_token"}


# -- forward of the causal model --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_token_ids_of_either_dtype(model, dtype):
    assert torch.equal(model(tokens().to(dtype)).logits, model(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_embeddings_in_place_of_token_ids(model, use_cache):
    embeddings = model.get_input_embeddings()(tokens())
    expected = model(tokens(), use_cache=use_cache)
    outputs = model(inputs_embeds=embeddings, use_cache=use_cache)
    assert torch.equal(outputs.logits, expected.logits)
    assert (outputs.past_key_values is not None) is use_cache


def test_gradient_reaches_given_embeddings(model):
    embeddings = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=tokens()).loss.backward()
    assert (embeddings.grad.norm(dim=-1)[:, :-1] > 0).all()  # the last token has nothing to predict
    model.zero_grad()


@torch.no_grad()
def test_loss_is_the_mean_over_predicted_tokens(model):
    labels = tokens().clone()
    labels[0, :20], labels[1, 5] = -100, -100
    outputs = model(tokens(), labels=labels)
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    assert outputs.loss.item() == pytest.approx((losses.sum() / (labels[:, 1:] != -100).sum()).item(), rel=1e-5)


def test_loss_is_normalised_by_num_items_in_batch(model):
    # What gradient accumulation needs: two halves add up to the whole, though one has fewer labels.
    labels = tokens(4).clone()
    labels[:2, :50] = -100
    items = (labels[:, 1:] != -100).sum()
    whole = model(tokens(4), labels=labels).loss
    halves = [
        model(tokens(4)[rows], labels=labels[rows], num_items_in_batch=items).loss
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert sum(halves).item() == pytest.approx(whole.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in (whole, sum(halves))]
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


def test_shifted_labels_give_the_loss_of_labels(model):
    expected = model(tokens(), labels=tokens()).loss
    shifted = torch.nn.functional.pad(tokens()[:, 1:], (0, 1), value=-100)
    assert model(tokens(), shift_labels=shifted).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ignored = tokens().masked_fill(torch.arange(70) < 9, -1)
    expected = model(tokens(), labels=ignored.masked_fill(ignored == -1, -100)).loss
    assert model(tokens(), labels=ignored, ignore_index=-1).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 7, 70, 500, torch.tensor([0, 3, 69]), torch.tensor([5, 5])], ids=str)
def test_logits_to_keep(model, kept):
    expected = model(tokens()).logits
    expected = expected[:, -kept:] if isinstance(kept, int) else expected[:, kept]
    logits = model(tokens(), logits_to_keep=kept).logits
    assert logits.shape == expected.shape and relative_error(logits, expected) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("attention_mask", [False, True])
def test_hidden_states(model, attention_mask):
    mask = torch.ones_like(tokens())
    mask[0, -9:] = 0
    outputs = model.model(tokens(), attention_mask=mask if attention_mask else None, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert all(x.shape == (2, 70, HIDDEN) for x in outputs.hidden_states)
    real = mask.bool() if attention_mask else torch.ones_like(mask, dtype=torch.bool)
    assert torch.equal(outputs.hidden_states[0][real], model.get_input_embeddings()(tokens())[real])
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    logits = model(tokens(), attention_mask=mask if attention_mask else None).logits
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), logits)
    causal = model(tokens(), attention_mask=mask if attention_mask else None, output_hidden_states=True)
    for actual, expected in zip(causal.hidden_states, outputs.hidden_states):
        assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 12, 13, 200])
def test_attentions_are_those_of_the_window(length):
    model = tiny_model()
    model.set_attn_implementation("eager")
    x = tokens(2, length)
    outputs = model(x, output_attentions=True, use_cache=False)
    assert len(outputs.attentions) == model.config.num_hidden_layers
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) & (back < model.config.sliding_window)
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, length, length)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, length))
        assert weights[..., ~seen].count_nonzero() == 0 and (weights[..., seen] > 0).all()

    # Those of the first layer, by their definition.
    layer = model.model.layers[0]
    positions = model.model.rotary_emb(torch.zeros(()), torch.arange(length)[None])
    query, key, _ = layer.self_attn.project(layer.input_layernorm(model.get_input_embeddings()(x)), positions)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * model.config.head_dim**-0.5
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    assert relative_error(outputs.attentions[0], expected) <= 1e-5
    assert relative_error(outputs.logits, model(x).logits) <= 1e-5


@torch.no_grad()
def test_hsa_layers_without_local_attention_have_no_attentions():
    model = tiny_model(hsa_local_attention=False)
    model.set_attn_implementation("eager")
    assert len(model(tokens(), output_attentions=True).attentions) == 3  # one lower layer, two upper ones


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"chunk_topk": 9}, {"num_retrieval_heads": 2}, {"retrieval_stride": 5},
                                    {"chunk_weighting": "stick_breaking"}, {"chunk_weighting": "joint"}],
                         ids=str)  # fmt: skip
def test_retrieval(fields):
    model = tiny_model(**fields)
    outputs = model(tokens(), output_retrieval=True)
    config, stride = model.config, model.config.retrieval_stride
    assert len(outputs.retrieval) == config.num_upper_groups
    start = torch.arange(70) // stride * stride  # the token whose retrieval each shares
    visible = (start // config.chunk_size)[None, :, None].expand(2, 70, config.num_retrieval_heads)
    for retrieved in outputs.retrieval:
        indices, scores = retrieved.indices, retrieved.scores
        assert indices.shape == scores.shape == (2, 70, config.num_retrieval_heads, config.chunk_topk)
        present = indices >= 0
        assert torch.equal(present.sum(-1), visible.clamp(max=config.chunk_topk))
        assert ((indices + 1) * config.chunk_size <= start[None, :, None, None])[present].all()  # strictly in the past
        assert (indices.diff(dim=-1) < 0)[present[..., 1:]].all()  # nearest first, none twice
        assert scores[present].isfinite().all() and (scores[~present] == float("-inf")).all()
        if config.chunk_weighting == "joint":
            assert retrieved.weights is None
            continue
        weights = retrieved.weights
        assert weights.dtype == torch.float32 and (weights[present] > 0).all()
        assert (weights[~present] == 0).all()
        total = weights.sum(-1)
        if config.chunk_weighting == "softmax":
            assert torch.allclose(total, present.any(-1).float())
        else:
            assert ((total <= 1 + 1e-6) & ((total > 0) == present.any(-1))).all()
    assert model(tokens()).retrieval is None
    assert len(model.model(tokens(), output_retrieval=True).retrieval) == config.num_upper_groups


@torch.no_grad()
def test_retrieval_of_a_decoded_token_counts_chunks_from_the_start(model):
    expected = model(tokens(), output_retrieval=True).retrieval
    cache = model(tokens()[:, :-1], use_cache=True).past_key_values
    actual = model(tokens()[:, -1:], past_key_values=cache, output_retrieval=True).retrieval
    for one, all_ in zip(actual, expected):
        assert torch.equal(one.indices, all_.indices[:, -1:])
        assert relative_error(one.weights, all_.weights[:, -1:]) <= 1e-5


@torch.no_grad()
def test_retrieval_of_padded_rows_is_in_the_order_of_the_input(model):
    # Chunks are counted from the first real token of the row.
    x, mask = tokens(2), torch.ones(2, 70, dtype=torch.long)
    mask[0, 41:] = 0
    mask[1, :13] = 0
    padded = model(x, attention_mask=mask, output_retrieval=True).retrieval
    for row in range(2):
        alone = model(x[row : row + 1, mask[row] != 0], output_retrieval=True).retrieval
        for actual, expected in zip(padded, alone):
            assert torch.equal(actual.indices[row, mask[row] != 0], expected.indices[0])
            assert relative_error(actual.weights[row, mask[row] != 0], expected.weights[0]) <= 1e-5


@torch.no_grad()
def test_outputs_as_a_tuple(model):
    outputs = model(tokens(), output_hidden_states=True, use_cache=False)
    logits, hidden_states = model(tokens(), output_hidden_states=True, use_cache=False, return_dict=False)
    assert torch.equal(logits, outputs.logits) and len(hidden_states) == len(outputs.hidden_states)


# -- backends ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 12, 300])
@pytest.mark.parametrize("length", [1, 70, 200])
def test_eager_equals_sdpa(length, window):
    model = tiny_model(sliding_window=window, chunk_topk=50)  # all chunks: rounding cannot change which
    x, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    for arguments in ({}, {"attention_mask": mask}):
        model.set_attn_implementation("sdpa")
        expected = model(x, **arguments).logits
        model.set_attn_implementation("eager")
        actual = model(x, **arguments).logits
        for a, b, real in zip(actual, expected, mask if arguments else torch.ones_like(mask)):
            assert relative_error(a[real != 0], b[real != 0]) <= 1e-5


@pytest.fixture
def flex_attention() -> str:
    """Skips where FlexAttention, which has to be compiled, cannot be."""
    model = tiny_model(num_upper_groups=1, num_upper_layers=0)
    model.set_attn_implementation("flex_attention")
    torch._dynamo.reset()
    # PyTorch's C++ for shapes that vary from call to call does not compile in every version: have one program a shape.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False), torch.no_grad():
        try:
            model(tokens(1, 20))
        except Exception as error:
            pytest.skip(f"FlexAttention cannot be compiled here: {type(error).__name__}: {error}")
        yield "flex_attention"
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("length", [70, 200])
def test_flex_attention_equals_sdpa(flex_attention, length):
    model = tiny_model(chunk_topk=50)
    x, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    for arguments in ({}, {"attention_mask": mask}):
        model.set_attn_implementation("sdpa")
        expected = model(x, **arguments).logits
        model.set_attn_implementation(flex_attention)
        actual = model(x, **arguments).logits
        for a, b, real in zip(actual, expected, mask if arguments else torch.ones_like(mask)):
            assert relative_error(a[real != 0], b[real != 0]) <= 1e-5


@pytest.mark.slow
def test_flex_attention_generates(flex_attention):
    model = tiny_model()
    expected = model.generate(tokens(), max_new_tokens=6, do_sample=False)
    model.set_attn_implementation(flex_attention)
    assert torch.equal(model.generate(tokens(), max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weighting", ["softmax", "stick_breaking", "joint"])
def test_naive_and_torch_backends_agree(weighting, padded):
    results = {}
    for implementation in ("naive", "torch", "auto"):
        model = tiny_model(chunk_weighting=weighting, hsa_implementation=implementation, num_retrieval_heads=2)
        mask = torch.ones_like(tokens())
        mask[0, : 20 * padded] = 0
        outputs = model(tokens(), attention_mask=mask, labels=tokens().masked_fill(mask == 0, -100))
        outputs.loss.backward()
        results[implementation] = (outputs.logits, {name: p.grad for name, p in model.named_parameters()})
    expected_logits, expected = results["naive"]
    for implementation in ("torch", "auto"):
        logits, gradients = results[implementation]
        assert relative_error(logits, expected_logits) <= 1e-5
        for name, gradient in expected.items():
            assert (gradients[name] is None) == (gradient is None), name
            if gradient is not None and gradient.any():
                assert relative_error(gradients[name], gradient) <= 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["naive", "torch"])
def test_autocast_does_not_change_the_precision_of_selection(implementation):
    # Scores are computed in fp32 from what autocast's projections gave in bf16.
    model = tiny_model(hsa_implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(tokens(), output_retrieval=True)
    for retrieved in outputs.retrieval:
        assert retrieved.scores.dtype == torch.float32 and retrieved.weights.dtype == torch.float32
        scores = retrieved.scores[retrieved.indices >= 0]
        assert (scores.to(torch.bfloat16).float() != scores).float().mean() > 0.9


# -- heads ------------------------------------------------------------------------------------------------------------


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 70, 40 and 1 tokens, padded with token 0 at the right, at both ends and at the left."""
    x, mask = tokens(3), torch.ones(3, 70, dtype=torch.long)
    mask[1, :10], mask[1, 50:] = 0, 0
    mask[2, :-1] = 0
    return x * mask, mask


@torch.no_grad()
def test_sequence_classification_of_padded_rows_equals_that_of_the_rows_alone():
    model = make_head(HSAForSequenceClassification, num_labels=3)
    x, mask = padded_batch()
    logits = model(x, attention_mask=mask).logits
    assert logits.shape == (3, 3)
    for row in range(3):
        assert relative_error(logits[row], model(x[row : row + 1, mask[row] != 0]).logits[0]) <= 1e-5


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])),
    ],
)
def test_sequence_classification_trains(problem, labels):
    model = make_head(HSAForSequenceClassification, num_labels=3, problem_type=problem).train()
    x, mask = padded_batch()
    loss = model(x, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.score.weight.grad.any() and model.model.layers[-1].mlp.up_proj.weight.grad.any()


def test_token_classification_of_padded_rows():
    model = make_head(HSAForTokenClassification, num_labels=5)
    x, mask = padded_batch()
    outputs = model(x, attention_mask=mask, labels=(x % 5).masked_fill(mask == 0, -100))
    assert outputs.logits.shape == (3, 70, 5)
    alone = [model(x[row : row + 1, mask[row] != 0], labels=x[row : row + 1, mask[row] != 0] % 5) for row in range(3)]
    for row, expected in enumerate(alone):
        assert relative_error(outputs.logits[row, mask[row] != 0], expected.logits[0]) <= 1e-5
    mean = sum(expected.loss * n for expected, n in zip(alone, mask.sum(1))) / mask.sum()
    assert outputs.loss.item() == pytest.approx(mean.item(), rel=1e-5)
    outputs.loss.backward()
    assert model.score.weight.grad.any()


def test_question_answering_of_padded_rows():
    model = make_head(HSAForQuestionAnswering)
    x, mask = padded_batch()
    starts, ends = torch.tensor([3, 12, 69]), torch.tensor([9, 12, 69])
    outputs = model(x, attention_mask=mask, start_positions=starts, end_positions=ends)
    assert outputs.start_logits.shape == outputs.end_logits.shape == (3, 70)
    for row in range(3):
        alone = model(x[row : row + 1, mask[row] != 0])
        assert relative_error(outputs.start_logits[row, mask[row] != 0], alone.start_logits[0]) <= 1e-5
        assert relative_error(outputs.end_logits[row, mask[row] != 0], alone.end_logits[0]) <= 1e-5
    outputs.loss.backward()
    assert outputs.loss.isfinite() and model.qa_outputs.weight.grad.any()


HEADS = {
    HSAForCausalLM: lambda ids, i: {"labels": ids},
    HSAForSequenceClassification: lambda ids, i: {"labels": i % 3},
    HSAForTokenClassification: lambda ids, i: {"labels": [one % 3 for one in ids]},
    HSAForQuestionAnswering: lambda ids, i: {"start_positions": i, "end_positions": i + 3},
}


def gradients_of_a_step(cls, steps: int, folder) -> torch.Tensor:
    """What the optimizer of `Trainer` gets from four rows, in so many steps of accumulation."""
    model = make_head(cls, num_labels=3, classifier_dropout=0.0)
    gradients = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            gradients.extend(p.grad.flatten().clone() for p in model.parameters() if p.grad is not None)

    rows = [{"input_ids": ids, **HEADS[cls](ids, i)} for i, ids in enumerate(tokens(4).tolist())]
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps, max_steps=1,
        max_grad_norm=0, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, callbacks=[Recorder()]).train()
    return torch.cat(gradients)


@pytest.mark.parametrize("cls", HEADS)
def test_accumulated_gradients_are_those_of_the_whole_batch(cls, tmp_path):
    whole, accumulated = (gradients_of_a_step(cls, steps, tmp_path) for steps in (1, 2))
    assert relative_error(accumulated, whole) <= 1e-5


@pytest.mark.parametrize("cls", HEADS)
def test_trainer_predicts_with_a_cache_in_the_outputs(cls, tmp_path):
    model = make_head(cls, num_labels=3)
    rows = [{"input_ids": ids, **HEADS[cls](ids, i)} for i, ids in enumerate(tokens(4).tolist())]
    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=2, use_cache=True, use_cpu=True, report_to=[], disable_tqdm=True
    )
    predictions = Trainer(model, arguments).predict(rows).predictions
    with torch.no_grad():
        outputs = model(tokens(4), use_cache=False)
    expected = (outputs.start_logits, outputs.end_logits) if cls is HSAForQuestionAnswering else (outputs.logits,)
    predictions = predictions if isinstance(predictions, tuple) else (predictions,)
    assert len(predictions) == len(expected)
    for actual, logits in zip(predictions, expected):
        assert relative_error(torch.tensor(actual), logits) <= 1e-5


# -- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_or_not(tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    count = sum(p.numel() for p in model.parameters())
    other = sum(p.numel() for p in tiny_model(tie_word_embeddings=not tied).parameters())
    assert count - other == VOCABULARY * HIDDEN * (-1 if tied else 1)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [120, 60])
def test_vocabulary_can_be_resized(tied, size, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    x = tokens() % 60
    before = model(x).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    logits = model(x).logits
    assert logits.shape[-1] == size
    assert relative_error(logits[..., :60], before[..., :60]) <= 1e-6
    assert model(torch.full((1, 5), size - 1)).logits.shape == (1, 5, size)
    with pytest.raises(ValueError, match=rf"\[0, {size}\)"):
        model(torch.full((1, 5), size))
    model.save_pretrained(tmp_path)
    assert torch.equal(HSAForCausalLM.from_pretrained(tmp_path)(x).logits, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_computes_in_its_dtype(dtype):
    model = tiny_model().to(dtype)
    outputs = model(tokens(), labels=tokens(), output_hidden_states=True)
    outputs.loss.backward()
    assert outputs.logits.dtype == dtype and {x.dtype for x in outputs.hidden_states} == {dtype}
    assert outputs.logits.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad.dtype == dtype and p.grad.isfinite().all(), name
    if dtype == torch.float64:
        assert relative_error(outputs.logits, tiny_model()(tokens()).logits) <= 1e-4


@pytest.mark.parametrize("cls", [HSAModel, HSAForCausalLM])
def test_a_cache_can_have_either_of_its_names(cls):
    model, ids = cls(tiny_config()).eval(), tokens(1, 40)
    for name in ("past_key_values", "cache"):
        cache = HSACache(model.config)
        outputs = model(ids[:, :30], **{name: cache})
        assert cache.get_seq_length() == 30 and outputs[CACHE] is cache and getattr(outputs, CACHE) is cache
        torch.testing.assert_close(model(ids[:, 30:], **{name: cache})[0], model(ids)[0][:, 30:], rtol=1e-4, atol=1e-4)
    assert model(ids, past_key_values=None, cache=HSACache(model.config))[CACHE].get_seq_length() == 40
    with pytest.raises(ValueError, match="two names of the same argument"):
        model(ids, past_key_values=cache, cache=cache)
