"""Models that come by their weights in every way there is. Most are large enough for mappings of their own."""

dependencies = ["torch"]

import copy
import fcntl
import io
import mmap
import os
import signal
import threading
import warnings

import torch
from torch import nn

N = 512  # a square of it in float32 is 1 MiB


class Holder(nn.Module):
    """Whatever tensors it is given, as parameters if they can be, else as buffers."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def layers():
    return nn.Sequential(
        nn.Linear(N, 2 * N),
        nn.Conv2d(64, 128, 7),
        nn.Embedding(1000, N),
        nn.LSTM(N, N, 2),
        nn.BatchNorm2d(40_000),
        nn.Bilinear(64, 64, 65),
        nn.MultiheadAttention(N, 8),
    )


def cloned_layers():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(N, 8, N, batch_first=True), 3)


def factories():
    made = {
        "empty": torch.empty(N, N).fill_(3),
        "zeros": torch.zeros(N, N),
        "ones": torch.ones(N, N),
        "full": torch.full((N, N), 0.25),
        "rand": torch.rand(N, N),
        "randn": torch.randn(N, N),
        "normal": torch.normal(0.0, 1.0, (N, N)),
        "randint": torch.randint(0, 9, (N, N)),
        "randperm": torch.randperm(N * N),
        "arange": torch.arange(N * N),
        "linspace": torch.linspace(0, 1, N * N),
        "eye": torch.eye(N),
        "tensor": torch.tensor([[0.5] * N] * N),
        "like": torch.rand_like(torch.empty(N, N)),
        "out": torch.rand(N, N, out=torch.empty(N, N)),
        "double": torch.rand(N, N, dtype=torch.float64),
        "half": torch.rand(N, N).half(),
        "bfloat": torch.randn(N, N).bfloat16(),
        "complex": torch.randn(N, N, dtype=torch.complex64),
        "bool": torch.rand(N, N) > 0.5,
        "bytes": torch.randint(0, 255, (N, 2 * N), dtype=torch.uint8),
        "generator": torch.rand(N, N, generator=torch.Generator().manual_seed(5)),
        "numpy": torch.from_numpy(torch.rand(N, N).numpy().copy()),
        "small": torch.rand(7),
        "scalar": torch.tensor(7),
        "nothing": torch.empty(0, 3),
    }
    return Holder(**{f"buffer_{name}": tensor for name, tensor in made.items()}, **{
        f"parameter_{name}": nn.Parameter(tensor.clone())
        for name, tensor in made.items()
        if tensor.is_floating_point() or tensor.is_complex()
    })


def initialised():
    made = [nn.Parameter(torch.empty(N, N)) for _ in range(8)]
    net = Holder(**{f"p{number}": parameter for number, parameter in enumerate(made)})
    for parameter, how in zip(made, ("uniform_", "normal_", "xavier_normal_", "kaiming_uniform_", "orthogonal_",
                                     "trunc_normal_", "eye_", "zeros_")):
        getattr(nn.init, how)(parameter)
    return net


def shapes():
    base = torch.rand(4, N, N)
    return Holder(
        first=base[0], second=base[1:], whole=base, transposed=torch.rand(N, 2 * N).t(),
        strided=torch.rand(2 * N, 2 * N)[::2, ::2], few=torch.rand(8, N, N)[3], expanded=torch.rand(N, 1).expand(N, N),
        channels_last=torch.rand(8, 8, 64, 64).to(memory_format=torch.channels_last),
        part=nn.Parameter(torch.rand(2 * N, N)[7:-1]),
    )


def tied():
    net = nn.Sequential(nn.Embedding(1000, N), nn.Linear(N, 1000, bias=False))
    net[1].weight = net[0].weight
    return net


def from_checkpoint(assign=False, mmap=False):
    saved = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N)).state_dict()
    path = os.path.join(os.environ["TMPDIR"] if "TMPDIR" in os.environ else "/tmp", f"weights-{os.getpid()}.pt")
    torch.save(saved, path)
    net = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    net.load_state_dict(torch.load(path, mmap=mmap, weights_only=True), assign=assign)
    os.unlink(path)
    return net


def changed_after():
    """Storages that get other memory, go, or come back after they were registered."""
    net = nn.Sequential(*(nn.Linear(N, N) for _ in range(6)))
    net[0].half()
    net[1].weight.data = torch.rand(N, N)
    net[2].weight = nn.Parameter(net[2].weight.detach() * 2)
    net[3].weight.data.untyped_storage().resize_(8 * N * N)
    net[4].weight.data.share_memory_()
    net[5] = nn.Linear(N, N)
    del net[0].bias
    other = [nn.Linear(N, N) for _ in range(30)]
    del other
    return net


def not_persistent():
    net = Holder(weight=nn.Parameter(torch.rand(N, N)))
    net.register_buffer("left_out", torch.empty(N, N).uniform_(), persistent=False)
    net.register_buffer("sum", torch.zeros(1))
    net.register_state_dict_pre_hook(lambda module, *_: module.sum.fill_(float(module.left_out.double().sum())))
    return net


def deep_copied():
    return copy.deepcopy(layers())


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Linear(N, N), nn.ReLU()))


def used_in_the_build():
    net = nn.Sequential(nn.Linear(N, N), nn.BatchNorm1d(N))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.set_num_threads(1)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.rand(4, N)).square().sum().backward()
        optimizer.step()
    return net


def in_threads():
    made = {}

    def make(number):
        layer = nn.Linear(N, N)
        with torch.no_grad():
            layer.weight.fill_(number)
            layer.bias.fill_(number)
        made[str(number)] = layer

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return nn.ModuleDict({name: made[name] for name in sorted(made)})


def forks():
    """A child of the build's writes to the parameters, and the parent does after that."""
    net = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            net[0].weight[0].zero_()  # too little for OpenMP, which a fork does not have
        os._exit(0)
    os.waitpid(child, 0)
    with torch.no_grad():
        net[1].weight[0] = 5.0
    net.append(nn.Linear(N, N))
    return net


def loads_data():
    net = nn.Linear(N, N)
    batches = torch.utils.data.DataLoader(torch.arange(8.0), batch_size=2, num_workers=2)
    with torch.no_grad():
        net.weight[0, :2] = torch.stack(list(batches)).sum(0)
    return nn.Sequential(net, nn.Linear(N, N))


_kept = []


def the_same_again():
    if not _kept:
        _kept.append(nn.Linear(N, N))
    return _kept[0]


def raises_once():
    if not _kept:
        _kept.append(nn.Linear(N, N))
        raise ValueError("the first time")
    return _kept[0]


def megabytes(count, how="empty"):
    """So many parameters of 1 MiB, and what the process has in shared memory files when they are built."""
    if how == "checkpoint":
        buffer = io.BytesIO()
        torch.save({str(number): torch.rand(N, N) for number in range(count)}, buffer)
        buffer.seek(0)
        made = torch.load(buffer, weights_only=True)
        del buffer
    else:
        made = {str(number): getattr(torch, how)(N, N) for number in range(count)}
    net = Holder(**{f"p{name}": nn.Parameter(tensor) for name, tensor in made.items()})
    net.register_buffer("shared", torch.tensor(_shared_bytes()))
    net.register_buffer("largest", torch.tensor(_status("VmHWM")))
    return net


def one_by_one(count):
    """So many parameters of 1 MiB, each made, registered and filled before the next."""
    return nn.Sequential(*(nn.Linear(N, N, bias=False) for _ in range(count)))


def dies(count):
    net = megabytes(count)
    os.kill(os.getpid(), signal.SIGKILL)
    return net


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def _shared_bytes():
    with open("/proc/self/maps") as file:
        rows = [line.split() for line in file if "isohub-parcel" in line]
    ends = [[int(end, 16) for end in row[0].split("-")] for row in rows if row[1].endswith("s")]
    return sum(end - start for start, end in ends)


def keeps_writing(how):
    """A build that wants to change its state dict after it was sent."""
    net = one_by_one(4)
    for name in os.listdir("/proc/self/fd"):
        place = "/proc/self/fd/" + name
        if "isohub-parcel" not in os.readlink(place):
            continue
        if how == "maps":
            from isohub.worker.backing import Backing  # this worker's own code, which a repo can change

            Backing._settle = lambda backing: None
            _kept.append(mmap.mmap(int(name), 1 << 20))
        elif how == "descriptor":
            _kept.append(os.dup(int(name)))
        elif how == "truncates":
            os.ftruncate(int(name), 0)
        elif how == "seals":
            fcntl.fcntl(int(name), 1033, 2)
    assert _kept or how in ("truncates", "seals")
    return net


def change_kept():
    """What comes of writing to what was kept."""
    try:
        os.pwrite(_kept[0], b"x" * 4096, 0)
        os.ftruncate(_kept[0], 0)
    except OSError as error:
        return error.strerror
    return "changed"
