"""C1 to C5 and C9: a worker that lies. Each lie has its control: the same machinery takes the truth."""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import json
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import msgspec
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isohub import errors
from isohub.errors import ProtocolError
from isohub.session.replies import read_reply
from isohub.wire.arena import open_parcel
from isohub.wire.protocol import HEADER, MAX_DESCRIPTORS, MAX_FRAME_BYTES
from tests.attacks.liar import READY, Liar, frame, value
from tests.conftest import eventually, open_descriptors


@pytest.fixture
def liar():
    with Liar() as made:
        yield made


def memfd(data: bytes = b"", size: int | None = None) -> int:
    descriptor = os.memfd_create("lie", os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    if size is not None:
        os.ftruncate(descriptor, size)
    return descriptor


TABLE = [[[0, 16]], [[0, "float32", 0, [4], [1]]]]


def test_the_truth_is_taken(liar):
    assert liar.answer(frame(value(["l", 1, "two"]))) == [1, "two"]
    descriptor = memfd(torch.arange(4.0).numpy().tobytes())
    answer = frame(value(["T", 0], number=2, claims=TABLE, via="parcel"), 1)
    assert liar.answer(answer, descriptors=[descriptor]).tolist() == [0, 1, 2, 3]
    os.close(descriptor)
    assert liar.answer(frame(value(["T", 0], number=3, claims=TABLE, via="outbox"))).shape == (4,)
    assert liar.worker.alive


class Bomb:
    """What a pickle does when it is read."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


# C1: nothing from a worker is unpickled.


@pytest.mark.parametrize(
    "lie",
    [
        frame(pickle.dumps(Bomb())),
        frame(value(["p", 0], claims=[[[0, 64]], []], via="outbox")),
        frame(value({"__reduce__": ["os.system", "touch exploded"]})),
        frame(value({"__class__": "os.system"})),
    ],
    ids=["body", "tag", "reduce", "class"],
)
def test_c1_a_pickle_is_never_read(liar, lie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists()  # the control: it is a bomb
    (tmp_path / "exploded").unlink()
    with pytest.raises(ProtocolError):
        liar.answer(lie)
    assert not (tmp_path / "exploded").exists()
    assert liar.dead()


# C2: tables that lie.


@pytest.mark.parametrize(
    "claims",
    [
        [[[0, 1 << 40]], []],
        [[[-64, 16]], []],
        [[[0, 16]], [[0, "float32", 0, [5], [1]]]],
        [[[0, 16]], [[0, "float32", 0, [4], [1 << 61]]]],
        [[[0, 16]], [[7, "float32", 0, [4], [1]]]],
        [[[0, 16]], [[0, "float32", 0, [1 << 61], [0]]]],
        [[[0, 1 << 20], [0, 1 << 20]], []],
        [[[0, 16]], [[0, "os.system", 0, [4], [1]]]],
        [[[0, 16]], [[0, "float32", 0, [4]]]],
        [[], []],
        [[[0.5, 16]], []],
    ],
    ids=str,
)
def test_c2_a_table_that_lies_is_refused(liar, claims):
    with pytest.raises(ProtocolError, match="liar@0000000 broke the protocol while being lied to and was killed"):
        liar.answer(frame(value(["T", 0], claims=claims, via="outbox")))
    assert liar.dead()
    with pytest.raises(ProtocolError):  # and it stays refused
        liar.link.ask("run", phase="being asked again")


# Storages: floats, an index of two rows, a scale; tensors over them.
PARTS = [
    [[0, 8], [64, 16], [128, 8]],
    [[0, "float32", 0, [2], [1]], [1, "int64", 0, [1, 2], [2, 1]], [1, "int64", 0, [1, 1 << 40], [0, 0]], [2, "int8", 0, [8], [1]]],
]  # fmt: skip


@pytest.mark.parametrize(
    "tree",
    [
        ["K", "coo", ["Z", 2], ["T", 1], ["T", 0], False],
        ["K", "coo", ["Z", 9], ["T", 2], ["T", 0], False],
        ["K", "csr", ["Z", 1, 9], ["T", 1], ["T", 1], ["T", 0]],
        ["Q", "qint8", ["T", 3], 0.0, 0],
        ["Q", "qint8", ["T", 3], 1.0, 1 << 40],
        ["Q", "qint8", ["T", 3], ["T", 0], ["T", 1], 0],
        ["D", False, "|O", ["Z", 1], ["b", 2]],
        ["D", False, "<U2", ["Z", 1], ["b", 2]],
        ["I", "L", 2, 4, ["b", 2], None, ["d"]],
    ],
    ids=str,
)
def test_c2_a_form_whose_parts_lie_is_refused(liar, tree):
    descriptor = memfd(b"\0" * 8 + b"\0" * 56 + struct.pack("<qq", 0, 2) + b"\0" * 48 + b"\xff" * 8)
    with pytest.raises(ProtocolError, match="broke the protocol while being lied to and was killed"):
        liar.answer(frame(value(tree, claims=PARTS, via="parcel"), 1), descriptors=[descriptor])
    os.close(descriptor)
    assert liar.dead()


def test_c2_the_same_forms_without_the_lie_are_taken(liar):
    descriptor = memfd(b"\0" * 8 + b"\0" * 56 + struct.pack("<qq", 0, 2) + b"\0" * 48 + b"\xff" * 8)
    tree = ["l", ["K", "coo", ["Z", 3], ["T", 1], ["T", 0], True], ["Q", "qint8", ["T", 3], 1.0, 0]]
    sparse, quantised = liar.answer(frame(value(tree, claims=PARTS, via="parcel"), 1), descriptors=[descriptor])
    os.close(descriptor)
    assert sparse.to_dense().shape == (3,)
    assert quantised.dequantize().tolist() == [-1.0] * 8
    assert liar.worker.alive


# C3: memory that can still change, or is none.


FLOATS = torch.arange(4.0).numpy().tobytes()


def parcel(number=1):
    """An answer that is honest if its parcel is."""
    return frame(value(["T", 0], number=number, claims=TABLE, via="parcel"), 1)


def reopened(descriptor, flags):
    """The same memory by another descriptor, as /proc gives it."""
    again = os.open(f"/proc/self/fd/{descriptor}", flags)
    os.close(descriptor)
    return again


def piped():
    read, write = os.pipe()
    os.close(write)
    return read


def unlinked(directory):
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(FLOATS)
        file.flush()
        return os.dup(file.fileno())


def sealed(*seals):
    descriptor = memfd(FLOATS)
    for seal in seals:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seal)
    return descriptor


def epoll():
    with select.epoll() as made:
        return os.dup(made.fileno())


SEAL, SHRINK, GROW, WRITE = (1 << bit for bit in range(4))
FUTURE_WRITE, NEVER_EXECUTED = 0x10, 0x20  # linux/fcntl.h, since 5.1 and 6.3

STRANGE = {
    "unsealable": lambda: resized(os.memfd_create("x"), 4096),
    "sealed against seals": lambda: sealed(SEAL),
    "sealed all over": lambda: sealed(SHRINK | GROW | WRITE, SEAL),
    "by its path alone": lambda: reopened(memfd(FLOATS), os.O_PATH),
    "read only": lambda: reopened(memfd(FLOATS), os.O_RDONLY),
    "written only": lambda: reopened(memfd(FLOATS), os.O_WRONLY),
    "file": lambda: unlinked(None),
    "file of /dev/shm": lambda: unlinked("/dev/shm"),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "pipe": piped,
    "proc": lambda: os.open("/proc/self/status", os.O_RDONLY),
    "memory of this process": lambda: os.open("/proc/self/mem", os.O_RDWR),
    "eventfd": lambda: os.eventfd(0),
    "epoll": epoll,
    "pidfd": lambda: os.pidfd_open(os.getpid()),
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "network": lambda: socket.socket(socket.AF_INET).detach(),
}  # fmt: skip


def resized(descriptor, size):
    os.ftruncate(descriptor, size)
    return descriptor


@pytest.mark.parametrize("kind", STRANGE)
def test_c3_a_descriptor_that_is_no_sealable_memory_is_refused(liar, kind):
    descriptor = STRANGE[kind]()
    before = open_descriptors()
    with pytest.raises(ProtocolError, match="a parcel"):
        liar.answer(parcel(), descriptors=[descriptor])
    assert liar.dead()
    assert open_descriptors() <= before
    os.close(descriptor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: memfd(FLOATS),
        lambda: sealed(SHRINK | GROW | WRITE),
        lambda: sealed(FUTURE_WRITE),
        lambda: sealed(NEVER_EXECUTED),
        lambda: reopened(memfd(FLOATS), os.O_RDWR),
    ],
    ids=["plain", "sealed before", "no write in future", "never executed", "opened again"],
)
def test_c3_memory_of_each_honest_kind_is_taken(liar, make):
    descriptor = make()
    assert liar.answer(parcel(), descriptors=[descriptor]).tolist() == [0, 1, 2, 3]
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & 15 == 15
    with pytest.raises(OSError):
        os.pwrite(descriptor, b"x", 0)
    os.close(descriptor)
    assert liar.worker.alive


@pytest.mark.parametrize("promise", [0, FUTURE_WRITE], ids=["bare", "no write in future"])
def test_c3_memory_that_another_process_has_mapped_for_writing_is_refused(promise):
    holder = (
        "import mmap, sys\nkept = mmap.mmap(int(sys.argv[1]), 4096)\nprint('mapped', flush=True)\n"
        "sys.stdin.readline()\nkept.close()\nprint('gone', flush=True)\nsys.stdin.readline()"
    )
    descriptor = memfd(FLOATS, size=4096)
    command = [sys.executable, "-c", holder, str(descriptor)]
    with subprocess.Popen(
        command, pass_fds=[descriptor], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "mapped\n"
        if promise:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, promise)
        with Liar() as liar, pytest.raises(ProtocolError, match="cannot be sealed against writing"):
            liar.answer(parcel(), descriptors=[descriptor])
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "gone\n"
        with Liar() as honest:  # the control: the same memory, mapped no more
            assert honest.answer(parcel(), descriptors=[descriptor]).tolist() == [0, 1, 2, 3]
        process.stdin.write("\n")
    os.close(descriptor)


def test_c3_memory_that_is_truncated_all_the_while_ends_nobody():
    racer = (
        "import os, sys\nall = [int(n) for n in sys.argv[1:]]\nprint('off', flush=True)\n"
        "while True:\n for n in all:\n  for size in (0, 1 << 20):\n   try: os.ftruncate(n, size)\n   except OSError: pass"
    )
    memories = [memfd(size=1 << 20) for _ in range(200)]
    command = [sys.executable, "-c", racer, *map(str, memories)]
    lengths = set()
    with subprocess.Popen(command, pass_fds=memories, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "off\n"
        for descriptor in memories:
            mapping = open_parcel(descriptor, 1 << 30)
            lengths.add(0 if mapping is None else len(bytes(mapping)))  # every byte is read: no SIGBUS
            os.close(descriptor)
        process.kill()
    assert lengths <= {0, 1 << 20}


def test_c3_memory_that_is_still_mapped_for_writing_is_refused(liar):
    import mmap

    descriptor = memfd(size=4096)
    mapping = mmap.mmap(descriptor, 4096)
    with pytest.raises(ProtocolError, match="sealed"):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor])
    mapping.close()
    os.close(descriptor)


def test_c3_memory_that_is_truncated_ends_nobody(liar):
    descriptor = memfd(size=8)
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor])
    os.close(descriptor)


def test_c3_the_arenas_cannot_be_truncated_by_a_worker(session, hub):
    def truncate(module):
        refused = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                if "isohub-arena" in os.readlink(f"/proc/self/fd/{name}"):
                    try:
                        os.ftruncate(int(name), 0)
                    except OSError:
                        refused += 1
            except OSError:
                pass
        return refused

    with session.load(hub("good"), "mlp") as handle:
        handle(torch.ones(1, 4))
        assert handle.run(truncate) >= 2
        assert handle(torch.ones(1, 4)).shape == (1, 2)


# C4: sizes.


@pytest.mark.parametrize(
    "lie",
    [
        HEADER.pack(b"ih", 2, 0, MAX_FRAME_BYTES + 1, 1),
        HEADER.pack(b"ih", 2, 0, 0xFFFFFFFF, 1),
        HEADER.pack(b"ih", 2, MAX_DESCRIPTORS + 1, 10, 1),
        b"GET / HTTP/1.1\r\n\r\n",
        frame(b"[" * 100_000),
        frame(value(["l", *[["e"]] * 1_100_000])),
        frame(json.dumps(value(None)).replace("null", "[" * 500 + "]" * 500).encode()),
        frame(value(["i", "f" * 100_000])),
    ],
    ids=["long", "longest", "descriptors", "http", "open", "many", "deep", "int"],
)
def test_c4_lengths_counts_and_depths_are_bounded(liar, lie):
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError):
        liar.answer(lie)
    assert liar.dead()
    assert psutil.Process().memory_info().rss - rss < 512 << 20


def test_c4_a_parcel_of_ten_gigabytes_is_refused_unread(liar):
    descriptor = memfd(size=10 << 30)
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError, match=str(10 << 30)):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor])
    assert psutil.Process().memory_info().rss - rss < 16 << 20
    os.close(descriptor)


def huge(capsys):
    """A terabyte: of huge pages where the kernel has them, else of small ones; which, is said."""
    descriptor = -1
    try:
        descriptor = os.memfd_create("lie", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
        os.ftruncate(descriptor, 1 << 40)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        with capsys.disabled():
            print(f"\nno huge pages for a memfd on this kernel ({error.strerror}): a sparse memfd stands for them")
        return memfd(size=1 << 40)
    return descriptor


@pytest.mark.parametrize("pages", ["small", "huge"])
@pytest.mark.parametrize("limit_bytes", [1 << 30, 1 << 50])
def test_c4_a_sparse_terabyte_costs_nothing(liar, pages, limit_bytes, capsys):
    descriptor = huge(capsys) if pages == "huge" else memfd(FLOATS, size=1 << 40)
    liar.link.limit_bytes = limit_bytes
    rss = psutil.Process().memory_info().rss
    try:
        answer = liar.answer(parcel(), descriptors=[descriptor])
    except ProtocolError:
        assert liar.dead()
    else:  # where the caller allows so much, and the kernel gives addresses for it
        assert limit_bytes == 1 << 50
        assert answer.numel() == 4
    assert psutil.Process().memory_info().rss - rss < 16 << 20
    os.close(descriptor)


def test_c4_huge_pages_are_refused(capsys):
    """A write of the caller's into them is a SIGBUS where they run out."""
    try:
        descriptor = resized(os.memfd_create("lie", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB), 2 << 20)
    except OSError as error:
        with capsys.disabled():
            print(f"\nno huge pages for a memfd on this kernel ({error.strerror}): nobody can send one either")
    else:
        with Liar() as liar, pytest.raises(ProtocolError, match="huge pages"):
            liar.answer(parcel(), descriptors=[descriptor])
        os.close(descriptor)
    with Liar() as honest:
        descriptor = memfd(FLOATS, size=2 << 20)
        assert honest.answer(parcel(), descriptors=[descriptor]).tolist() == [0, 1, 2, 3]
        os.close(descriptor)


SENDS_MOST = 253  # SCM_MAX_FD: what one message can bring


def test_c4_a_thousand_descriptors_in_one_frame_never_leave_the_kernel(liar):
    descriptor = memfd(size=16)
    rights = array.array("i", [descriptor] * 1000)
    with pytest.raises(OSError):
        liar.end.sendmsg([parcel()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    before = open_descriptors()
    with pytest.raises(ProtocolError, match="descriptors in flight"):
        liar.answer(parcel(), descriptors=[descriptor] * SENDS_MOST)
    assert open_descriptors() <= before
    os.close(descriptor)


@pytest.mark.parametrize("each", [1, MAX_DESCRIPTORS, 250])
def test_c4_a_thousand_descriptors_over_many_frames_are_closed(liar, each):
    descriptor = memfd(FLOATS)
    before = open_descriptors()

    def speak():
        for _ in range(1000 // each):
            liar.say(frame(value(1), min(each, MAX_DESCRIPTORS)), [descriptor] * each)

    thread = threading.Thread(target=speak)
    thread.start()
    with pytest.raises(ProtocolError):
        liar.link.ask("run", phase="being lied to")
    assert liar.dead()
    thread.join(10)
    assert eventually(lambda: open_descriptors() <= before)
    os.close(descriptor)


def test_c4_descriptors_with_the_bytes_of_one_frame_are_closed(liar):
    descriptor = memfd(size=16)
    before = open_descriptors()

    def drip():
        liar.end.recv(1 << 16)
        for byte in parcel():
            liar.say(bytes([byte]), [descriptor])

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(ProtocolError, match="descriptors"):
        liar.link.ask("run", phase="being lied to")
    thread.join(10)
    assert eventually(lambda: open_descriptors() <= before)
    os.close(descriptor)


def test_c4_a_thousand_honest_parcels_leave_nothing(liar):
    """The control: as many descriptors, one a question."""
    liar.answer(frame(value(1)))
    before = open_descriptors()  # with the arenas that a first question makes
    kept = []
    for number in range(2, 1002):
        descriptor = memfd(FLOATS)
        kept.append(liar.answer(parcel(number), descriptors=[descriptor]))
        os.close(descriptor)
    assert open_descriptors() <= before
    assert all(tensor.tolist() == [0, 1, 2, 3] for tensor in kept)


def lingering():
    """A TCP socket whose close waits for ten seconds, and what has to stay open for that."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 10))
    server, _ = listener.accept()
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.send(bytes(1 << 16))
    return client, (listener, server)


@pytest.mark.parametrize("where", ["parcel", "wish", "surplus", "unread"])
def test_c4_closing_what_a_worker_sent_waits_for_nobody(where):
    client, others = lingering()
    lies = {"parcel": parcel(), "wish": frame(WANT, 1), "surplus": parcel(), "unread": frame(value(1))}
    with Liar() as liar:

        def speak():
            if where != "unread":
                liar.end.recv(1 << 16)
            liar.say(lies[where], [client.fileno()] * (100 if where == "surplus" else 1))
            os.dup2(others[0].fileno(), client.fileno())  # the caller has the last one now

        thread = threading.Thread(target=speak)
        started = time.monotonic()
        thread.start()
        if where == "unread":
            thread.join(10)
        with pytest.raises(ProtocolError):
            liar.link.ask("run", phase="being lied to")
        assert liar.dead()
        assert time.monotonic() - started < 6
        thread.join(10)
    for end in (client, *others):
        end.close()


def test_c4_a_hundred_descriptors_are_refused_and_closed(liar):
    descriptor = memfd(size=16)
    before = open_descriptors()
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(["T", 0], claims=TABLE, via="parcel"), 1), descriptors=[descriptor] * 100)
    assert eventually(lambda: open_descriptors() <= before)
    os.close(descriptor)


P = (1 << 61) - 1  # ints hash to themselves modulo this


@pytest.mark.parametrize(
    "lie",
    [
        value(["l", *[["b", 0]] * 3000], claims=[[[0, 1 << 20]], []], via="outbox"),
        value(["s", *[["i", f"{k * P:x}"] for k in range(40_000)]]),
        value(["d", *[part for k in range(500) for part in (["i", f"{k * P:x}"], 0)]]),
        value(["T", 0], claims=[[[0, 1 << 20]], [[0, "bool", 0, [1 << 20], [1]]] * 8000], via="outbox"),
        value(["l", *[["r", k + 1, "module", "x", False] for k in range(11_000)]]),
    ],
    ids=["bytes", "set", "dict", "bools", "references"],
)
def test_c4_small_frames_do_not_make_much_work(liar, lie):
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError):
        liar.answer(frame(lie))
    assert liar.dead()
    assert psutil.Process().memory_info().rss - rss < 256 << 20


def test_c4_parts_are_counted_before_they_are_built(liar):
    rss = psutil.Process().memory_info().rss
    with pytest.raises(ProtocolError, match="parts"):
        liar.answer(frame(json.dumps(value(None)).replace("null", "[" + "[]," * 16_000_000 + "[]]").encode()))
    assert psutil.Process().memory_info().rss - rss < 512 << 20


FORMS = {
    "len": lambda handle: len(handle),
    "iter": lambda handle: next(iter(handle)),
    "dir": lambda handle: dir(handle),
    "children": lambda handle: list(handle.named_children()),
    "parameters": lambda handle: list(handle.named_parameters()),
    "state": lambda handle: handle.state_dict(),
}


@pytest.mark.parametrize(
    "tree", [5, "x", -1, ["l", 1], ["t", 1, 2, 3], ["t", ["d", 1, 2], None], ["d", "a", 1]], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_c5_an_answer_of_another_form_is_refused(liar, form, tree):
    if (form, tree) in (("len", 5), ("dir", ["l", 1])):
        return  # true ones
    handle = liar.answer(frame(value(["r", 1, "module", "x.Net", True])))
    thread = liar.later(frame(value(tree, number=2)))
    with pytest.raises(ProtocolError):
        FORMS[form](handle)
    thread.join(10)
    assert liar.dead()


# C5: names.


@pytest.mark.parametrize(
    "tree",
    [
        ["r", 1, "module", "os.system"],
        ["r", 0, "module", "x", False],
        ["r", -1, "object", "x", False],
        ["r", 1.0, "object", "x", False],
        ["r", 1, ["module"], "x", False],
        ["r", 1, "class", "x", False],
        ["r", 1, "object", 5, False],
        ["r", 1, "object", "x", 1],
        ["import", "os"],
        ["y", "__loader__"],
        ["v", "__import__('os')"],
    ],
    ids=str,
)
def test_c5_a_reference_or_a_name_that_is_none_is_refused(liar, tree):
    with pytest.raises(ProtocolError):
        liar.answer(frame(value(tree)))
    assert liar.dead()


def test_c5_no_module_is_imported_for_a_name(liar):
    before = set(sys.modules)
    record = liar.answer(frame(value(["M", "antigravity.Output", "this.s", ["R", "this", ["s"], 1]])))
    assert record["this.s"].s == 1
    handle = liar.answer(frame(value(["r", 7, "object", "antigravity.Fly", False], number=2)))
    assert type(handle).__name__ == "RemoteObject"
    assert not {"antigravity", "this"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "lie",
    [
        frame(value(1, number=2)),
        frame(value(1, number=0)),
        frame({"event": "ready", "number": 1, "layers": [[], []], "details": {}}),
        frame({"event": "request", "number": 1}),
        frame({**value(1), "extra": 1}),
        frame({key: part for key, part in value(1).items() if key != "kept"}),
        frame(value(1, via="file")),
        frame(value(1, kept="yes")),
        frame(value(1), 1),
        frame(b"\xff\xfe"),
        frame(b""),
        frame(b"{}{}"),
        frame(json.dumps(value("\ud800")).encode().replace(b"\\ud800", b"\xed\xa0\x80")),
    ],
    ids=range(13),
)
def test_c5_what_is_no_reply_is_refused(liar, lie):
    with pytest.raises(ProtocolError):
        liar.answer(lie)
    assert liar.dead()


FLOAT_AND_BOOL = [[[0, 16]], [[0, "float32", 0, [4], [1]], [0, "bool", 0, [4], [1]]]]


def recorded(rows, tree=("l", ["T", 0], ["T", 1]), **changes):
    """An answer of which these tensors are said to require a gradient."""
    return frame(value(list(tree), claims=FLOAT_AND_BOOL, via="outbox", recorded=rows, **changes))


@pytest.mark.parametrize("rows", [[1], [2], [-1], [0, 0], [True], [1 << 63], ["0"], 0, None, [0.5]], ids=str)
def test_c5_gradients_of_what_can_have_none_are_refused(liar, rows):
    liar.later(recorded(rows))
    with pytest.raises(ProtocolError):
        liar.link.ask("run", phase="being lied to", record=True)
    assert liar.dead()


def test_c5_gradients_that_nobody_asked_for_are_refused(liar):
    with pytest.raises(ProtocolError, match="not recorded"):
        liar.answer(recorded([0]))
    assert liar.dead()


@pytest.mark.parametrize(
    ("tree", "fits"),
    [
        (["l", ["T", 0]], True),
        (["l", None], True),
        (["l", ["T", 1]], False),
        (["l", 1], False),
        (["l", ["l"]], False),
        (["l"], False),
        (["l", ["T", 0], ["T", 0]], False),
        (["T", 0], False),
        (["l", ["A", 0]], False),
    ],
    ids=str,
)
def test_c5_gradients_that_fit_no_input_are_refused(liar, tree, fits):
    x = torch.zeros(4, requires_grad=True)
    liar.later(recorded([0]))
    out = liar.link.ask("run", x, phase="being lied to", record=True)[0]
    liar.later(frame(value(tree, number=2, claims=FLOAT_AND_BOOL, via="outbox")))
    if fits:  # the control
        out.sum().backward()
        return
    with pytest.raises(ProtocolError, match="gradients of a wrong form"):
        out.sum().backward()
    assert x.grad is None
    assert liar.dead()


@pytest.mark.parametrize(
    "early", [frame(value(2, number=2)), frame(value(2, number=2))[:5], b"\0"], ids=["whole", "cut", "byte"]
)
@pytest.mark.parametrize("together", [True, False])
def test_c5_an_answer_to_no_question_is_refused(liar, early, together):
    if together:
        assert liar.answer(frame(value(1)) + early) == 1
    else:
        assert liar.answer(frame(value(1))) == 1
        liar.say(early)
    with pytest.raises(ProtocolError, match="nobody asked for"):
        liar.link.ask("run", phase="asking the second question")
    assert liar.dead()


WANT = {
    "event": "want", "number": 1, "wish": 1, "what": "file", "address": "http://127.0.0.1:9/w.pt", "hash_prefix": None,
    "progress": False,
}  # fmt: skip


def test_c5_a_wish_in_turn_is_answered(liar):
    """The control: without a broker it is refused, and the worker goes on."""
    heard = []

    def speak():
        heard.append(json.loads(liar.end.recv(1 << 16)[HEADER.size :]))
        liar.say(frame(WANT))
        heard.append(json.loads(liar.end.recv(1 << 16)[HEADER.size :]))
        liar.say(frame(value("after")))

    thread = threading.Thread(target=speak)
    thread.start()
    assert liar.link.ask("run", phase="being asked for something") == "after"
    thread.join(10)
    assert heard[1]["wish"] == 1
    assert heard[1]["error"]["kind"] == "network"
    assert liar.worker.alive


@pytest.mark.parametrize(
    "lies",
    [
        frame(WANT) + frame(READY),
        frame(WANT) + frame(value(1, number=2)),
        frame(WANT) + b"iX" + b"." * HEADER.size,
        frame({**WANT, "number": 0}),
        frame({**WANT, "number": 2}),
        frame({**WANT, "what": "directory"}),
        frame({**WANT, "wish": "1"}),
    ],
    ids=["ready", "value", "byte", "early", "late", "kind", "number"],
)
def test_c5_a_wish_that_is_none_and_words_out_of_turn_after_one_are_refused(liar, lies):
    with pytest.raises(ProtocolError):
        liar.answer(lies)
    assert liar.dead()


def test_c5_a_wish_that_nobody_asked_for_is_refused(liar):
    assert liar.answer(frame(value(1))) == 1
    liar.say(frame({**WANT, "number": 1}))
    with pytest.raises(ProtocolError, match="nobody asked for"):
        liar.link.ask("run", phase="asking again")
    assert liar.dead()


@pytest.mark.parametrize(
    "greeting",
    [
        frame(value(1, number=0)),
        frame({**WANT, "number": 0}),
        frame({**READY, "number": 1}),
        frame({**READY, "layers": [[]]}),
    ],
    ids=["value", "wish", "number", "layers"],
)
def test_c5_a_greeting_that_is_none_is_refused(greeting):
    with pytest.raises(ProtocolError, match="while starting and was killed"):
        Liar(greeting)


def test_c5_a_greeting_brings_no_descriptors():
    descriptor = memfd(FLOATS)
    with pytest.raises(ProtocolError, match="not asked for"):
        Liar(frame(READY, 1), [descriptor])
    os.close(descriptor)


def test_c5_ready_twice_is_refused():
    with Liar(frame(READY) + frame(READY)) as liar, pytest.raises(ProtocolError, match="nobody asked for"):
        liar.link.ask("run", phase="asking the first question")


@pytest.mark.parametrize(
    "make",
    [
        lambda: frame(value(1), 1),
        lambda: frame(value(1, via="outbox"), 1),
        lambda: frame(value(1, via="parcel"), 2),
        lambda: frame(WANT, 1),
        lambda: frame(fault(), 1),
        lambda: frame(value(1)),
    ],
    ids=["value", "outbox", "two", "wish", "error", "unclaimed"],
)
def test_c5_descriptors_where_none_belong_are_refused_and_closed(liar, make):
    lie = make()
    descriptor = memfd(FLOATS)
    before = open_descriptors()
    with pytest.raises(ProtocolError, match="descriptors"):
        liar.answer(lie, descriptors=[descriptor] * max(lie[3], 1))
    assert liar.dead()
    assert open_descriptors() <= before
    os.close(descriptor)


# Slow and long frames.


def drip(liar, data, pause_s):
    def speak():
        liar.end.recv(1 << 16)
        for byte in data:
            liar.say(bytes([byte]))
            time.sleep(pause_s)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    return thread


def test_c4_a_frame_in_drips_is_read_within_its_time(liar):
    liar.link.timeout_s = 30
    thread = drip(liar, frame(value("slowly")), 0.002)
    assert liar.link.ask("run", phase="being dripped on") == "slowly"
    thread.join(10)
    assert liar.worker.alive


@pytest.mark.parametrize("length", [200, MAX_FRAME_BYTES], ids=["short", "longest"])
def test_c4_a_frame_in_drips_ends_with_its_time(liar, length):
    liar.link.timeout_s = 0.5
    started, rss = time.monotonic(), psutil.Process().memory_info().rss
    thread = drip(liar, HEADER.pack(b"ih", 2, 0, length, 1) + b"[" * 300, 0.01)
    with pytest.raises(errors.WorkerTimeoutError):
        liar.link.ask("run", phase="being dripped on")
    assert time.monotonic() - started < 5
    assert psutil.Process().memory_info().rss - rss < 16 << 20
    assert liar.dead()
    thread.join(10)


def test_c4_a_frame_that_is_not_whole_in_time_is_not_in_time(liar):
    large = frame(value("x" * (40 << 20)))
    liar.link.timeout_s = 60
    assert len(liar.answer(large)) == 40 << 20  # the control
    liar.link.timeout_s = 0.01
    thread = liar.later(large)
    with pytest.raises(errors.WorkerTimeoutError):
        liar.link.ask("run", phase="being sent much")
    assert liar.dead()
    thread.join(10)


@pytest.mark.parametrize("patient", [True, False])
def test_c4_a_wish_after_a_wish_ends_with_its_time(liar, patient):
    liar.link.timeout_s = 0.5

    def speak():
        for wish in range(1_000_000):
            if (patient or wish == 0) and not liar.end.recv(1 << 16):
                return
            if not patient and not liar.worker.alive:
                return
            liar.say(frame({**WANT, "wish": wish}))

    thread = threading.Thread(target=speak, daemon=True)
    started = time.monotonic()
    thread.start()
    with pytest.raises(errors.WorkerTimeoutError):
        liar.link.ask("run", phase="being asked and asked")
    assert time.monotonic() - started < 5
    thread.join(10)


@pytest.mark.parametrize("shift", [-1, 1, 40], ids=["short", "long", "far"])
def test_c5_a_header_that_does_not_fit_its_body_is_refused(liar, shift):
    body = json.dumps(value("x" * 60)).encode()
    lie = HEADER.pack(b"ih", 2, 0, len(body) - shift, 1) + body
    thread = liar.later(lie)
    if shift < 0:
        liar.link.timeout_s = 1
    with pytest.raises(errors.WorkerTimeoutError if shift < 0 else ProtocolError):
        liar.link.ask("run", phase="being lied to")
    thread.join(10)
    assert liar.dead()


def test_c10_an_error_of_the_reader_quotes_little_and_escapes_it(liar):
    with pytest.raises(ProtocolError) as caught:
        liar.answer(frame({**value(1), "\x1b[2J\u202e" + "x" * 10_000_000: 1}))
    shown = "".join(traceback.format_exception(caught.value))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\x1b[2J" in shown  # the control: it is quoted
    assert len(shown) < 20_000


# C9: errors are text.


def fault(**changes):
    return {
        "event": "error", "number": 1, "kind": "raised", "details": [], "type": "ValueError", "bases": ["ValueError", "Exception"],
        "message": "told", "traceback": "", "kept": False, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "BaseException", "os.system", "Warning"],
)
def test_c9_an_error_is_never_what_would_end_the_caller(liar, name):
    with pytest.raises(errors.RemoteError) as caught:
        liar.answer(frame(fault(bases=[name, "BaseException"], type=name)))
    assert type(caught.value) is errors.RemoteError
    assert isinstance(caught.value, Exception)
    with pytest.raises(ValueError, match="told"):  # the control
        liar.answer(frame(fault(number=2)))
    assert liar.worker.alive


def test_c9_a_kind_of_error_that_does_not_fit_is_refused(liar):
    with pytest.raises(ProtocolError):
        liar.answer(frame(fault(kind="no_entrypoint", details=["x"] * 100_000)))
    assert liar.dead()


def test_c9_an_errors_text_is_escaped(liar):
    with pytest.raises(errors.RemoteError) as caught:
        liar.answer(frame(fault(message="\x1b]0;title\x07 \u202e", type="\x1b[31mE", traceback="\x9b2J")))
    assert "\x1b" not in str(caught.value)
    assert "\x9b" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
    assert "\\x1b[31mE" in str(caught.value)


def test_c9_an_error_may_not_carry_descriptors_or_other_kinds(liar):
    descriptor = memfd(size=16)
    with pytest.raises(ProtocolError):
        liar.answer(frame(fault(), 1), descriptors=[descriptor])
    os.close(descriptor)


# Any bytes at all.


@settings(max_examples=1500)
@given(st.binary(max_size=300))
def test_any_body_is_a_reply_or_a_protocol_error(body):
    try:
        read_reply(body)
    except ProtocolError:
        pass


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(list("ltdoszcfiubBxgeTZyvAnRMrpS")),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=50),
            st.builds(lambda tree: frame(value(tree)), TREES),
            st.builds(lambda b: frame(b), st.binary(max_size=80)),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_frames_give_a_value_or_an_error_and_nothing_is_left(frames):
    before = open_descriptors()
    with Liar() as liar:
        try:
            liar.say(b"".join(frames))
            liar.end.shutdown(1)
            liar.link.ask("run", phase="being lied to")
        except errors.IsohubError:
            pass
    del liar
    # Its own thread may hold it a little longer than this one.
    assert eventually(lambda: gc.collect() >= 0 and open_descriptors() <= before)


def test_the_reader_survives_many_mutations_of_one_answer():
    """The reader alone, over many mutations of one true answer: no growth, and only the two outcomes."""
    truth = json.dumps(value(["d", "k", ["l", 1, ["t", 2.5, "x"]]])).encode()
    import random

    chance = random.Random(0)
    for _ in range(20_000):
        body = bytearray(truth)
        for _ in range(chance.randint(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        try:
            assert msgspec.to_builtins(read_reply(bytes(body)))
        except ProtocolError:
            pass


def test_nothing_of_the_attacks_leaves_processes():
    left = subprocess.run(["pgrep", "-P", str(os.getpid()), "sleep"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
