"""A ref on an old Python with an old torch, beside one on the host's: a real interpreter, and torch from the index.

It needs Python 3.9 or 3.8, and the package index; without one of them all of this is skipped, with the reason, unless
``ISOHUB_EXPECT`` has ``python3.9``, which turns that into a failure. The environment takes 3.3 GB and half a minute; where
``ISOHUB_TEST_CACHE`` names a directory it is kept there for the next run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import isohub
from isohub import errors
from isohub.environments.interpreters import find_interpreter
from isohub.wire.arena import dtype_names
from tests.attacks import acts
from tests.conftest import HUBS, eventually, require_layers
from tests.servers.git_repo import GitRepo

TORCH = "1.13.1"
REQUIREMENTS = [f"torch=={TORCH}", "numpy<2"]
#: Two versions of one model: the second says what only a later torch has.
HUBCONF = """
dependencies = ["torch"]
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x) * {factor}

def net():
    return Net()
"""
NEW_ONLY = "\nfrom torch.func import functional_call  # torch 2.0 and later\nmatch 1:\n    case 1: pass\n"
# The same in that interpreter by itself, in the way of the repo's own README.
ALONE = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import torch, hubconf
torch.manual_seed(7)
net = hubconf.net()
x = torch.arange(12.0).reshape(3, 4) / 7
x.requires_grad_()
out = net(x)
out.sum().backward()
state = {name: value.tolist() for name, value in net.state_dict().items()}
print(json.dumps([out.tolist(), x.grad.tolist(), state, torch.__version__, sys.version_info[:2]]))
"""


def _missing(reason: str) -> None:
    if "python3.9" in os.environ.get("ISOHUB_EXPECT", ""):
        pytest.fail(f"ISOHUB_EXPECT says that there is an old Python and an index: {reason}")
    pytest.skip(f"no old Python with torch {TORCH} here: {reason}")


@pytest.fixture(scope="module")
def environment():
    for version in ("3.9", "3.8"):
        try:
            find_interpreter(version)
        except errors.EnvironmentBuildError as error:
            reason = str(error)
        else:
            return isohub.Environment(requirements=REQUIREMENTS, python=version)
    _missing(reason)
    return None


@pytest.fixture(scope="module")
def own(environment, tmp_path_factory):
    """A session whose store has that environment, with a secret around it."""
    place = os.environ.get("ISOHUB_TEST_CACHE") or tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_SECRET", "s3cr3t")
        with isohub.Session(place, timeout_s=120) as opened:
            try:
                opened.prepare(HUBS / "echoes", environment=environment)
            except (errors.SourceUnavailableError, errors.OfflineError) as error:
                _missing(str(error).splitlines()[0])
            yield opened


@pytest.fixture(scope="module")
def echo(own, environment):
    return own.load(str(HUBS / "echoes"), "echo", environment=environment)


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    repo = GitRepo(tmp_path_factory.mktemp("git") / "repo")
    repo.commit({"hubconf.py": HUBCONF.format(factor=1)})
    repo.tag("old")
    repo.commit({"hubconf.py": HUBCONF.format(factor=2) + NEW_ONLY})
    repo.tag("new")
    return repo.path


def runtime_of(session, name):
    (key,) = [key.runtime for key, entry in session._pool._entries.items() if entry.worker.name == name]
    return key


def test_two_refs_each_on_its_own(own, environment, refs, tmp_path):
    old = own.load(f"{refs}:old", "net", environment=environment, seed=7)
    new = own.load(f"{refs}:new", "net", seed=7)
    infos = {worker.pid: worker for worker in own.workers()}
    on_old, on_new = infos[old.stats().pid], infos[new.stats().pid]
    assert on_old.python.startswith(("3.8.", "3.9."))
    assert on_old.torch.startswith(TORCH)
    assert (on_new.environment, on_new.torch) == ("host", torch.__version__)
    x = (torch.arange(12.0).reshape(3, 4) / 7).requires_grad_()
    out = old(x)
    out.sum().backward()
    # As it is in that interpreter alone, to the bit.
    runtime = runtime_of(own, on_old.name)
    (tmp_path / "hubconf.py").write_text(HUBCONF.format(factor=1))
    command = [runtime.python, "-c", ALONE, *runtime.packages, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    expected, gradient, state, version, python = json.loads(done.stdout)
    assert (version, python) == (on_old.torch, [int(part) for part in on_old.python.split(".")[:2]])
    assert out.tolist() == expected
    assert x.grad.tolist() == gradient
    assert {name: value.tolist() for name, value in old.state_dict().items()} == state
    # State goes both ways: the same weights on two versions of torch.
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new(x), out * 2)
    old.load_state_dict({name: value + 1 for name, value in new.state_dict().items()})
    assert torch.equal(old.state_dict()["layers.0.bias"], new.state_dict()["layers.0.bias"] + 1)
    (second,) = torch.autograd.grad(torch.autograd.grad(old(x).pow(2).sum(), x, create_graph=True)[0].sum(), x)
    assert second.shape == x.shape
    assert second.abs().sum() > 0


def test_the_new_ref_does_not_run_there(own, environment, refs):
    with pytest.raises(errors.RemoteError, match=r"invalid syntax|torch\.func"):
        own.load(f"{refs}:new", "net", environment=environment)


def shown(tensor):
    """What of a tensor has to come back."""
    bits = tensor.contiguous()
    if bits.is_conj() or bits.is_neg():
        bits = bits.resolve_conj().resolve_neg()
    same = bits.view(torch.uint8) if bits.dtype is not torch.bool and bits.dim() else bits
    return tensor.dtype, tensor.shape, tensor.stride(), same.tolist()


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_every_dtype_that_both_have(echo):
    _, version = echo.versions()
    assert version.startswith(TORCH)
    lacked = set()
    for name in dtype_names():
        dtype = getattr(torch, name)
        bits = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
        tensor = (bits % 2).bool().view(2, 3) if dtype is torch.bool else bits.view(dtype).view(2, 3)
        try:
            back = echo([tensor, tensor.T, tensor[0, 0], tensor[:0], dtype])
        except errors.ValueNotTransferableError as error:
            assert f"torch.{name} cannot go to" in str(error)
            assert f"torch {version}" in str(error)
            lacked.add(name)
            continue
        assert [shown(item) for item in back[:2]] == [shown(tensor), shown(tensor.T)]
        assert back[3].shape == (0, 3)
        assert back[4] is dtype
        assert back[0].untyped_storage().data_ptr() == back[1].untyped_storage().data_ptr()
    assert {"uint16", "float8_e5m2"} <= lacked <= {name for name in dtype_names() if "float8" in name or "uint" in name}
    assert "uint8" not in lacked


def test_a_state_with_a_dtype_that_it_lacks_is_refused_by_name(own, environment, refs):
    old = own.load(f"{refs}:old", "net", environment=environment)
    state = {name: value.to(torch.float8_e5m2) for name, value in old.state_dict().items()}
    with pytest.raises(errors.ValueNotTransferableError, match=r"torch\.float8_e5m2 cannot go"):
        old.load_state_dict(state)
    assert old(torch.ones(1, 4)).shape == (1, 2)


FORMS = {
    "conjugate": lambda: torch.tensor([1 + 2j, 3j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j]).conj().imag,
    "coo": lambda: torch.sparse_coo_tensor([[0, 1], [1, 0]], [1.0, 2.0], (2, 3)).coalesce(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantised": lambda: torch.quantize_per_tensor(torch.tensor([0.5, -0.25]), 0.25, 3, torch.qint8),
    "channels": lambda: torch.quantize_per_channel(torch.ones(2, 3), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.quint8),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:torch.quantize_per:UserWarning")
def test_other_forms_of_tensors(echo, form):
    sent = FORMS[form]()
    back = echo(sent)
    assert (back.dtype, back.layout, back.shape) == (sent.dtype, sent.layout, sent.shape)
    if sent.is_quantized:
        assert torch.equal(back.int_repr(), sent.int_repr())
        assert torch.equal(back.dequantize(), sent.dequantize())
    else:
        assert torch.equal(back.to_dense(), sent.to_dense())


def test_arrays_and_other_values(echo):
    for dtype in ("u1", "u2", "u4", "u8", "i8", "f2", "c16", "M8[D]", "?"):
        array = np.arange(3).astype(dtype)
        back = echo(array)
        assert (back.dtype, back.tolist()) == (array.dtype, array.tolist())
    assert echo(np.uint16(3)) == np.uint16(3)
    value = {"a": [1, 2.5, None, "t", b"b", 1j], "s": {1, 2}, "r": range(3), "d": torch.device("cpu")}
    assert echo(value) == value
    assert echo(torch.empty(2, 3, device="meta")).is_meta


def test_aliases_and_what_is_there_twice(own, environment):
    net = own.load(str(HUBS / "echoes"), "net", environment=environment)
    state = net.state_dict()
    assert state["inner.weight"].untyped_storage().data_ptr() == state["tied.weight"].untyped_storage().data_ptr()
    assert [name for name, _ in net.named_parameters()] == ["inner.weight", "inner.bias"]
    assert len(list(net.named_parameters(remove_duplicate=False))) == 4
    x = torch.ones(2, 3, requires_grad=True)
    net(x).sum().backward()
    weight = dict(net.named_parameters())["inner.weight"]
    local = torch.nn.Linear(3, 3)
    local.load_state_dict({"weight": state["inner.weight"], "bias": state["inner.bias"]})
    y = torch.ones(2, 3, requires_grad=True)
    (torch.tanh(local(y)) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(weight.grad, local.weight.grad)
    assert net.state_dict()["count"] == 1


def test_streams_coroutines_and_functions(echo):
    assert list(echo.count(3)) == [0, 1, 2]

    async def waits():
        return await echo.later(5), [number async for number in echo.counts(3)]

    assert asyncio.run(waits()) == (5, [0, 1, 2])
    # What is imported there goes, and what would be compiled code does not.
    assert echo.apply(torch.relu, torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
    with pytest.raises(errors.ValueNotTransferableError, match="compiled for Python"):
        echo.apply(lambda x: x, 1)


def test_the_callers_modes(echo):
    assert echo.state() == (torch.float32, False, "highest", True)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad():
            assert echo.state() == (torch.float64, True, "medium", False)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert echo.state() == (torch.float32, False, "highest", True)


def test_autocast(own, environment, refs):
    old = own.load(f"{refs}:old", "net", environment=environment)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert old(torch.ones(1, 4)).dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(errors.RemoteError, match=r"none for that dtype"):
        old(torch.ones(1, 4))


def test_programs(own, environment, refs):
    where = {"environment": environment, "trust_repo": True, "seed": 3}
    program = own.load(f"{refs}:old", "net", returns="torchscript", **where)
    old = own.load(f"{refs}:old", "net", **where)
    x = torch.ones(2, 4)
    torch.testing.assert_close(program(x), old(x))
    with pytest.raises(errors.ValueNotTransferableError, match=rf"torch {TORCH}\S* makes none"):
        own.load(f"{refs}:old", "net", returns="exported_program", example_inputs=x, **where)
    with pytest.raises(errors.RemoteError, match=r"torch 2\.1"):
        own.load(f"{refs}:old", "net", compile=True, **where)


def test_its_zygote_has_imported_nothing(own, echo):
    """Older torches start threads when they are imported: a process that has them is not forked."""
    runtime = runtime_of(own, next(worker.name for worker in own.workers() if worker.pid == echo_pid(echo)))
    workers = {worker.pid for worker in own.workers()}
    outer = psutil.Process(own._pool.warm(runtime).pid)

    def imported() -> list[int]:
        """Those beside the workers that have threads, or torch."""
        found = []
        for process in [outer, *outer.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                paths = [place.path for place in process.memory_maps()] if process.pid not in workers else []
                if any("torch" in path for path in paths) or (paths and process.num_threads() > 1):
                    found.append(process.pid)
        return found

    assert len(outer.children(recursive=True)) > len(workers)
    assert eventually(lambda: not imported())  # a worker whose last handle has just gone has it still


# The same confinement.


@pytest.fixture(scope="module")
def act(echo):
    """Does what `acts` has, in the old interpreter's worker."""
    require_layers("landlock", "seccomp", "namespaces")
    source = Path(acts.__file__).read_text()
    return lambda way, *args: echo.attempt(source, way if isinstance(way, str) else way.__name__, *args)


def test_nothing_of_the_callers_is_read(act, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    outcomes = {way.__name__: act(way, str(secret)) for way in acts.READS}
    assert acts.DONE not in outcomes.values(), outcomes
    assert acts.attempt(None, acts.read, str(secret)) == acts.DONE  # the control
    assert act("read", acts.__file__) != acts.DONE


def test_of_its_interpreters_home_the_interpreter_alone(act, environment):
    prefix = Path(find_interpreter(environment.python).prefix)
    assert act("read", str(next(prefix.glob("lib/python3.*/os.py")))) == acts.DONE
    for path in (
        Path.home() / ".bashrc",
        Path.home() / ".profile",
        prefix.parent.parent / "README.md",
        prefix / ".git",
    ):
        if path.is_file():
            assert acts.attempt(None, acts.read, str(path)) == acts.DONE
            assert act("read", str(path)) != acts.DONE, path


def test_its_environment_is_read_and_not_written(act, own, echo):
    runtime = runtime_of(own, next(worker.name for worker in own.workers() if worker.pid == echo_pid(echo)))
    (packages,) = runtime.packages
    place = Path(packages) / "torch"
    before = sorted(os.listdir(place))
    assert act("read", str(place / "__init__.py")) == acts.DONE
    assert act("list_directory", packages) == acts.DONE
    for way in (acts.create, acts.make_directory, acts.write_by_a_symlink_to_the_directory, acts.symlink_into):
        assert act(way, str(place)) != acts.DONE, way
        assert act(way, str(Path(runtime.python).parent)) != acts.DONE, way
    assert act("append_to", str(place / "__init__.py")) != acts.DONE
    assert sorted(os.listdir(place)) == before
    # Another one's, beside it in the store.
    other = Path(packages).parent.parent / "another"
    other.mkdir(exist_ok=True)
    (other / "file").write_text("x")
    try:
        assert act("read", str(other / "file")) != acts.DONE
    finally:
        (other / "file").unlink()
        other.rmdir()


def echo_pid(echo):
    return echo.__dict__["_isohub"].worker.pid


def test_no_network_and_no_variables(act, echo):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for way in (acts.tcp, acts.connect_by_number, acts.udp, acts.io_uring):
            args = () if way is acts.io_uring else (port,)
            assert act(way, *args) != acts.DONE, way
        assert acts.attempt(None, acts.tcp, port) == acts.DONE  # the control
    assert os.environ["A_SECRET"] == "s3cr3t"
    assert "A_SECRET" not in echo.variables()
