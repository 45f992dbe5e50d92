"""Gives back what it is given, and says what it runs on; on every Python from 3.8 and every torch from 1.13."""

dependencies = ["torch"]

import os
import sys

import torch


class Net(torch.nn.Module):
    """Weights that two names share, a buffer, and a second order."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.tied = self.inner
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count += 1
        return torch.tanh(self.tied(x)) ** 2


class Scope:
    """Takes care of any exception, and keeps what it was."""

    left = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.left = [kind.__qualname__, str(error)]
        return True


class Echo:
    def __call__(self, value):
        return value

    def apply(self, function, *args):
        return function(*args)

    def ones(self, dtype):
        return {"weight": torch.ones(2, dtype=getattr(torch, dtype))}

    def state(self):
        deterministic, grad = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()
        return torch.get_default_dtype(), deterministic, torch.get_float32_matmul_precision(), grad

    def count(self, end):
        yield from range(end)

    async def later(self, value):
        return value

    async def counts(self, end):
        for number in range(end):
            yield number

    def scope(self):
        return Scope()

    def versions(self):
        return "{}.{}".format(*sys.version_info[:2]), torch.__version__

    def variables(self):
        return sorted(os.environ)

    def origin(self, name):
        """Where a module came from, and in which process it was imported."""
        module = __import__(name)
        return module.__file__, getattr(module, "imported_by", None), os.getpid()

    def attempt(self, source, act, *args):
        """One act of a hostile repo's, by the text of the module that has it."""
        names = {"__name__": "acts"}
        exec(compile(source, "acts.py", "exec"), names)
        return names["attempt"](None, names[act], *args)


def net():
    return Net()


def echo():
    return Echo()
