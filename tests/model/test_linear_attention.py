"""Layers of the kind `linear_attention`: the recurrence against its definition, the mixer against Transformers'."""

import copy

import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from modeling_hsa import HSACache, scan
from modeling_hsa.layout import build_layout
from modeling_hsa.linear_attention import HSALinearAttention, RecurrentState
from modeling_hsa.scan import selective_scan
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error, run_without_the_package
from tests.models import make_variant, tiny_config
from tests.rows import Rows, random_ids, read


def step_by_step(x, dt, A, B, C, documents=None, state=None):
    """The definition, token by token, in fp64."""
    x, dt, A, B, C = (value.double() for value in (x, dt, A, B, C))
    B, C = (value.repeat_interleave(x.shape[2] // B.shape[2], dim=2) for value in (B, C))
    state = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]) if state is None else state.double()
    document, outputs = torch.zeros(len(x), dtype=torch.long), []
    for t in range(x.shape[1]):
        if documents is not None:
            state = state * (documents[:, t] == document)[:, None, None, None]
            document = documents[:, t]
        state = state * (dt[:, t] * A).exp()[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def scan_inputs(length: int, groups: int = 2) -> list[torch.Tensor]:
    """x, dt, A, B and C of 4 heads, some of which forget at once and some hardly."""
    x, B, C = torch.randn(3, length, 4, 5), torch.randn(3, length, groups, 6), torch.randn(3, length, groups, 6)
    dt = torch.rand(3, length, 4) * torch.tensor([0.01, 0.1, 0.5, 2.0])
    dt[:, length // 3 : length // 2, 0] = 0.0  # as of padding
    return [x, dt, -torch.arange(1.0, 5.0), B, C]


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 4200])
def test_the_scan_is_the_recurrence(length, packed, continued):
    inputs = [value.requires_grad_() for value in scan_inputs(length)]
    documents = (torch.rand(3, length) < 0.02).long().cumsum(1) if packed else None
    state = torch.randn(3, 4, 5, 6, requires_grad=True) if continued else None
    given = [*inputs, state] if continued else inputs
    gradients, results = [], []
    for function in (selective_scan, step_by_step):
        output, after = function(*inputs, documents, state)
        results.append((output, after))
        gradients.append(torch.autograd.grad(output.double().square().sum() + after.double().sum(), given))
    for actual, expected in zip(results[0] + gradients[0], results[1] + gradients[1]):
        assert relative_error(actual, expected) <= OTHER_ORDER


def test_the_scan_continues_from_the_state_of_another():
    inputs = scan_inputs(300, groups=1)
    whole, last = selective_scan(*inputs)
    state, outputs = None, []
    for segment in (slice(0, 100), slice(100, 101), slice(101, 300)):
        x, dt, A, B, C = (value if value.dim() == 1 else value[:, segment] for value in inputs)
        output, state = selective_scan(x, dt, A, B, C, None, state)
        outputs.append(output)
    assert relative_error(torch.cat(outputs, dim=1), whole) <= OTHER_ORDER
    assert relative_error(state, last) <= OTHER_ORDER


def test_a_slow_head_is_exact_after_a_fast_stretch():
    """The decay between neighbouring chunks is small beside what was summed before them."""
    x, dt, A, B, C = scan_inputs(4096)
    dt[:, :2048], dt[:, 2048:] = 10.0, 1e-3
    output, _ = selective_scan(x, dt, A, B, C)
    assert relative_error(output[:, 3000:], step_by_step(x, dt, A, B, C)[0][:, 3000:]) <= 1e-5


@torch.no_grad()
def test_the_state_of_an_earlier_document_may_hold_nan():
    inputs = scan_inputs(130)
    nan = torch.full((3, 4, 5, 6), torch.nan)
    for length in (1, 130):
        given = [value if value.dim() == 1 else value[:, :length] for value in inputs]
        actual = selective_scan(*given, torch.ones(3, length, dtype=torch.long), nan)
        for one, expected in zip(actual, selective_scan(*given)):
            assert relative_error(one, expected) <= SAME_ARITHMETIC


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_of_mamba_are_asked_for_the_same(packed, monkeypatch):
    """A stand-in with the arguments of `mamba_chunk_scan_combined`, whose documents are counted from 0, too."""
    asked = []

    def kernel(x, dt, A, B, C, chunk_size, initial_states, return_final_states, seq_idx):
        asked.append(chunk_size)
        assert return_final_states and (seq_idx is not None) == packed
        assert seq_idx is None or seq_idx.dtype == torch.int32
        return step_by_step(x, dt, A, B, C, seq_idx, initial_states)

    inputs, state = scan_inputs(130), torch.randn(3, 4, 5, 6)
    documents = (torch.rand(3, 130) < 0.02).long().cumsum(1) if packed else None
    expected = selective_scan(*inputs, documents, state)
    monkeypatch.setattr(scan, "_load_kernel", lambda: kernel)
    monkeypatch.setattr(scan, "_takes_kernel", lambda x: True)
    for one, other in zip(selective_scan(*inputs, documents, state), expected):
        assert one.dtype == torch.float32
        assert relative_error(one, other) <= OTHER_ORDER
    assert asked == [256]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_the_kernels_of_mamba_give_the_same(packed, monkeypatch):
    pytest.importorskip("mamba_ssm")
    x, B, C = (torch.randn(2, 700, n, m, device="cuda", requires_grad=True) for n, m in ((4, 64), (1, 32), (1, 32)))
    dt = torch.rand(2, 700, 4, device="cuda").mul(0.3).requires_grad_()
    A, state = -torch.arange(1.0, 5.0, device="cuda"), torch.randn(2, 4, 64, 32, device="cuda")
    documents = (torch.rand(2, 700, device="cuda") < 0.01).long().cumsum(1) if packed else None
    results = []
    for takes in (True, False):
        monkeypatch.setattr(scan, "_takes_kernel", lambda x, takes=takes: takes)
        output, after = selective_scan(x, dt, A, B, C, documents, state)
        gradients = torch.autograd.grad(output.square().sum() + after.sum(), (x, dt, B, C))
        results.append((output, after, *gradients))
    for one, other in zip(*results):
        assert relative_error(one, other) <= 1e-2  # the kernels take TF32


@torch.no_grad()
def test_the_mixer_is_that_of_transformers():
    config = tiny_config(layer_types=["linear_attention"], state_size=8, mamba_head_dim=16)
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=1, chunk_size=64,
            layer_norm_epsilon=config.rms_norm_eps,
        ),
        layer_idx=0,
    )  # fmt: skip
    ours = HSALinearAttention(config, layer_idx=0)
    ours.load_state_dict(theirs.state_dict())
    hidden_states = torch.randn(2, 150, 32)
    layout = build_layout(2, 150, hidden_states.device, chunk_size=16)
    assert relative_error(ours(hidden_states, layout), theirs.eval()(hidden_states)) <= OTHER_ORDER


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_state_is_kept_in_fp32(dtype):
    """Also under autocast: rounding would add up over the tokens."""
    exact, ids = make_variant("linear_attention_only"), random_ids(1, 200)
    expected, _ = read(exact, ids, [200])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [read(exact, ids, [100, 1, 99])]
    results.append(read(make_variant("linear_attention_only").to(dtype), ids, [100, 1, 99]))
    for logits, cache in results:
        assert all(layer.recurrence.value.dtype == torch.float32 for layer in cache.layers)
        assert relative_error(logits, expected) < 0.05


def test_it_loads_without_the_package(tmp_path):
    model, ids = make_variant("ramba"), torch.arange(70)[None] % 99
    model.save_pretrained(tmp_path)
    code = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.arange(70)[None] % 99).logits, "logits.pt")
"""
    run_without_the_package(code, tmp_path)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(ids).logits)


def test_it_starts_as_mamba_2_does():
    model = make_variant("linear_attention_only")
    mixer = model.model.layers[0].mixer
    assert torch.equal(mixer.A_log.exp().round(), torch.arange(1.0, 5.0))
    assert torch.equal(mixer.D, torch.ones(4))
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((steps > 0.0009) & (steps < 0.11)).all()
    assert not torch.equal(mixer.dt_bias, model.model.layers[1].mixer.dt_bias)
    assert 0.4 < mixer.conv1d.weight.abs().max() <= 0.5


@torch.no_grad()
@pytest.mark.parametrize("name", ["ramba", "linear_attention_only"])
def test_its_cache_forgets_nothing_but_can_be_forked(name):
    model, ids = make_variant(name), random_ids(1, 60)
    _, cache = read(model, ids[:, :40], [40])
    assert not cache.is_croppable
    for call in (lambda: cache.crop(-1), cache.activate_past_recording):
        with pytest.raises(NotImplementedError, match="`fork` the cache"):
            call()
    cache.crop(0)
    fork = cache.fork()
    expected = model(ids, use_cache=False).logits[:, 40:]
    read(model, random_ids(1, 10), [10], cache)
    assert relative_error(read(model, ids[:, 40:], [1, 19], fork)[0], expected) <= OTHER_ORDER


def test_assisted_generation_is_refused():
    model, ids = make_variant("ramba"), random_ids(1, 20)
    for arguments in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}):
        with pytest.raises((ValueError, NotImplementedError), match="crop|cannot forget"):
            model.generate(ids, max_new_tokens=5, **arguments)


@torch.no_grad()
def test_a_cache_of_another_state_is_refused():
    model = make_variant("ramba")
    cache = HSACache(make_variant("ramba", state_size=16).config)
    with pytest.raises(ValueError, match="`state_size` 16, but this one has 8"):
        model(random_ids(1, 5), past_key_values=cache)


@torch.no_grad()
def test_rows_of_its_state_follow():
    model = make_variant("ramba")
    rows = Rows("." * 37 + "x" * 83, "x" * 120)
    _, cache = read(model, rows.ids[:, :100], [60, 1], attention_mask=rows.attention_mask[:, :100])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    rows = rows.select([1, 0])
    logits, _ = read(model, rows.ids[:, 100:], [1, 19], cache, attention_mask=rows.attention_mask)
    assert rows.error(model, logits, start=100) <= OTHER_ORDER


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mamba_head_dim": 24}, "`mamba_head_dim` \\(24\\) must divide"),
        ({"n_groups": 3}, "`n_groups` \\(3\\) must divide"),
        ({"conv_kernel": 1}, "`conv_kernel` must be an integer of at least 2"),
        ({"state_size": 0}, "`state_size` must be an integer of at least 1"),
        ({"mamba_d_state": 8}, "no field 'mamba_d_state'"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(layer_types=["linear_attention"], **{"state_size": 8, "mamba_head_dim": 16, **fields})


def test_without_such_a_layer_its_fields_need_not_fit():
    assert tiny_config(hidden_size=36, num_attention_heads=2, mamba_head_dim=64).state_size == 128


@torch.no_grad()
def test_without_rotation_full_attention_has_no_position():
    """The last token sees the others as a set."""
    ids = random_ids(1, 30)
    shuffled = torch.cat([ids[:, torch.randperm(29)], ids[:, 29:]], dim=1)
    for rope in (False, True):
        model = make_variant("no_position", layer_types=["full_attention"], full_attention_rope=rope)
        error = relative_error(model(shuffled).logits[:, -1], model(ids).logits[:, -1])
        assert error > 0.01 if rope else error <= OTHER_ORDER


def test_what_a_step_needs_for_its_gradients_is_not_written_to_by_the_next():
    state, factor = RecurrentState(in_place=True), torch.ones(2, requires_grad=True)
    for value in (3.0, 5.0):
        state.store(torch.full((2,), value))
        state.commit(None)
        loss = (factor * state.read()).sum()
    state.store(torch.zeros(2))
    state.commit(None)
    loss.backward()
    assert factor.grad.tolist() == [5.0, 5.0] and state.read().tolist() == [0.0, 0.0]
