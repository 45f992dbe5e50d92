"""Shared memory: aliases kept, lies refused, seals proven."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isohub.errors import ProtocolError
from isohub.wire.arena import ALIGNMENT, Arena, Cargo, Claims, make_parcel, open_parcel
from isohub.wire.devices import placing
from isohub.wire.tables import Copying, Viewing, unload
from tests.conftest import open_descriptors

LIMIT = 1 << 30
SEALS = 1 | 2 | 4 | 8


def laid_out(*tensors):
    cargo = Cargo()
    for tensor in tensors:
        cargo.add_tensor(tensor)
    cargo.lay_out()
    return cargo


def by_parcel(*tensors):
    cargo = laid_out(*tensors)
    descriptor = make_parcel(cargo)
    try:
        mapping = open_parcel(descriptor, LIMIT)
    finally:
        os.close(descriptor)
    return unload(cargo.claims, 0 if mapping is None else len(mapping), Viewing(mapping))[1]


def test_an_arena_cannot_shrink_or_grow():
    arena = Arena.create(100)
    assert arena.size_bytes == mmap.PAGESIZE
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.descriptor, size)
    arena.close()
    arena.close()


def test_aliases_and_strides_are_kept():
    base = torch.arange(1000.0)
    transposed = base.reshape(10, 100).t()
    half = base[500:].view(torch.int32)
    out = by_parcel(base, transposed, half, base[:0])
    assert torch.equal(out[0], base)
    assert torch.equal(out[1], transposed)
    assert out[1].stride() == transposed.stride()
    out[0][500] = 7.0
    assert out[2][0] == torch.tensor([7.0]).view(torch.int32)[0]
    assert base[500] == 500


def test_a_small_view_of_a_large_storage_is_sent_alone():
    large = torch.zeros(1 << 22)
    assert laid_out(large[5:10]).size_bytes == ALIGNMENT
    assert laid_out(large[::1000]).size_bytes < 1 << 16
    assert laid_out(large[5:10], large).size_bytes == large.numel() * 4
    assert laid_out(torch.zeros(1).expand(1 << 40)).size_bytes == ALIGNMENT


def test_an_empty_parcel():
    assert by_parcel(torch.zeros(0, 3))[0].shape == (0, 3)
    assert make_and_open(0) is None


def make_and_open(size):
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    try:
        return open_parcel(descriptor, LIMIT)
    finally:
        os.close(descriptor)


def test_a_parcel_can_no_longer_change_and_the_callers_writes_stay_its_own():
    cargo = laid_out(torch.ones(10_000))
    descriptor = make_parcel(cargo)
    mapping = open_parcel(descriptor, LIMIT)
    for write in (
        lambda: os.pwrite(descriptor, b"x", 0),
        lambda: os.ftruncate(descriptor, 0),
        lambda: mmap.mmap(descriptor, 4096),
        lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(PermissionError):
            write()
    (tensor,) = unload(cargo.claims, len(mapping), Viewing(mapping))[1]
    tensor.zero_()
    assert os.pread(descriptor, 4, 0) == torch.ones(1).numpy().tobytes()
    os.close(descriptor)
    del mapping
    gc.collect()
    assert not tensor.any()  # the mapping lives as long as its last tensor


@contextlib.contextmanager
def memfd(size=4096, flags=os.MFD_ALLOW_SEALING):
    descriptor = os.memfd_create("x", flags)
    os.ftruncate(descriptor, size)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_parcel_that_is_kept_holds_no_descriptor():
    before = open_descriptors()
    kept = [by_parcel(torch.full((100,), float(number)))[0] for number in range(50)]
    assert open_descriptors() == before
    assert [int(tensor[7]) for tensor in kept] == list(range(50))


def mapped_bytes():
    with open("/proc/self/maps") as maps:
        return sum("isohub-" in line for line in maps)


def test_mappings_go_with_their_last_view():
    before = mapped_bytes()
    (tensor,) = by_parcel(torch.arange(5000))
    arena = Arena.create(1 << 20)
    assert mapped_bytes() == before + 2
    arena.close()
    part, array = tensor[3:], tensor.numpy()
    del tensor, part
    gc.collect()
    assert mapped_bytes() == before + 1
    assert array[4999] == 4999
    del array
    gc.collect()
    assert mapped_bytes() == before


def test_memory_that_something_can_still_write_to_is_refused():
    with memfd() as descriptor:
        writable = mmap.mmap(descriptor, 4096)
        with pytest.raises(ProtocolError, match="cannot be sealed"):
            open_parcel(descriptor, LIMIT)
        writable.close()
        assert open_parcel(descriptor, LIMIT) is not None  # the control: the same memory, unmapped


def test_memory_that_cannot_be_sealed_is_refused():
    with memfd(flags=0) as descriptor, pytest.raises(ProtocolError, match="sealed"):
        open_parcel(descriptor, LIMIT)
    with memfd() as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        with pytest.raises(ProtocolError, match="sealed"):
            open_parcel(descriptor, LIMIT)


def test_memory_sealed_by_its_sender_is_taken():
    with memfd() as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
        assert len(open_parcel(descriptor, LIMIT)) == 4096


def test_other_kinds_of_descriptors_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 4096)
    shm = tempfile.NamedTemporaryFile(dir="/dev/shm")  # noqa: SIM115
    shm.write(b"x" * 4096)
    shm.flush()
    read, write = os.pipe()
    others = [
        os.open(tmp_path / "file", os.O_RDWR),
        os.open(tmp_path, os.O_RDONLY),
        os.open("/dev/zero", os.O_RDWR),
        os.open("/dev/null", os.O_RDWR),
        os.open("/proc/self/mem", os.O_RDONLY),
        os.open(shm.name, os.O_RDWR),
        os.eventfd(0),
        os.pidfd_open(os.getpid()),
        read,
        write,
    ]
    for descriptor in others:
        with pytest.raises(ProtocolError):
            open_parcel(descriptor, LIMIT)
        os.close(descriptor)
    shm.close()


def test_a_long_sparse_parcel_is_refused():
    with memfd(10 << 30) as descriptor, pytest.raises(ProtocolError, match=f"{10 << 30} bytes"):
        open_parcel(descriptor, 4 << 30)


def test_huge_pages_that_are_not_there_are_no_crash():
    try:
        descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        os.ftruncate(descriptor, 2 << 20)
    except OSError:
        return  # this kernel gives none out: nobody can send one either
    try:
        mapping = open_parcel(descriptor, LIMIT)
        assert mapping is None or len(mapping) == 2 << 20
    except ProtocolError:
        pass
    finally:
        os.close(descriptor)


ROW = [0, "float32", 0, [4], [1]]


@pytest.mark.parametrize(
    ("storages", "tensors"),
    [
        ([[0, 5000]], []),
        ([[4096, 1]], []),
        ([[-64, 64]], []),
        ([[0, -1]], []),
        ([[1, 16]], []),
        ([[0, 1 << 63]], []),
        ([[1 << 62, 0]], []),
        ([[0.0, 16]], []),
        ([[True, 16]], []),
        ([[0]], []),
        ([[0, 4096], [0, 4096]], []),
        ([[0, 16]], [[0, "float32", 0, [5], [1]]]),
        ([[0, 16]], [[0, "float32", 1, [4], [1]]]),
        ([[0, 16]], [[0, "float64", 0, [4], [1]]]),
        ([[0, 16]], [[0, "float32", 0, [2, 2], [1, 3]]]),
        ([[0, 16]], [[0, "float32", 0, [4], [-1]]]),
        ([[0, 16]], [[0, "float32", 0, [-4], [1]]]),
        ([[0, 16]], [[0, "float32", -1, [4], [1]]]),
        ([[0, 16]], [[0, "float32", 0, [4], []]]),
        ([[0, 16]], [[0, "float32", 0, [1] * 65, [1] * 65]]),
        ([[0, 16]], [[1, "float32", 0, [4], [1]]]),
        ([[0, 16]], [[-1, "float32", 0, [4], [1]]]),
        ([[0, 16]], [[0, "qint8", 0, [4], [1]]]),
        ([[0, 16]], [[0, "load", 0, [4], [1]]]),
        ([[0, 16]], [[0, 7, 0, [4], [1]]]),
        ([[0, 16]], [[0, "float32", 0, "4", [1]]]),
        ([[0, 16]], [[0, "float32", 0, [1 << 61], [0]]]),
        ([[0, 16]], [[0, "float32", 0, [1 << 40, 1 << 40], [0, 0]]]),
        ([[0, 16]], [[0, "float32", 0, [0, 1 << 40, 1 << 40], [0, 0, 0]]]),
        ([[0, 16]], [[0, "float32", 0, [2], [1 << 61]]]),
        ([[0, 16]], [[0, "float32", 1 << 40, [0], [1]]]),
        ([], [ROW]),
    ],
    ids=str,
)
def test_tables_that_lie_are_refused(storages, tensors):
    arena = Arena.create(4096)
    with pytest.raises(ProtocolError):
        unload(Claims(storages, tensors), arena.size_bytes, Copying(arena.address))
    # The control: the same machinery takes the truth.
    assert unload(Claims([[0, 16]], [ROW]), arena.size_bytes, Copying(arena.address))[1][0].shape == (4,)
    arena.close()


number = st.integers(-2, 300) | st.integers(-(1 << 70), 1 << 70)
row = st.tuples(
    number,
    st.sampled_from(["float32", "bool", "int8", "complex128", "x"]),
    number,
    st.lists(number, max_size=4),
    st.lists(number, max_size=4),
)


@settings(max_examples=500)
@given(st.lists(st.lists(number, max_size=3), max_size=4), st.lists(row.map(list), max_size=4))
def test_any_table_gives_tensors_within_the_memory_or_an_error(storages, tensors):
    arena = Arena.create(4096)
    try:
        made = unload(Claims(storages, tensors), arena.size_bytes, Copying(arena.address))[1]
    except ProtocolError:
        return
    finally:
        arena.close()
    for tensor in made:
        if tensor.numel() and tensor.numel() < 1 << 20:
            last = (
                tensor.data_ptr()
                + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                * tensor.element_size()
            )
            storage = tensor.untyped_storage()
            assert storage.data_ptr() <= tensor.data_ptr()
            assert last + tensor.element_size() <= storage.data_ptr() + storage.nbytes()
            tensor.clone()


def test_bytes_that_are_no_bools_become_bools():
    arena = Arena.create(4096)
    ctypes.memmove(arena.address, bytes([0, 1, 2, 255]), 4)
    (tensor,) = unload(Claims([[0, 4]], [[0, "bool", 0, [4], [1]]]), 4096, Copying(arena.address))[1]
    assert tensor.view(torch.uint8).tolist() == [0, 1, 1, 1]
    arena.close()


FRESH_COMPLEX32 = """
import warnings
warnings.simplefilter("error")
import torch
from isohub.wire.arena import Claims
from isohub.wire.tables import Viewing, unload
tables = Claims([[0, 8]], [[0, "complex32", 0, [2], [1]]])
(tensor,) = unload(tables, 8, Viewing(bytearray(b"\\0\\x3c\\0\\0\\0\\0\\0\\x3c")))[1]
assert torch.view_as_real(tensor).tolist() == [[1.0, 0.0], [0.0, 1.0]]
try:
    torch.empty(0, dtype=torch.complex32)
except UserWarning:
    print("torch warns")
"""


def test_half_complex_numbers_cross_where_warnings_are_errors():
    # In a process of its own: torch says it once.
    done = subprocess.run([sys.executable, "-c", FRESH_COMPLEX32], capture_output=True, text=True, check=False)
    assert done.stdout == "torch warns\n", done.stderr  # the control


def test_a_copy_does_not_follow_the_arena():
    arena = Arena.create(4096)
    (tensor,) = unload(Claims([[0, 16]], [ROW]), 4096, Copying(arena.address))[1]
    ctypes.memset(arena.address, 255, 16)
    assert not tensor.any()
    arena.close()


DEVICE_ROWS = {
    "no storage": [[1, "cuda:0", False]],
    "negative": [[-1, "cuda:0", False]],
    "twice": [[0, "cuda:0", False], [0, "cuda:1", False]],
    "another kind": [[0, "cpu", False]],
    "no number": [[0, "cuda", False]],
    "a large number": [[0, "cuda:1000", False]],
    "leading zeros": [[0, "cuda:00", False]],
    "a line after it": [[0, "cuda:0\n", False]],
    "a bool": [[True, "cuda:0", False]],
    "no name": [[0, 1, False]],
    "short": [[0, "cuda:0"]],
    "direct, and nobody shares": [[0, "cuda:0", True]],
    "direct as a number": [[0, "cuda:0", 1]],
}


@pytest.mark.parametrize("rows", DEVICE_ROWS.values(), ids=DEVICE_ROWS)
def test_devices_that_fit_no_storage_are_refused(rows):
    with contextlib.closing(Arena.create(4096)) as arena, pytest.raises(ProtocolError):
        unload(Claims([[0, 16]], [ROW], rows), arena.size_bytes, Copying(arena.address))


def test_a_storage_of_a_gpu_comes_to_the_cpu_unless_somebody_places_it():
    with contextlib.closing(Arena.create(4096)) as arena:
        tables = Claims([[0, 16]], [ROW], [[0, "cuda:7", False]])
        (tensor,) = unload(tables, arena.size_bytes, Copying(arena.address))[1]
        assert tensor.device.type == "cpu"
        asked = []
        place = placing(lambda number: asked.append(number), Viewing(arena.carrier), lambda name: None)
        (tensor,) = unload(tables, arena.size_bytes, Copying(arena.address), place)[1]
        assert (tensor.device.type, asked) == ("cpu", [7])


class OnTheCpu:
    """An arena of a GPU, as far as its numbers are looked at."""

    size_bytes = 128

    def copied(self, offset, size):
        return torch.arange(offset, offset + size, dtype=torch.uint8)


@pytest.mark.parametrize("rows", [[[0, 64]], [[64, 64], [64, 64]], [[1, 127]], [[128, 0]]])
def test_direct_storages_lie_within_their_arena(rows):
    place = placing(lambda number: None, Viewing(b""), lambda name: OnTheCpu() if name == "cuda:0" else None)
    direct = [[number, "cuda:0", True] for number in range(len(rows))]
    storages, _ = unload(Claims(rows, [], direct), 0, Viewing(b""), place)
    assert [storage.nbytes() for storage in storages] == [size for _, size in rows]
    assert [storage[0] for storage in storages if storage.nbytes()] == [offset for offset, size in rows if size]


@pytest.mark.parametrize(
    ("rows", "name"),
    [([[0, 129]], "cuda:0"), ([[128, 1]], "cuda:0"), ([[0, 100], [0, 100]], "cuda:0"), ([[0, 1]], "cuda:1"), ([[-1, 1]], "cuda:0")],
)  # fmt: skip
def test_direct_storages_beyond_their_arena_are_refused(rows, name):
    place = placing(lambda number: None, Viewing(b""), lambda name: OnTheCpu() if name == "cuda:0" else None)
    direct = [[number, name, True] for number in range(len(rows))]
    with pytest.raises(ProtocolError):
        unload(Claims(rows, [], direct), 0, Viewing(b""), place)
