"""A handle in place of a model: calls, methods, attributes, state, and what it refuses."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import isohub
from isohub import errors
from tests.conftest import eventually, gone

Point = namedtuple("Point", "x y")


@pytest.fixture
def mlp(session, hub):
    with session.load(hub("good"), "mlp", seed=0) as handle:
        yield handle


@pytest.fixture
def cnn(session, hub):
    with session.load(hub("good"), "model", seed=0) as handle:
        yield handle


@pytest.fixture
def echo(session, hub):
    """A function that runs in a worker and gives back what it is given."""
    with session.load(hub("good"), "mlp") as handle:
        yield lambda value: handle.run(lambda module, given: given, value)


# Values.


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(1 << 63),
        (1 << 64) + 1,
        -(1 << 200),
        0.0,
        -0.0,
        1e308,
        float("inf"),
        3 + 4j,
        "",
        "Grüße \0 \ud800 \U0001f600",
        "x" * 100_000,
        b"",
        b"\0\xff",
        bytearray(b"abc"),
        [],
        [1, [2, (3, {"a": {4}})]],
        (),
        {},
        {1: 2, (3, 4): "five", None: None},
        OrderedDict([("b", 1), ("a", 2)]),
        {1, 2},
        frozenset({2}),
        slice(1, None, -1),
        range(3, 10, 2),
        Ellipsis,
        torch.Size([2, 3]),
        torch.float16,
        torch.device("cpu"),
        torch.device("cuda:1"),
    ],
    ids=repr,
)
def test_plain_values_come_back_as_they_were(echo, value):
    back = echo(value)
    assert type(back) is type(value)
    assert back == value
    assert repr(back) == repr(value)


def test_not_a_number_comes_back(echo):
    assert echo(float("nan")) != echo(float("nan"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(100)[3:90:7],
        torch.ones(1).expand(5, 6),
        torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]).conj(),
        torch.rand(3, dtype=torch.bfloat16),
        torch.rand(3).to(torch.float8_e4m3fn),
        torch.tensor([1, 2], dtype=torch.uint16),
        torch.rand(3, requires_grad=True),
        torch.nn.Parameter(torch.rand(3)),
        torch.empty(2, 0, 5),
        torch.arange(10_000_000, dtype=torch.int32)[5_000_000:5_000_010],
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_tensors_come_back_as_they_were(echo, tensor):
    back = echo(tensor)
    assert type(back) is torch.Tensor
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    sparse = tensor.numel() * tensor.element_size() * 2 < tensor.untyped_storage().nbytes() and 0 not in tensor.stride()
    if tensor.numel() and not tensor.is_conj() and not sparse:  # a view of little within much is sent alone
        assert back.stride() == tensor.stride()
    as_numbers = (lambda t: t.float()) if "float8" in str(tensor.dtype) else (lambda t: t)
    assert torch.equal(as_numbers(back), as_numbers(tensor.detach()))


def test_aliases_stay_aliases(echo):
    base = torch.arange(12.0)
    whole, part = echo([base, base[4:8]])
    whole[4] = 100
    assert part[0] == 100
    assert base[4] == 4


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float64", "complex128"])
def test_numpy_arrays_and_scalars_come_back_as_they_were(echo, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = echo([array, array[::-1], array.T, array[0, 1], np.zeros((0, 2), dtype)])
    for got, sent in zip(back, [array, array[::-1], array.T, array[0, 1], np.zeros((0, 2), dtype)], strict=True):
        assert type(got) is type(sent)
        assert got.dtype == sent.dtype
        assert np.array_equal(got, sent)


def test_read_only_and_foreign_endian_arrays(echo):
    fixed = np.arange(3)
    fixed.flags.writeable = False
    assert np.array_equal(echo(fixed), fixed)
    assert np.array_equal(echo(np.arange(3, dtype=">i4")), np.arange(3))


def test_a_named_tuple_comes_back_by_name_and_position(session, hub):
    with session.load(hub("good"), "namedtuple_output") as handle:
        out = handle(torch.ones(2, 4))
    boxes, scores = out
    assert out.boxes is boxes
    assert out._fields == ("boxes", "scores")
    assert out._asdict()["scores"] is scores
    assert isinstance(out, tuple)
    assert repr(out).startswith("Detection(boxes=")
    with pytest.raises(AttributeError, match="no field 'labels'"):
        _ = out.labels


def test_a_result_of_torchs_own_comes_back_by_name(mlp):
    out = mlp.run(lambda module, x: torch.max(x, dim=0), torch.tensor([[1, 5], [3, 2]]))
    assert out.values.tolist() == [3, 5]
    assert out.indices.tolist() == [1, 0]


def test_a_mapping_with_a_class_comes_back_by_key_attribute_and_position(mlp):
    def output(module):
        class ModelOutput(OrderedDict):
            pass

        return ModelOutput(logits=torch.ones(2), loss=0.5)

    out = mlp.run(output)
    assert out["logits"] is out.logits is out[0]
    assert list(out) == ["logits", "loss"]
    assert out.class_name == "ModelOutput"
    assert out.to_tuple()[1] == 0.5


def test_records_may_be_passed_back(session, hub, echo):
    with session.load(hub("good"), "namedtuple_output") as handle:
        out = handle(torch.ones(2, 4))
    back = echo(out)
    assert (back.class_name, back._fields) == (out.class_name, out._fields)
    assert torch.equal(back.boxes, out.boxes)


def test_fields_win_over_the_methods_of_tuples(mlp):
    def match(module):
        from collections import namedtuple as make

        return make("Match", ["index", "count"])(3, 4)

    out = mlp.run(match)
    assert (out.index, out.count, tuple(out)) == (3, 4, (3, 4))


def test_what_can_do_something_stays_an_object(session, tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Normalizer:\n"
        "    mean: float = 1.0\n"
        "    def __call__(self, x):\n"
        "        return x - self.mean\n"
        "@dataclasses.dataclass\n"
        "class Output:\n"
        "    logits: float = 2.0\n"
        "class Vocabulary(dict):\n"
        "    def encode(self, word):\n"
        "        return self[word]\n"
        "def make():\n"
        "    return Normalizer(), Output(), Vocabulary(a=7)\n"
    )
    normalizer, output, vocabulary = session.load(tmp_path, "make")
    assert normalizer(3.0) == 2.0
    assert (output.logits, output.class_name) == (2.0, "Output")
    assert vocabulary.encode("a") == 7


def test_arguments_keep_their_classes(mlp):
    from collections import Counter, defaultdict
    from enum import IntEnum

    Level = IntEnum("Level", "LOW HIGH")
    assert mlp.run(lambda module, counter: counter.most_common(1), Counter("aab")) == [("a", 2)]
    assert mlp.run(lambda module, lists: lists["new"], defaultdict(list)) == []
    assert mlp.run(lambda module, level: level.name, Level.HIGH) == "HIGH"
    assert mlp.run(lambda module, point: type(point).__name__, Point(1, 2)) == "Point"


def test_bytes_seen_as_bools_leave_the_bytes_alone(mlp):
    def views(module):
        y = torch.tensor([0, 2, 255, 7], dtype=torch.uint8)
        return y, y.view(torch.bool)

    numbers, bools = mlp.run(views)
    assert numbers.tolist() == [0, 2, 255, 7]
    assert bools.tolist() == [False, True, True, True]
    assert bools.view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_hooks_that_could_never_run_are_refused(cnn):
    with pytest.raises(NotImplementedError, match="h.run"):
        cnn.features[0].conv.register_forward_hook(print)
    with pytest.raises(NotImplementedError, match="h.run"):
        cnn.features[0].conv.register_full_backward_hook(print)
    cnn.register_full_backward_hook(print).remove()
    cnn.register_forward_pre_hook(lambda module, inputs: None).remove()


def test_modules_and_buffers_can_be_added(mlp):
    mlp.add_module("extra", torch.nn.Linear(2, 3))
    assert mlp.extra(torch.ones(1, 2)).shape == (1, 3)
    mlp.register_buffer("scale", torch.tensor(2.0))
    assert mlp.get_buffer("scale") == 2.0
    assert mlp.get_parameter("extra.weight").shape == (3, 2)
    assert "extra" in dict(mlp.named_children())
    destination = {}
    assert mlp.state_dict(destination=destination) is destination
    assert "scale" in destination


def test_an_argument_of_a_class_of_the_callers_goes_by_pickle(mlp):
    assert mlp.run(lambda module, point: point.x + point.y, Point(1, 2)) == 3
    assert mlp.run(lambda module, path: str(path), Path("/a/b")) == "/a/b"


@pytest.mark.parametrize("value", [threading.Lock(), (i for i in [1])], ids=["lock", "generator"])
def test_a_live_object_of_the_callers_is_refused(mlp, value):
    with pytest.raises(errors.ValueNotTransferableError, match="use h.run") as caught:
        mlp(value)
    assert isinstance(caught.value, TypeError)
    assert mlp(torch.ones(1, 4)).shape == (1, 2)


def test_an_argument_may_be_a_handle_of_the_same_worker_alone(session, hub):
    model, (_, _, helper) = session.load(hub("good"), "pair")
    wrapped = helper(model, step=2)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(wrapped(x), model(x[::2]))
    with (
        session.load(hub("bad_repr"), "lies")
        if False
        else session.load(hub("raises_in_entrypoint"), "in_call") as other
    ):
        with pytest.raises(errors.ValueNotTransferableError, match="each lives in a process of its own"):
            helper(other)


# Calls.


def test_keywords_and_nested_inputs(session, hub):
    with session.load(hub("good"), "dict_output") as handle:
        out = handle(torch.ones(2, 4))
        assert isinstance(out["inner"]["list"], list)
    with session.load(hub("good"), "talkative") as handle:
        assert isinstance(dir(handle), list)


def test_methods_and_submodules(cnn):
    conv = cnn.features[0].conv
    assert isinstance(conv, torch.nn.Module)
    assert conv.kernel_size == (3, 3)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(
        cnn.head(torch.ones(16)), torch.nn.functional.linear(torch.ones(16), cnn.head.weight, cnn.head.bias)
    )
    assert torch.equal(cnn.get_submodule("features.0.conv")(x), conv(x))
    assert cnn.features[0].conv is conv
    assert [name for name, _ in cnn.named_children()] == [
        name for name, _ in cnn.run(lambda m: [(n, 0) for n, _ in m.named_children()])
    ]
    assert "features.0.conv" in dict(cnn.named_modules())
    assert len(cnn.features) == len(list(cnn.features))


def test_attributes_can_be_read_and_set(cnn):
    cnn.confidence = 0.25
    assert cnn.confidence == 0.25
    assert cnn.run(lambda model: model.confidence) == 0.25
    del cnn.confidence
    assert not hasattr(cnn, "confidence")
    with pytest.raises(AttributeError):
        _ = cnn.no_such_attribute


def test_train_and_eval_are_the_remote_ones(cnn):
    assert cnn.train() is cnn
    assert cnn.training is True
    assert cnn.features.training is True
    assert cnn.eval() is cnn
    assert cnn.run(lambda model: model.training) is False
    cnn.training = True
    assert cnn.run(lambda model: model.training) is True


def test_conversions_are_the_remote_ones(mlp):
    assert mlp.to(torch.float64) is mlp
    assert next(mlp.parameters()).dtype == torch.float64
    assert mlp(torch.ones(1, 4, dtype=torch.float64)).dtype == torch.float64
    assert mlp.float() is mlp
    assert next(mlp.parameters()).dtype == torch.float32
    mlp.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in mlp.parameters())


def test_the_callers_gradient_mode_is_the_workers(mlp):
    x = torch.ones(1, 4)
    enabled = lambda module: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())  # noqa: E731
    assert mlp.run(enabled) == (True, False)
    with torch.no_grad():
        assert mlp.run(enabled) == (False, False)
    with torch.inference_mode():
        assert mlp.run(enabled) == (False, True)
        inside = mlp(x)
    assert torch.equal(inside, mlp(x))


def test_hooks_on_the_handle(mlp):
    seen = []
    hook = mlp.register_forward_hook(lambda module, inputs, output: seen.append((module, output.shape)))
    mlp(torch.ones(3, 4))
    hook.remove()
    mlp(torch.ones(3, 4))
    assert seen == [(mlp, (3, 2))]


def test_a_handle_within_a_local_module(mlp):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), mlp)
    assert model(torch.ones(2, 5)).shape == (2, 2)
    assert len(list(model.parameters())) == 2 + len(list(mlp.parameters()))
    assert model.double() is model
    assert mlp(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert set(model.state_dict()) == {"0.weight", "0.bias", *(f"1.{name}" for name in mlp.state_dict())}


def test_run_gives_the_live_module(mlp):
    def double(module, factor, *, offset):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(factor).add_(offset)
        return sum(parameter.numel() for parameter in module.parameters())

    before = mlp.state_dict()
    assert mlp.run(double, 2.0, offset=1.0) == sum(value.numel() for value in before.values())
    after = mlp.state_dict()
    assert all(torch.allclose(after[name], before[name] * 2 + 1) for name in before)


def test_run_may_give_an_object_that_stays(mlp):
    optimiser = mlp.run(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))
    assert isinstance(optimiser, isohub.RemoteObject)

    def step(module, optimiser, x):
        optimiser.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss.item()

    losses = [mlp.run(step, optimiser, torch.ones(8, 4)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


def test_submitted_calls_come_back_in_order(mlp):
    inputs = [torch.full((1, 4), float(i)) for i in range(20)]
    futures = [mlp.submit(x) for x in inputs]
    for x, future in zip(inputs, futures, strict=True):
        assert torch.equal(future.result(30), mlp(x))
    with pytest.raises(errors.RemoteError):
        mlp.submit("no tensor").result(30)


def test_many_threads_may_use_one_handle(session, hub):
    handle = session.load(hub("good"), "plus", 1.0)
    wrong = []

    def work(number):
        for i in range(50):
            x = torch.full((100 + number,), float(i))
            if not torch.equal(handle(x), x + 1):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_input_that_the_model_keeps_does_not_change_under_it(mlp):
    def keep(module, x):
        module.kept = [*getattr(module, "kept", []), x[1:]]
        return [float(part[0]) for part in module.kept]

    for number in range(5):
        assert mlp.run(keep, torch.full((4,), float(number))) == [float(i) for i in range(number + 1)]


def test_an_input_that_the_model_changes_is_the_workers_copy(mlp):
    x = torch.zeros(4)
    assert mlp.run(lambda module, given: given.add_(1), x).tolist() == [1, 1, 1, 1]
    assert not x.any()


def test_answers_grow_and_shrink(session, hub):
    handle = session.load(hub("good"), "plus", 2.0)
    for size in (1, 10, 1 << 18, 3, 1 << 22, 1 << 23, 5, 1 << 22):
        x = torch.arange(size, dtype=torch.float32)
        first, second = handle(x), handle(x + 1)
        assert torch.equal(first, x + 2)
        assert torch.equal(second, x + 3)
        first.zero_()
        assert torch.equal(second, x + 3)


# State.


def test_state_keeps_aliases_metadata_and_buffers(session, hub):
    with session.load(hub("good"), "with_buffers") as handle:
        state = handle.state_dict()
        expected = handle.run(lambda module: (list(module.state_dict()), module.state_dict()._metadata))
        assert (list(state), state._metadata) == (expected[0], expected[1])
        assert dict(handle.named_buffers()).keys() == set(handle.run(lambda m: [n for n, _ in m.named_buffers()]))
    with session.load(hub("good"), "tied_weights") as handle:
        state = handle.state_dict()
        assert state["embedding.weight"].data_ptr() == state["output.weight"].data_ptr()
        names = [name for name, _ in handle.named_parameters()]
        assert names == handle.run(lambda m: [n for n, _ in m.named_parameters()])
        assert len(list(handle.named_parameters(remove_duplicate=False))) == len(names) + 1


def test_state_is_the_callers_own_memory(mlp):
    state = mlp.state_dict()
    before = mlp(torch.ones(1, 4))
    for value in state.values():
        value.fill_(7)
    assert torch.equal(mlp(torch.ones(1, 4)), before)


def test_state_can_be_loaded(session, hub, mlp):
    with session.load(hub("good"), "mlp", seed=99) as other:
        x = torch.rand(3, 4)
        assert not torch.equal(other(x), mlp(x))
        result = other.load_state_dict(mlp.state_dict())
        assert result.missing_keys == []
        assert torch.equal(other(x), mlp(x))
        result = other.load_state_dict({}, strict=False)
        assert len(result.missing_keys) == len(mlp.state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({})


def test_a_local_module_loads_a_remote_state(cnn):
    from torch import nn

    conv = nn.Conv2d(3, 8, 3, padding=1)
    conv.load_state_dict(cnn.features[0].conv.state_dict())
    x = torch.rand(1, 3, 5, 5)
    assert torch.equal(conv(x), cnn.features[0].conv(x))


def test_prefix_and_destination(mlp):
    destination = OrderedDict(kept=1)
    state = mlp.state_dict(destination=destination, prefix="net.")
    assert state is destination
    assert all(name == "kept" or name.startswith("net.") for name in state)


# Objects that are no modules.


def test_a_remote_object_is_used_like_the_object(session, hub):
    counter = session.load(hub("good"), "counter", 5)
    assert counter.add(2) == 7
    assert counter.value == 7
    assert counter.unit == "steps"
    counter.value = 1
    assert counter.add() == 2
    assert len(counter) == 2
    assert counter[0] == 2
    assert list(counter) == [2, 1]
    assert 2 in counter
    assert bool(counter)
    assert {"add", "value", "history"} <= set(dir(counter))
    with pytest.raises(KeyError, match="no such step"):
        counter.fail()
    with pytest.raises(IndexError):
        _ = counter[10]


def test_a_remote_generator_is_iterated(session, hub):
    assert list(session.load(hub("returns_unknown"), "generator"))
    assert list(session.load(hub("good"), "counter")) == []


def test_a_remote_class_makes_objects(session, hub):
    _, (_, _, helper) = session.load(hub("good"), "pair")
    made = helper(None, step=3)
    assert made.step == 3
    made.reset()
    assert made.step == 1


# What a handle refuses, and when it ends.


@pytest.mark.parametrize("refused", [pickle.dumps, copy.copy, copy.deepcopy])
def test_handles_are_not_copied(session, hub, refused):
    for handle in (session.load(hub("good"), "mlp"), session.load(hub("good"), "counter")):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            refused(handle)


def test_a_closed_handle_says_so(session, hub):
    handle = session.load(hub("good"), "mlp")
    handle.close()
    handle.close()
    with pytest.raises(errors.SessionClosedError, match="was closed"):
        handle(torch.ones(1, 4))
    assert "closed" in repr(handle)


def test_the_last_handle_ends_the_worker(hub):
    with isohub.Session() as own:
        first, second = own.load(hub("good"), "mlp"), own.load(hub("good"), "counter")
        (worker,) = own.workers()
        child = first[0]
        first.close()
        assert own.workers() == [worker]
        assert child(torch.ones(1, 4)).shape == (1, 8)
        assert second.add() == 1
        del second
        gc.collect()
        child.close()
        assert eventually(lambda: own.workers() == [])
        assert gone(worker.pid)


def test_handles_that_are_collected_free_their_objects(session, hub):
    with session.load(hub("good"), "mlp") as handle:
        for _ in range(50):
            assert handle.run(lambda module: object()) is not None
        gc.collect()
        assert eventually(lambda: session._pool.background._work.empty())
        handle(torch.ones(1, 4))  # releases travel with the next question

        def held(module):
            import gc as remote_gc

            return max(len(o._objects) for o in remote_gc.get_objects() if type(o).__name__ == "Server")

        assert handle.run(held) < 10


def test_a_fork_may_not_use_a_handle(mlp):
    read, write = os.pipe()
    with pytest.warns(DeprecationWarning, match="fork") if os.sys.version_info >= (3, 12) else _nothing():
        pid = os.fork()
    if pid == 0:
        try:
            mlp(torch.ones(1, 4))
        except errors.SessionClosedError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    assert b"forked process" in os.read(read, 4096)
    os.close(read)
    assert mlp(torch.ones(1, 4)).shape == (1, 2)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


def test_the_layout_of_a_dimension_of_one_crosses(session, hub):
    """Any stride of it is contiguous; kernels look at it."""
    plain = torch.ones(2, 1, 3, 3)
    last = plain.clone(memory_format=torch.channels_last)
    with session.load(hub("good"), "plus", 2.0) as handle:
        for _ in range(3):
            for x in (plain, last):
                assert handle(x).stride() == (x + 2.0).stride()
                assert handle.run(lambda _, y: y.stride(), x) == tuple(x.stride())
