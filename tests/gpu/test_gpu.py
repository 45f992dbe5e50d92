"""A model on a GPU, in a confined worker: `make test-gpu`, on a machine that has one.

Each case compares the handle with the same model in this process, bit for bit unless it says otherwise.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest
import torch

import isohub
from isohub import errors

HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
        self.head = nn.Linear(8, 10)
        self.tied = nn.Linear(8, 10)
        self.tied.weight = self.head.weight

    def forward(self, x):
        features = self.body(x).mean((2, 3))
        return {"logits": self.head(features), "tied": self.tied(features), "features": features}


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, value):
        return value

    def devices(self, *values):
        return [str(value.device) for value in values]

    def views(self, x):
        return x, x[1:], x.t()

    def make(self, count):
        return torch.arange(count, dtype=torch.float32, device=self.scale.device)

    def fill(self, gib):
        return torch.ones(gib << 28, device=self.scale.device).sum()

    def spin(self):
        x = torch.ones(4096, 4096, device=self.scale.device)
        while True:
            x = torch.tanh(x @ x)


def net():
    return Net()


def same():
    return Same()
"""

#: What crosses: made on the GPU.
VALUES = {
    "float16": lambda: torch.randn(5, 3, device="cuda").half(),
    "bfloat16": lambda: torch.randn(5, 3, device="cuda").bfloat16(),
    "float64": lambda: torch.randn(5, 3, device="cuda").double(),
    "complex64": lambda: torch.randn(4, dtype=torch.complex64, device="cuda"),
    "complex32": lambda: torch.randn(4, dtype=torch.complex64, device="cuda").to(torch.complex32),
    "conjugated": lambda: torch.randn(4, dtype=torch.complex64, device="cuda").conj(),
    "float8": lambda: torch.randn(8, device="cuda").to(torch.float8_e4m3fn),
    "int64": lambda: torch.arange(7, device="cuda"),
    "bool": lambda: torch.arange(9, device="cuda") % 2 == 0,
    "bool, by columns": lambda: (torch.arange(12, device="cuda").reshape(3, 4) % 3 == 0).t(),
    "nothing": lambda: torch.empty(0, 4, device="cuda"),
    "a number": lambda: torch.tensor(3.5, device="cuda"),
    "transposed": lambda: torch.randn(4, 6, device="cuda").t(),
    "expanded": lambda: torch.randn(1, 6, device="cuda").expand(5, 6),
    "every other": lambda: torch.randn(40, device="cuda")[::2],
    "a small view": lambda: torch.randn(1 << 20, device="cuda")[5:9],
    "3 MB": lambda: torch.randn(3 << 18, device="cuda"),
    "parcel, 100 MB": lambda: torch.randn(25 << 20, device="cuda"),
}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    assert torch.cuda.is_available(), "this suite needs a GPU"
    root = tmp_path_factory.mktemp("gpu") / "repo"
    root.mkdir()
    (root / "hubconf.py").write_text(HUBCONF)
    return root


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with isohub.Session(cache_dir=tmp_path_factory.mktemp("cache"), timeout_s=120) as made:
        yield made


@pytest.fixture(scope="module")
def here(repo):
    """The module of the repo's, in this process."""
    names: dict = {}
    exec(compile(HUBCONF, "hubconf.py", "exec"), names)
    return names


@pytest.fixture
def net(session, repo):
    return session.load(repo, "net", device="cuda:0", seed=1)


@pytest.fixture(scope="module")
def same(session, repo):
    return session.load(repo, "same", device="cuda")


@pytest.fixture
def local(here, net):
    model = here["net"]()
    model.load_state_dict(net.state_dict())
    return model.cuda()


def equal(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor):
    tensor = tensor.detach().resolve_conj().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)


def test_the_worker_is_as_confined_as_any(net):
    assert {"landlock", "seccomp"} <= set(net.confinement.active), str(net.confinement)
    assert not {"landlock", "seccomp", "namespaces"} & set(net.confinement.missing), str(net.confinement)


def test_a_worker_without_a_device_sees_none(session, repo):
    def look(module):
        import glob
        import os as remote_os

        import torch as remote_torch

        found = []
        for path in [*glob.glob("/dev/nvidia*"), "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]:
            try:
                remote_os.close(remote_os.open(path, remote_os.O_RDWR))
                found.append(path)
            except OSError:
                pass
        return found, remote_torch.cuda.is_available()

    assert session.load(repo, "net").run(look) == ([], False)
    assert session.load(repo, "net", device="cuda").run(look)[0]


def test_tensors_of_the_gpu_come_back_to_it(net, local):
    x = torch.randn(2, 3, 8, 8, device="cuda")
    answer, expected = net(x), local(x)
    for name, value in expected.items():
        assert answer[name].device == value.device == torch.device("cuda", 0)
        assert equal(answer[name], value), name


def test_tensors_of_the_cpu_come_back_to_it(net, local):
    x = torch.randn(2, 3, 8, 8)
    answer, expected = net(x), local(x.cuda())
    assert answer["logits"].device.type == "cpu"
    assert equal(answer["logits"], expected["logits"])
    assert equal(net.body(x), local.body(x.cuda()))


def test_gradients_come_back_to_where_the_inputs_are(net, local):
    for device in ("cuda", "cpu"):
        x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
        y = x.detach().cuda().requires_grad_()
        for part in (*net.parameters(), *local.parameters()):
            part.grad = None
        (net(x)["logits"].square().sum()).backward()
        (local(y)["logits"].square().sum()).backward()
        assert x.grad.device.type == device
        torch.testing.assert_close(x.grad.cuda(), y.grad)
        for (name, one), (_, other) in zip(net.named_parameters(), local.named_parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad.cuda(), other.grad, msg=name)


def test_gradients_of_gradients(net, local):
    x = torch.randn(1, 3, 4, 4, device="cuda", requires_grad=True)
    found = []
    for model in (net, local):
        (first,) = torch.autograd.grad(model(x)["features"].pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_values_of_the_gpu_cross_both_ways(same, make):
    value = make()
    answer = same(value)
    assert answer.device == value.device
    assert equal(answer, value)
    assert same.devices(value) == ["cuda:0"]


def test_the_cpu_s_own_cross_to_the_model_s_gpu_and_back(same):
    value = torch.randn(6)
    assert same.devices(value) == ["cuda:0"]
    answer = same([value, {"again": value}])
    assert answer[0].device.type == "cpu"
    assert answer[0] is answer[1]["again"] or answer[0].data_ptr() == answer[1]["again"].data_ptr()
    assert equal(answer[0], value)


def test_aliases_stay_aliases_on_the_gpu(same):
    whole, rest, turned = same.views(torch.randn(4, 4, device="cuda"))
    assert (
        whole.untyped_storage().data_ptr() == rest.untyped_storage().data_ptr() == turned.untyped_storage().data_ptr()
    )
    whole[1, 0] = 7
    assert float(rest[0, 0]) == float(turned[0, 1]) == 7


def test_state_comes_to_the_cpu_with_its_ties(net, local):
    state = net.state_dict()
    assert {value.device.type for value in state.values()} == {"cpu"}
    assert state["head.weight"].data_ptr() == state["tied.weight"].data_ptr()
    for name, value in local.state_dict().items():
        assert equal(state[name], value)
    assert next(net.parameters()).device.type == "cpu"
    changed = {name: value + 1 for name, value in local.state_dict().items()}
    net.load_state_dict(changed)
    assert equal(net.state_dict()["head.weight"], changed["head.weight"])


def test_a_gpu_model_as_a_state_dict(session, repo, local, net):
    state = session.load(repo, "net", device="cuda:0", seed=1, returns="state_dict")
    for name, value in net.state_dict().items():
        assert equal(state[name], value)


def test_the_caller_s_autocast_is_the_worker_s(net, local):
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        answer, expected = net(x), local(x)
    assert answer["logits"].dtype == expected["logits"].dtype == torch.float16
    assert equal(answer["logits"], expected["logits"])


def test_to_moves_both_ways(session, repo):
    handle = session.load(repo, "net", seed=1, sandbox=isohub.Sandbox(gpu=0))
    x = torch.randn(1, 3, 4, 4)
    before = handle(x)["logits"]
    handle.cuda()
    torch.testing.assert_close(handle(x)["logits"], before, rtol=1e-2, atol=1e-3)
    assert handle(x.cuda())["logits"].device.type == "cuda"
    handle.cpu()
    assert equal(handle(x)["logits"], before)


def test_a_worker_that_sees_no_gpu_gets_host_copies(session, repo):
    handle = session.load(repo, "net", seed=1)
    x = torch.randn(1, 3, 4, 4)
    assert equal(handle(x.cuda())["logits"], handle(x)["logits"])


def test_shared_memory_is_page_locked_on_both_sides(same):
    value = torch.randn(1 << 20, device="cuda")
    for _ in range(3):
        same(value)

    def locked(module):
        from isohub.wire import devices

        return sorted(devices._locked.values())

    from isohub.wire import devices

    assert any(done for _, done in devices._locked.values())
    assert any(done for _, done in same.run(locked))


def test_memory_of_the_gpu_is_shared_from_the_second_call_on(session, repo):
    handle = session.load(repo, "same", device="cuda", sandbox=isohub.Sandbox(gpu=0))
    traffic = handle._isohub.worker._mailbox.traffic
    value = torch.randn(20 << 20, device="cuda")
    for _ in range(5):  # the first goes by host memory; larger arenas come as it is known what is needed
        value.normal_()
        assert equal(handle(value), value)
    (pair,) = traffic._pairs.values()
    assert min(pair.inbox.size_bytes, pair.outbox.size_bytes) >= value.nbytes
    assert equal(handle([value, value[5:], 2 * value[:100]])[2], 2 * value[:100])
    for _ in range(3):
        assert equal(handle(value), value)
    before = traffic._pairs["cuda:0"].outbox
    for size in (100, 1 << 26):  # the second is too large for either
        other = torch.randn(size, device="cuda")
        assert equal(handle(other), other)
    assert traffic._pairs["cuda:0"].outbox is before
    kept = handle(value)
    handle(value + 1)
    assert equal(kept, value)  # no view of what the next answer overwrites
    handle.close()


def test_a_worker_that_maps_nothing_gets_all_by_host_memory(session, repo, monkeypatch):
    handle = session.load(repo, "same", device="cuda", sandbox=isohub.Sandbox(gpu=True, output=1 << 22))

    def refuse(module):
        from isohub.wire import device_memory

        def attach(descriptor, number, size_bytes):
            import os as remote_os

            remote_os.close(descriptor)
            raise OSError("none")

        device_memory.DeviceArena.attach = attach

    handle.run(refuse)
    value = torch.randn(1 << 20, device="cuda")
    for _ in range(3):
        assert equal(handle(value), value)
    assert handle._isohub.worker._mailbox.traffic._pairs == {}
    assert handle._isohub.worker.alive


def test_a_gpu_out_of_memory_is_the_repo_s_error(same):
    with pytest.raises(errors.RemoteError, match="out of memory"):
        same.fill(512)
    assert same(3) == 3


def test_a_killed_worker_frees_the_gpu(session, repo):
    torch.cuda.synchronize()
    handle = session.load(repo, "same", device="cuda:0", sandbox=isohub.Sandbox(gpu=True, output=1 << 20))
    handle.make(1 << 28)
    free = torch.cuda.mem_get_info()[0]
    caught = []

    def call():
        with pytest.raises(errors.WorkerDiedError) as raised:
            handle.spin()
        caught.append(raised.value.signal_name)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(1)
    os.kill(handle._isohub.worker.pid, signal.SIGKILL)
    thread.join(20)
    assert caught == ["SIGKILL"]
    deadline = time.monotonic() + 20
    while torch.cuda.mem_get_info()[0] <= free and time.monotonic() < deadline:
        time.sleep(0.1)
    assert torch.cuda.mem_get_info()[0] > free


def test_a_thousand_calls_leave_nothing(same):
    value = torch.randn(64, 64, device="cuda")
    same(value)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), torch.cuda.memory_allocated()
    for _ in range(1000):
        same(value)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before[0] + 10  # the driver and other handles have some of their own
    assert torch.cuda.memory_allocated() == before[1]


def test_many_threads_and_two_refs_on_one_gpu(session, repo, net, local, same):
    x = torch.randn(2, 3, 8, 8, device="cuda")
    expected = local(x)["logits"]
    wrong = []

    def work():
        for _ in range(20):
            wrong.extend([1] * (not equal(net(x)["logits"], expected) or not equal(same(x), x)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_device_that_is_not_there_is_the_worker_s_error(session, repo):
    with pytest.raises(errors.RemoteError, match="invalid device ordinal"):
        session.load(repo, "net", device="cuda:63")
