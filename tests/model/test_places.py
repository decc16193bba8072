"""
Contract 12: the chunk memory gives the same bits on the device, in host memory and on disk, whatever is done to the
cache. In 8 bits it does not: what that costs is measured here.
"""

import copy
import pickle
import threading

import pytest
import torch

from modeling_hsa import HSACache
from modeling_hsa.cache import room
from modeling_hsa.cache.page_cache import PageCache
from modeling_hsa.cache.page_format import ExactFormat, Int8Format
from modeling_hsa.cache.paged import PlacedPages
from modeling_hsa.cache.places import DiskPlace, HostPlace
from tests.helpers import OTHER_ORDER, SAME_ARITHMETIC, relative_error
from tests.models import make_variant, tiny_model
from tests.rows import Rows, random_ids, read


LAYOUTS = {
    "plain": ("x" * 160, "x" * 160),
    "packed and padded": ("..|" + "x" * 60 + "..." + "|" + "x" * 20 + "." * 13 + "x" * 60, "|" + "x" * 150 + "." * 9),
}
NAMES = ("default", "joint", "stride_3", "two_memory_heads", "two_retrieval_heads", "distance_penalty")
# The same memory in other places; the page caches hold some of the pages, or fewer than one call retrieves.
PLACES = {
    "host": {"memory": "host"},
    "disk": {"memory": "disk"},
    "host, cached": {"memory": "host", "page_cache_bytes": 30_000},
    "disk, hardly cached": {"memory": "disk", "page_cache_bytes": 5_000},
}


@pytest.fixture(scope="module")
def variants():
    return {name: make_variant(name) for name in NAMES}


@pytest.fixture(params=PLACES)
def place(request, tmp_path) -> dict:
    options = dict(PLACES[request.param])
    return options | ({"folder": tmp_path} if options["memory"] == "disk" else {})


class Twins:
    """A cache on the device and one elsewhere, to which the same is done."""

    def __init__(self, model, *caches: HSACache):
        self.model, self.caches = model, caches

    def read(self, ids: torch.Tensor, sizes=(1000,), **inputs) -> None:
        expected, *others = (read(self.model, ids, sizes, cache, **inputs)[0] for cache in self.caches)
        real = inputs.get("attention_mask", torch.ones_like(ids))[:, -ids.shape[1] :].bool()
        for logits in others:
            assert torch.equal(logits[real], expected[real])

    def do(self, name: str, *arguments) -> "Twins":
        """Calls a method of both; of what it returns, if that is caches, the twins."""
        returned = [getattr(cache, name)(*arguments) for cache in self.caches]
        return Twins(self.model, *returned)


# -- the same bits ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_place_changes_no_bit(variants, place, name, layout):
    model, rows = variants[name], Rows(*LAYOUTS[layout])
    twins = Twins(model, HSACache(model.config), HSACache(model.config, **place))
    twins.read(rows.ids, [1, 99, 1, 1, 58], **rows.inputs())


@torch.no_grad()
def test_nor_does_anything_that_is_done_to_it(model, place):
    twins = Twins(model, HSACache(model.config), HSACache(model.config, **place))
    twins.read(random_ids(2, 100), [33])
    first, second = twins.do("fork"), twins.do("fork")
    first.read(random_ids(2, 40), [7])
    second.read(random_ids(2, 50))
    first.do("crop", -9)
    twins.read(random_ids(2, 20))
    first.read(random_ids(2, 40))
    second.do("reorder_cache", torch.tensor([1, 1]))
    second.read(random_ids(2, 30), [1])
    third = second.do("fork")
    third.do("batch_repeat_interleave", 2)
    third.read(random_ids(4, 40))
    third.do("batch_select_indices", torch.tensor([3, 0, 1]))
    third.read(random_ids(3, 40), [11])
    third.do("activate_past_recording")
    third.read(random_ids(3, 60), [20])
    third.do("crop", -50)
    third.read(random_ids(3, 40), [13])
    for one in (second, first, twins):
        one.read(random_ids(2, 20), [6])
    twins.do("reset")
    twins.read(random_ids(1, 70), [40])


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_model_of_another_dtype_goes_on(model, place, kv_dtype):
    """What comes is written down in the dtype of what is there."""
    half = copy.deepcopy(model).bfloat16()
    for first, then in ((half, model), (model, half)):
        caches = [HSACache(model.config, kv_dtype=kv_dtype), HSACache(model.config, kv_dtype=kv_dtype, **place)]
        Twins(first, *caches).read(random_ids(2, 100))
        Twins(then, *caches).read(random_ids(2, 400), [100])
        Twins(first, *caches).read(random_ids(2, 50))


@torch.no_grad()
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_keeps_the_memory_where_it_is_told(model, tmp_path, way):
    ids = random_ids(1, 70)
    options = {"max_new_tokens": 40, "do_sample": False, **way}
    expected = model.generate(ids, **options)
    for settings in ({"memory": "host"}, {"memory": "disk", "folder": str(tmp_path)}):
        output = model.generate(ids, cache_config=settings, return_dict_in_generate=True, **options)
        assert torch.equal(output.sequences, expected)
        assert output.past_key_values.memory.place.name == settings["memory"]
    with pytest.raises(ValueError, match=r"unknown fields \['place'\].*kv_dtype.*memory"):
        model.generate(ids, cache_config={"place": "host"}, **options)


@torch.no_grad()
def test_gradients_are_those_of_the_call(model, place):
    """As with every cache, they flow through the call, not into what it retrieves from the storage."""
    ids = random_ids(1, 100)
    cache = HSACache(model.config, **place)
    with torch.enable_grad():
        model(ids[:, :60], past_key_values=cache)
        logits = model(ids[:, 60:], past_key_values=cache).logits
        model(random_ids(1, 40), past_key_values=cache)
        logits.square().mean().backward()
    assert model.model.embed_tokens.weight.grad.isfinite().all()
    model.zero_grad()


# -- pages ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_page_is_written_once_and_never_moved(model, place):
    cache = HSACache(model.config, **place)
    read(model, random_ids(2, 100), [50], cache)
    forks = [cache.fork(), copy.deepcopy(cache)]
    pages, block = cache.memory.pages, cache.memory.pages.blocks[0][0]
    for one in (*forks, cache):
        one.reorder_cache(torch.tensor([1, 0]))
        read(model, random_ids(2, 200), [50], one)
        assert one.memory.pages is pages
    assert pages.blocks[0][0] is block and len(pages.blocks) > 1
    assert pages.used == 2 * (100 // 16) + 3 * 2 * (300 // 16 - 100 // 16)


@torch.no_grad()
def test_pages_that_nobody_has_are_used_again(model, place):
    cache = HSACache(model.config, **place)
    read(model, random_ids(1, 100), [50], cache)
    for _ in range(20):
        fork = cache.fork()
        read(model, random_ids(1, 40), [20], fork)
        fork.activate_past_recording()
        read(model, random_ids(1, 40), [20], fork)
        fork.crop(-30)
        read(model, random_ids(1, 40), [20], fork)
    assert cache.memory.pages.used <= 6 + 2 * (220 - 100) // 16 + 2


@torch.no_grad()
def test_rows_of_different_lengths_have_as_many_pages_as_chunks(model, place):
    rows = Rows("x" * 160, "." * 130 + "x" * 30, "x" * 20 + "." * 140)
    cache = HSACache(model.config, **place)
    read(model, rows.ids, [70], cache, **rows.inputs())
    assert cache.memory.pages.used == 10 + 1 + 1


@torch.no_grad()
def test_what_is_on_disk_leaves_nothing(model, tmp_path):
    cache = HSACache(model.config, memory="disk", folder=tmp_path / "made" / "for it")
    read(model, random_ids(1, 100), [50], cache)
    assert cache.memory.pages.blocks and not list((tmp_path / "made" / "for it").iterdir())


def test_a_failed_call_leaves_no_page(model, place):
    cache, ids = HSACache(model.config, **place), random_ids(1, 100)
    with torch.no_grad():
        read(model, ids, [50], cache)
        used = cache.memory.pages.used
        with pytest.raises(ZeroDivisionError):
            hook = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
            try:
                model(random_ids(1, 90), past_key_values=cache)
            finally:
                hook.remove()
        read(model, random_ids(1, 40), [20], cache)
        assert cache.memory.pages.used <= used + 5 + 2  # what was given back lies where the next chunks go


def test_pages_are_not_pickled(model, place):
    cache = HSACache(model.config, **place)
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(cache)


# -- the cache of pages -----------------------------------------------------------------------------------------------


def make_page_cache(capacity: int) -> tuple[PageCache, list]:
    """A cache of pages of one number, which is ten times that of the slot, and what it asked for."""
    asked = []

    def bring(slots):
        asked.append(sorted(slots.tolist()))
        return (10.0 * slots[:, None],)

    cache = PageCache(capacity, (torch.zeros(1, 1),), torch.device("cpu"))
    cache.bring = bring
    return cache, asked


def pages_of(cache: PageCache, *slots: int) -> None:
    (found,) = cache.get(torch.tensor(slots, dtype=torch.int64), cache.bring)
    assert found.flatten().tolist() == [10.0 * slot for slot in slots]


def test_only_pages_that_are_missing_are_copied():
    cache, asked = make_page_cache(4)
    pages_of(cache, 3, 7)
    pages_of(cache, 7, 9, 3)
    pages_of(cache, 3)
    assert asked == [[3, 7], [9]] and cache.copied == 3


def test_the_least_recently_used_page_makes_room():
    cache, asked = make_page_cache(3)
    for slots in ((1, 2, 3), (1,), (3,), (4,), (1, 3, 4), (2,)):
        pages_of(cache, *slots)
    assert asked == [[1, 2, 3], [4], [2]]  # 2 had to go, and had to be copied again


def test_more_pages_than_there_is_room_for_are_had_all_the_same():
    cache, asked = make_page_cache(2)
    pages_of(cache, 0, 1, 2, 3, 4)
    pages_of(cache, 4, 3, 2, 1, 0)
    assert len(asked) == 2 and cache.copied < 10


def test_a_page_that_is_written_anew_is_copied_anew():
    cache, asked = make_page_cache(4)
    pages_of(cache, 1, 2, 3)
    cache.forget(2, 4)
    pages_of(cache, 1, 2, 3)
    assert asked == [[1, 2, 3], [2, 3]]


def test_many_random_calls_of_a_page_cache():
    cache, _ = make_page_cache(8)
    for _ in range(300):
        count = int(torch.randint(0, 14, ()))
        pages_of(cache, *torch.randperm(20)[:count].tolist())
        start = int(torch.randint(0, 20, ()))
        if start % 5 == 0:
            cache.forget(start, start + 3)
        held = cache._slot_in[cache._slot_in >= 0]
        assert len(held.unique()) == len(held) == int((cache._place_of >= 0).sum())


# -- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"GiB more of cpu.*0.00 GiB are free.*kv_dtype='int8'.*memory='disk'"),
        ({"memory": "host"}, r"GiB more of host memory.*kv_dtype='int8'.*memory='disk'"),
        ({"memory": "host", "kv_dtype": "int8"}, r"GiB more of host memory.*Make the cache with `memory='disk'`"),
        ({"memory": "disk"}, r"GiB more of the folder .*kv_dtype='int8'.*memory='disk'"),
    ],
    ids=str,
)
@torch.no_grad()
def test_without_room_the_call_fails_and_the_cache_stays(model, tmp_path, monkeypatch, options, message):
    if options.get("memory") == "disk":
        options = options | {"folder": tmp_path}
    cache, ids, more = HSACache(model.config, **options), random_ids(1, 100), random_ids(1, 600)
    read(model, ids, [50], cache)
    small = copy.deepcopy(cache)
    with monkeypatch.context() as patched:
        # Room for the chunks in 8 bits, but not as they are.
        chunk = 2 * 16 * model.config.hsa_num_key_value_heads * model.config.head_dim * 4
        free = chunk * 20 if "kv_dtype" not in options else 100
        patched.setattr(room, "free_bytes", lambda *_: free)
        with pytest.raises(MemoryError, match=message):
            model(more, past_key_values=cache)
    assert cache.get_seq_length() == 100
    assert torch.equal(read(model, more, [600], cache)[0], read(model, more, [600], small)[0])


@torch.no_grad()
def test_a_call_that_retrieves_more_than_fits_is_refused(model, monkeypatch):
    cache, ids = HSACache(model.config, memory="host"), random_ids(1, 200)
    read(model, ids, [100], cache)
    monkeypatch.setattr(room, "_SMALL", 0)
    read(model, random_ids(1, 1), [1], cache)
    monkeypatch.setattr(room, "free_bytes", lambda *_: 100)
    with pytest.raises(MemoryError, match="retrieve .* chunks.*0.00 GiB are free.*prefill_chunk_size"):
        model(random_ids(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 201


def test_room_is_what_the_system_says(tmp_path):
    for place in ("device", "host", "disk"):
        assert room.free_bytes(place, torch.device("cpu"), tmp_path) > 1 << 20


# -- 8 bits -----------------------------------------------------------------------------------------------------------


def test_8_bits_are_right_to_half_a_step_of_their_channel():
    keys, values = torch.randn(2, 5, 16, 3, 8).mul(torch.logspace(-3, 3, 8))
    exact, parts = ExactFormat(), Int8Format().encode(keys, values)
    assert exact.decode(exact.encode(keys, values), torch.float32) == (keys, values)
    for x, decoded in zip((keys, values), Int8Format().decode(parts, torch.float32)):
        step = x.abs().amax(1, keepdim=True) / 127
        assert ((decoded - x).abs() <= 0.5001 * step).all()
        assert relative_error(decoded, x) < 0.01
    assert sum(x.nbytes for x in parts) < 0.35 * sum(x.nbytes for x in (keys, values))


def test_8_bits_of_a_chunk_of_zeros_are_zeros():
    zeros = torch.zeros(2, 16, 1, 4)
    assert all((x == 0).all() for x in Int8Format().decode(Int8Format().encode(zeros, zeros), torch.bfloat16))


@torch.no_grad()
def test_the_error_of_8_bits(variants, tmp_path):
    """
    Of logits, where all chunks are retrieved, so that rounding selects no others. Half precision loses more than that:
    the model is random and sharp, so both are large.
    """
    model, ids = tiny_model(chunk_topk=50), random_ids(2, 400)
    expected, _ = read(model, ids, [100])
    rounded, _ = read(model, ids, [100], HSACache(model.config, kv_dtype="int8"))
    half, _ = read(copy.deepcopy(model).bfloat16(), ids, [100])
    error = relative_error(rounded, expected)
    assert SAME_ARITHMETIC < error < 0.02
    assert error < 0.5 * relative_error(half.float(), expected)


@torch.no_grad()
def test_8_bits_are_the_same_in_every_place(model, tmp_path):
    caches = [HSACache(model.config, memory=x, kv_dtype="int8") for x in ("device", "host")]
    caches.append(HSACache(model.config, memory="disk", folder=tmp_path, kv_dtype="int8"))
    twins = Twins(model, *caches)
    twins.read(random_ids(2, 100), [30])
    twins.do("fork").read(random_ids(2, 50))
    twins.read(random_ids(2, 50), [1])


@torch.no_grad()
def test_8_bits_take_less_memory():
    model = tiny_model(chunk_size=64)
    _, cache = read(model, random_ids(1, 64 * 64), [1024])
    _, small = read(model, random_ids(1, 64 * 64), [1024], HSACache(model.config, kv_dtype="int8"))
    exact = cache.memory.pages.keys[:, :1].nbytes * 2
    assert sum(x[:1].nbytes for x in small.memory.pages.blocks[0]) < 0.27 * exact


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "gpu"}, "`memory` must be 'device', 'host' or 'disk', got 'gpu'"),
        ({"memory": True}, "`memory` must be"),
        ({"memory": "disk"}, "needs a `folder`"),
        ({"folder": "somewhere"}, "`folder` is for `memory='disk'`, got 'device'"),
        ({"memory": "host", "folder": "somewhere"}, "`folder` is for"),
        ({"kv_dtype": "int4"}, "`kv_dtype` must be 'int8', or None.*'int4'"),
        ({"page_cache_bytes": 100}, "`page_cache_bytes` is for"),
        ({"memory": "host", "page_cache_bytes": -1}, "`page_cache_bytes` must be at least 0, got -1"),
        ({"memory": "disk", "folder": "x", "offloading": True}, "`offloading` means `memory='host'`, got 'disk'"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        HSACache(model.config, **arguments)


def test_offloading_is_host_memory(model):
    for arguments in ({"offloading": True}, {"offloading": True, "memory": "host"}):
        assert HSACache(model.config, **arguments).memory.place.name == "host"


# -- on a GPU ---------------------------------------------------------------------------------------------------------


GPU_PLACES = {
    **PLACES,
    "int8": {"kv_dtype": "int8"},
    "host, int8": {"memory": "host", "kv_dtype": "int8"},
    "host, not cached": {"memory": "host", "page_cache_bytes": 0},
}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gpu_place", GPU_PLACES)
def test_gpu_the_place_changes_nothing(tmp_path, gpu_place, name):
    model, options = make_variant(name).cuda(), dict(GPU_PLACES[gpu_place])
    if options.get("memory") == "disk":
        options["folder"] = tmp_path
    rows = Rows(*LAYOUTS["packed and padded"])
    inputs = {key: x.cuda() for key, x in rows.inputs().items()}
    exact = {key: x for key, x in options.items() if key == "kv_dtype"}
    expected, _ = read(model, rows.ids.cuda(), [40], HSACache(model.config, **exact), **inputs)
    logits, cache = read(model, rows.ids.cuda(), [40], HSACache(model.config, **options), **inputs)
    real = rows.attention_mask.bool().cuda()
    assert relative_error(logits[real], expected[real]) <= OTHER_ORDER
    if options.get("memory") == "host":
        assert all(x.is_pinned() for x in cache.memory.pages.blocks[0])


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_pages_are_copied_beside_the_work_of_the_device(monkeypatch):
    """On a stream and in a thread of their own; what was copied before is not copied again."""
    model = tiny_model(chunk_topk=4).cuda()
    cache = HSACache(model.config, memory="host")
    threads, gather = [], type(cache.memory.pages)._gather

    def watched(self, *arguments):
        threads.append((threading.current_thread().name, torch.cuda.current_stream() != torch.cuda.default_stream()))
        return gather(self, *arguments)

    monkeypatch.setattr(type(cache.memory.pages), "_gather", watched)
    read(model, random_ids(1, 2000).cuda(), [500], cache)
    assert threads and all(name.startswith("hsa-fetch") and beside for name, beside in threads)
    assert cache.memory.pages.cache.copied <= 2000 // 16


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("memory", ["host", "disk"])
def test_gpu_what_is_just_being_written_can_be_read(tmp_path, memory):
    """Copies to host memory run beside the work of the device; who reads, as saving does, waits for them."""
    place = HostPlace() if memory == "host" else DiskPlace(tmp_path)
    pages = PlacedPages(place, ExactFormat(), 0)
    for start in range(0, 8000, 2000):
        keys, values = torch.randn(2, 2000, 64, 1, 64, device="cuda")
        torch.cuda._sleep(100_000_000)  # so that the copy has to wait
        pages.write(start, keys, values, 0)
        for device in ("cpu", "cuda"):
            read = pages.read(torch.arange(start, start + 2000), torch.device(device), use_cache=False)
            assert torch.equal(read[0].cpu(), keys.cpu()) and torch.equal(read[1].cpu(), values.cpu())


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_memory_stays_in_the_host():
    model = tiny_model(num_lower_layers=1, chunk_topk=2).cuda()
    ids = random_ids(1, 1 << 16).cuda()
    grown = {}
    for memory in ("device", "host"):
        before = torch.cuda.memory_allocated()
        options = {"page_cache_bytes": 1 << 16} if memory == "host" else {}
        _, cache = read(model, ids[:, : 1 << 15], [4096], HSACache(model.config, memory=memory, **options))
        half = torch.cuda.memory_allocated()
        grown[memory] = half - before
        del cache
    landmarks = (1 << 15) // 16 * model.config.retrieval_dim * 4
    assert grown["host"] < grown["device"] - landmarks


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_forks_take_turns_with_a_small_cache_of_pages():
    model = tiny_model().cuda()
    twins = Twins(model, HSACache(model.config), HSACache(model.config, memory="host", page_cache_bytes=20_000))
    cpu = copy.deepcopy(model).cpu()
    ids = random_ids(2, 300)
    caches = list(twins.caches)
    for cache in caches:
        read(model, ids.cuda(), [100], cache)
    for _ in range(10):
        more = random_ids(2, 40)
        expected = read(cpu, torch.cat([ids, more], dim=1), [100])[0][:, 300:]
        for cache in caches:
            logits, _ = read(model, more.cuda(), [7], cache.fork())
            assert relative_error(logits.cpu(), expected) <= 10 * OTHER_ORDER
