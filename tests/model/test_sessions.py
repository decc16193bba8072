"""
Contract 11: a document that was read can be kept. A cache that is saved and loaded, in this process or another one,
goes on to the same bits as the one that was not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modeling_hsa import HSACache, HSAForSequenceClassification, HSAStaticCache
from modeling_hsa.cache import room, session_files, sessions
from tests.models import make_variant, tiny_config, tiny_model
from tests.rows import Rows, random_ids, read


LAYOUTS = {
    "plain": ("x" * 100, "x" * 100),
    "padded": ("." * 37 + "x" * 63, "x" * 70 + "." * 30),
    "packed": ("|" + "x" * 69 + "|" + "x" * 29, "|" + "x" * 33 + "|" + "x" * 65),
    "short": ("x" * 7, "." * 3 + "x" * 4),
}
NAMES = ("default", "stride_3", "no_local_attention", "two_memory_heads", "full_attention", "baseline")
PLACES = ("device", "host", "disk")


def make_cache(config, place: str, folder: Path, **options) -> HSACache:
    return HSACache(config, memory=place, folder=folder / "pages" if place == "disk" else None, **options)


def go_on(model, cache, ids: torch.Tensor, sizes=(1, 20, 7)) -> torch.Tensor:
    return read(model, ids, sizes, cache)[0]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.*")}


@pytest.fixture(scope="module")
def variants():
    return {name: make_variant(name) for name in NAMES}


@pytest.fixture
def kept(model, tmp_path):
    """A folder with a session of 100 tokens in two rows, its tokens, and the cache."""
    ids, folder = random_ids(2, 100), tmp_path / "session"
    with torch.no_grad():
        _, cache = read(model, ids, [30])
    cache.save_pretrained(folder, model=model, token_ids=ids)
    return folder, ids, cache


# -- the same bits ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_cache_goes_on_to_the_same_bits(variants, tmp_path, name, place, layout):
    model, rows, more = variants[name], Rows(*LAYOUTS[layout]), random_ids(2, 60)
    _, cache = read(model, rows.ids, [40], make_cache(model.config, "device", tmp_path), **rows.inputs())
    cache.save_pretrained(tmp_path / "session", model=model, token_ids=rows.ids)
    loaded = HSACache.from_pretrained(tmp_path / "session", model.config, memory=place, verify=True)
    assert torch.equal(loaded.token_ids, rows.ids)
    assert loaded.get_seq_length() == rows.ids.shape[1] and loaded.batch_size == 2
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))


@torch.no_grad()
@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    places=st.lists(st.sampled_from(PLACES), min_size=5, max_size=5),
    last=st.integers(1, 40),
)
def test_saving_at_any_points_changes_nothing(model, tmp_path_factory, sizes, places, last):
    """The same folder again and again, every time in a cache that was loaded from it."""
    folder = tmp_path_factory.mktemp("session")
    kept, cache = HSACache(model.config), HSACache(model.config)
    for size, place in zip([*sizes, last], places + places):
        ids = random_ids(2, size)
        assert torch.equal(go_on(model, cache, ids, [size]), go_on(model, kept, ids, [size]))
        cache.save_pretrained(folder, model=model)
        cache = HSACache.from_pretrained(folder, model.config, memory=place, verify=True)


@torch.no_grad()
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_kept_anywhere_can_be_saved(model, tmp_path, place, kv_dtype):
    ids, more = random_ids(2, 100), random_ids(2, 60)
    _, cache = read(model, ids, [30], make_cache(model.config, place, tmp_path, kv_dtype=kv_dtype))
    cache.save_pretrained(tmp_path / "session")
    loaded = [HSACache.from_pretrained(tmp_path / "session", model.config, memory=x) for x in PLACES]
    expected = go_on(model, cache, more)
    for one in loaded:
        assert torch.equal(go_on(model, one, more), expected)


ANOTHER_PROCESS = """
import sys
import torch
from modeling_hsa import HSACache, HSAForCausalLM

torch.set_num_threads(1)
model = HSAForCausalLM.from_pretrained(sys.argv[1]).eval()
cache = HSACache.from_pretrained(sys.argv[2], model.config, model=model, memory=sys.argv[3])
ids = torch.load(sys.argv[4], weights_only=True)
with torch.no_grad():
    logits = [model(part, past_key_values=cache).logits for part in ids.split([1, 20, 39], dim=1)]
torch.save(torch.cat(logits, dim=1), sys.argv[5])
cache.save_pretrained(sys.argv[2], model=model)
"""


@torch.no_grad()
@pytest.mark.parametrize("layout, place", [("padded", "device"), ("packed", "disk")])
def test_another_process_goes_on_to_the_same_bits(model, tmp_path, layout, place):
    rows, more = Rows(*LAYOUTS[layout]), random_ids(2, 60)
    _, cache = read(model, rows.ids, [40], **rows.inputs())
    cache.save_pretrained(tmp_path / "session", model=model)
    model.save_pretrained(tmp_path / "model")
    torch.save(more, tmp_path / "ids")
    words = [tmp_path / "model", tmp_path / "session", place, tmp_path / "ids", tmp_path / "logits"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), go_on(model, cache, more, [1, 20, 39]))
    # Since then the session is longer, by somebody else's hand.
    with pytest.raises(ValueError, match="Somebody else has saved"):
        cache.save_pretrained(tmp_path / "session")
    longer = HSACache.from_pretrained(tmp_path / "session", model.config, model=model, verify=True)
    assert longer.get_seq_length() == 160
    assert torch.equal(go_on(model, longer, more), go_on(model, cache, more))


@torch.no_grad()
def test_beams_go_on_after_loading(model, tmp_path):
    _, cache = read(model, random_ids(2, 50), [50])
    cache.batch_repeat_interleave(2)
    read(model, random_ids(4, 30), [9], cache)
    cache.reorder_cache(torch.tensor([1, 1, 2, 0]))
    cache.save_pretrained(tmp_path)
    loaded = HSACache.from_pretrained(tmp_path, model.config, memory="host")
    for one in (cache, loaded):
        one.reorder_cache(torch.tensor([0, 0, 3, 2]))
        one.batch_select_indices(torch.tensor([1, 2]))
    more = random_ids(2, 40)
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))


def test_an_empty_cache_can_be_kept(model, tmp_path):
    HSACache(model.config).save_pretrained(tmp_path)
    loaded, ids = HSACache.from_pretrained(tmp_path, model.config), random_ids(2, 60)
    assert loaded.batch_size == -1
    with torch.no_grad():
        assert torch.equal(go_on(model, loaded, ids), go_on(model, HSACache(model.config), ids))


@torch.no_grad()
def test_what_was_cropped_is_not_what_is_loaded(model, kept):
    """Chunks that the folder has, but the cache has no longer, are written anew; the others are not."""
    folder, ids, cache = kept
    before = files_of(folder)
    cache.activate_past_recording()
    read(model, random_ids(2, 40), [40], cache)
    cache.crop(-50)  # back into what is saved
    other, more = random_ids(2, 60), random_ids(2, 50)
    go_on(model, cache, other)
    cache.save_pretrained(folder)
    loaded = HSACache.from_pretrained(folder, model.config, verify=True)
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))
    assert {n: x for n, x in before.items() if n.startswith("chunks")}.items() <= files_of(folder).items()


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_forks_of_a_loaded_cache_go_their_ways(model, kept, place):
    folder, ids, cache = kept
    loaded = HSACache.from_pretrained(folder, model.config, memory=place)
    forks, questions = [loaded.fork(), loaded.fork()], [random_ids(2, 40), random_ids(2, 40)]
    twins = [cache.fork() for _ in range(3)]
    for question in questions:
        for one, twin in zip([*forks, loaded], twins):
            assert torch.equal(go_on(model, one, question), go_on(model, twin, question))
            question = question.roll(1, 1)
    forks[0].save_pretrained(folder)
    with pytest.raises(ValueError, match="Somebody else has saved"):
        forks[1].save_pretrained(folder)
    forks[1].save_pretrained(folder.with_name("other"))
    again = HSACache.from_pretrained(folder.with_name("other"), model.config, verify=True)
    assert torch.equal(go_on(model, again, questions[0]), go_on(model, forks[1], questions[0]))


@torch.no_grad()
def test_recording_goes_on_after_loading(model, tmp_path):
    ids = random_ids(1, 90)
    _, cache = read(model, ids[:, :20], [20])
    cache.activate_past_recording()
    read(model, ids[:, 20:], [30], cache)
    cache.save_pretrained(tmp_path)
    loaded = HSACache.from_pretrained(tmp_path, model.config)
    for one in (cache, loaded):
        one.crop(-60)
    more = random_ids(1, 40)
    assert torch.equal(go_on(model, loaded, more), go_on(model, cache, more))


# -- files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_later_save_rewrites_no_chunk_memory(model, kept, monkeypatch):
    folder, ids, cache = kept
    before = files_of(folder)
    # As if nobody could write to them.
    for name in before:
        if name.startswith("chunks"):
            (folder / name).chmod(0o400)
    monkeypatch.setattr(sessions, "SHARD_BYTES", 1)  # a file a chunk
    read(model, random_ids(2, 60), [60], cache)
    cache.save_pretrained(folder)
    after = files_of(folder)
    chunks = {name for name in before if name.startswith("chunks")}
    assert {name: before[name] for name in chunks}.items() <= after.items()
    added = [name for name in after if name.startswith("chunks") and name not in chunks]
    assert len(added) == 2 * (160 // 16 - 100 // 16)
    assert sum(name.startswith("state") for name in after) == 1


@torch.no_grad()
def test_saving_what_has_not_changed_writes_no_chunk(kept):
    folder, _, cache = kept
    chunks = {name for name in files_of(folder) if name.startswith("chunks")}
    cache.save_pretrained(folder)
    assert {name for name in files_of(folder) if name.startswith("chunks")} == chunks


class Crash(Exception):
    """Stands for the end of the process."""


@torch.no_grad()
@pytest.mark.parametrize("crash_at", range(6))
def test_a_save_that_is_cut_short_leaves_the_session_before(model, kept, monkeypatch, crash_at):
    folder, ids, cache = kept
    monkeypatch.setattr(sessions, "SHARD_BYTES", 1)
    old = HSACache.from_pretrained(folder, model.config)
    more, question = random_ids(2, 40), random_ids(2, 40)
    read(model, more, [40], cache)
    written, write = [], session_files.SessionFolder._write

    def crash(self, name, data):
        if len(written) == crash_at:
            (self.path / name).write_bytes(data[: len(data) // 2])
            raise Crash
        written.append(name)
        write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(session_files.SessionFolder, "_write", crash)
        with pytest.raises(Crash):
            cache.save_pretrained(folder)
    loaded = HSACache.from_pretrained(folder, model.config, verify=True)
    assert torch.equal(go_on(model, loaded, question), go_on(model, old, question))
    # The next save is whole, and what the other left is gone.
    cache.save_pretrained(folder)
    loaded = HSACache.from_pretrained(folder, model.config, verify=True)
    assert torch.equal(go_on(model, loaded, question), go_on(model, cache, question))
    header = json.loads((folder / "session.json").read_text())
    named = {entry["file"] for entry in (*header["shards"], header["state"])}
    assert {x.name for x in folder.glob("*.safetensors")} == named


def test_a_first_save_that_is_cut_short_is_no_session(model, tmp_path):
    with torch.no_grad():
        _, cache = read(model, random_ids(1, 40), [40])
    (tmp_path / "chunks-000000-0123abcd.safetensors").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="cut short"):
        HSACache.from_pretrained(tmp_path, model.config)
    cache.save_pretrained(tmp_path)
    assert HSACache.from_pretrained(tmp_path, model.config).get_seq_length() == 40
    assert not (tmp_path / "chunks-000000-0123abcd.safetensors").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_on_disk_only_what_is_retrieved_is_read(model, kept):
    folder, ids, cache = kept
    loaded = HSACache.from_pretrained(folder, model.config, memory="disk")
    shard = next(folder.glob("chunks*"))
    address = loaded.memory.pages.blocks[0][0].data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(shard))]
    bounds = [[int(x, 16) for x in line[0].split("-")] for line in maps]
    assert any(start <= address < end for start, end in bounds)


# -- what is refused --------------------------------------------------------------------------------------------------


def change_header(folder: Path, **changes) -> None:
    header = json.loads((folder / "session.json").read_text())
    (folder / "session.json").write_text(json.dumps(header | changes))


def header_of(folder: Path) -> dict:
    return json.loads((folder / "session.json").read_text())


def cut(folder: Path, kind: str) -> None:
    file = next(folder.glob(f"{kind}*"))
    file.write_bytes(file.read_bytes()[:-8])


def name_elsewhere(folder: Path, name: str) -> None:
    change_header(folder, state=header_of(folder)["state"] | {"file": name})


def link_outside(folder: Path) -> None:
    file = next(folder.glob("state*"))
    file.rename(folder.parent / "outside")
    file.symlink_to(folder.parent / "outside")


DAMAGES = {
    "short chunks": (lambda x: cut(x, "chunks"), "damaged: chunks.*bytes"),
    "short state": (lambda x: cut(x, "state"), "damaged: state.*bytes"),
    "missing chunks": (lambda x: next(x.glob("chunks*")).unlink(), "lacks chunks"),
    "no json": (lambda x: (x / "session.json").write_text("{"), "no json"),
    "no text": (lambda x: (x / "session.json").write_bytes(b"\xff\xfe"), "no text"),
    "another json": (lambda x: (x / "session.json").write_text("[]"), "not the header"),
    "another version": (lambda x: change_header(x, version=99), "version 99"),
    "a field is missing": (lambda x: change_header(x, states={}), "do not fit together"),
    "fields of another type": (lambda x: change_header(x, shards=3), "do not fit together"),
    "fewer pages": (lambda x: change_header(x, pages=1), "do not fit"),
    "other chunks": (lambda x: change_header(x, chunks=2), "table of chunks"),
    "other rows": (lambda x: change_header(x, rows=1), "table of chunks"),
    "other columns": (lambda x: change_header(x, columns=7), "do not fit together"),
    "a name that leads out": (lambda x: name_elsewhere(x, "../outside"), "names '../outside'"),
    "an absolute name": (lambda x: name_elsewhere(x, "/etc/passwd"), "names '/etc/passwd'"),
    "a name that is no name": (lambda x: name_elsewhere(x, 7), "names 7"),
    "a link that leads out": (link_outside, "is a link"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_session_is_refused(model, kept, damage):
    folder, _, _ = kept
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        HSACache.from_pretrained(folder, model.config)


def test_sums_are_compared_where_that_is_asked_for(model, kept):
    folder, _, _ = kept
    file = next(folder.glob("chunks*"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    HSACache.from_pretrained(folder, model.config)
    with pytest.raises(ValueError, match="damaged: the sum of chunks"):
        HSACache.from_pretrained(folder, model.config, verify=True)


def test_a_table_beyond_the_pages_is_refused(model, kept):
    folder, _, _ = kept
    header, files = header_of(folder), session_files.SessionFolder(folder)
    tensors = {name: x.clone() for name, x in files.tensors(header["state"]).items()}
    tensors["table"][0, 0] = header["pages"]
    save_file(tensors, folder / header["state"]["file"])
    with pytest.raises(ValueError, match="table of chunks"):
        HSACache.from_pretrained(folder, model.config)


@pytest.mark.parametrize("other", [{"sliding_window": 11}, {"chunk_topk": 3}, {"num_lower_layers": 2}], ids=str)
def test_a_session_of_another_configuration_is_refused(kept, other):
    name = next(iter(other)).replace("num_lower_layers", "layer_types")
    with pytest.raises(ValueError, match=f"session.*{name}"):
        HSACache.from_pretrained(kept[0], tiny_config(**other))


def test_a_session_of_other_weights_is_refused(model, kept):
    folder, _, _ = kept
    other = tiny_model(seed=1)
    with pytest.raises(ValueError, match="other weights"):
        HSACache.from_pretrained(folder, other.config, model=other)
    late = HSACache.from_pretrained(folder, other.config)
    with pytest.raises(ValueError, match="other weights"):
        other(random_ids(2, 5), past_key_values=late)
    assert late.get_seq_length() == 100
    with torch.no_grad():
        model(random_ids(2, 5), past_key_values=late)  # the right ones


def test_the_weights_are_those_of_the_decoder_and_in_their_dtype(model, kept):
    folder, _, _ = kept
    headed = HSAForSequenceClassification(model.config)
    headed.model.load_state_dict(model.model.state_dict())
    HSACache.from_pretrained(folder, model.config, model=headed)
    with pytest.raises(ValueError, match=r"torch.float32 \(this model: torch.bfloat16\)"):
        HSACache.from_pretrained(folder, model.config, model=tiny_model().bfloat16())
    with pytest.raises(TypeError, match="must be an HSA model, got Linear"):
        HSACache.from_pretrained(folder, model.config, model=torch.nn.Linear(1, 1))


def test_a_session_without_weights_asks_for_none(model, tmp_path):
    with torch.no_grad():
        _, cache = read(model, random_ids(1, 40), [40])
        cache.save_pretrained(tmp_path)
        tiny_model(seed=1)(random_ids(1, 5), past_key_values=HSACache.from_pretrained(tmp_path, model.config))


def test_weights_stay_with_a_session_that_is_saved_without_a_model(model, kept):
    folder, _, cache = kept
    cache.save_pretrained(folder)
    with pytest.raises(ValueError, match="other weights"):
        HSACache.from_pretrained(folder, model.config, model=tiny_model(seed=1))


def test_a_folder_with_something_else_is_refused(model, kept, tmp_path):
    folder, ids, cache = kept
    with pytest.raises(ValueError, match="holds a session already"):
        HSACache(model.config).save_pretrained(folder)
    with pytest.raises(ValueError, match="holds session.* and no session"):
        HSACache(model.config).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no session in .*nowhere"):
        HSACache.from_pretrained(tmp_path / "nowhere", model.config)
    cache.reset()
    with pytest.raises(ValueError, match="holds a session already"):
        cache.save_pretrained(folder)


def test_a_session_that_does_not_fit_is_refused(model, kept, monkeypatch):
    folder, _, _ = kept
    monkeypatch.setattr(room, "free_bytes", lambda *_: 100)
    for memory, where in (("device", "cpu"), ("host", "host memory")):
        with pytest.raises(MemoryError, match=f"GiB more of {where}.*`memory='disk'`"):
            HSACache.from_pretrained(folder, model.config, memory=memory)
    HSACache.from_pretrained(folder, model.config, memory="disk")


def test_a_second_writer_is_refused(kept):
    folder, _, cache = kept
    with session_files.SessionFolder(folder).locked():
        with pytest.raises(BlockingIOError, match="Somebody else is writing"):
            cache.save_pretrained(folder)
    cache.save_pretrained(folder)


WRITER = """
import os, sys
from modeling_hsa.cache.session_files import SessionFolder

with SessionFolder(sys.argv[1]).locked():
    print("locked", flush=True)
    sys.stdin.readline()
    os._exit(1)
"""


def test_the_lock_of_a_writer_that_died_is_void(kept):
    folder, _, cache = kept
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], env=environment, **pipes) as writer:
        assert writer.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="Somebody else is writing"):
            cache.save_pretrained(folder)
        writer.stdin.write("die\n")
        writer.stdin.flush()
        assert writer.wait() == 1
    assert (folder / session_files.LOCK).exists()
    cache.save_pretrained(folder)


@pytest.mark.parametrize("wrong", [random_ids(2, 99), random_ids(1, 100), torch.zeros(2, 100), [1, 2]], ids=type)
def test_token_ids_of_another_shape_are_refused(kept, wrong):
    with pytest.raises(ValueError, match=r"`token_ids` must be all tokens in the cache, int64 \[2, 100\]"):
        kept[2].save_pretrained(kept[0], token_ids=wrong)


def test_a_static_cache_is_neither_saved_nor_loaded(model, kept):
    with pytest.raises(NotImplementedError, match="cannot be saved"):
        HSAStaticCache(model.config, 10).save_pretrained(kept[0])
    with pytest.raises(NotImplementedError, match="HSACache.from_pretrained"):
        HSAStaticCache.from_pretrained(kept[0], model.config)


@pytest.mark.gpu
@torch.no_grad()
def test_a_session_moves_to_the_model(tmp_path):
    model = tiny_model().cuda()
    ids, more = random_ids(2, 100).cuda(), random_ids(2, 60).cuda()
    _, cache = read(model, ids, [30])
    cache.save_pretrained(tmp_path, model=model)
    expected = go_on(model, cache, more)
    for place in PLACES:
        for its_model in (None, model):
            loaded = HSACache.from_pretrained(tmp_path, model.config, model=its_model, memory=place)
            assert torch.allclose(go_on(model, loaded, more), expected, rtol=1e-3, atol=1e-3)
