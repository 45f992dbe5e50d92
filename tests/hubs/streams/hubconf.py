"""Generators, async generators, coroutines and context managers, and a log of what they did."""

dependencies = ["torch"]

import asyncio
import contextlib
import time

import torch


class Number:
    """Counts, and can be compared and added to."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Number(self.value + (other.value if isinstance(other, Number) else other))

    __radd__ = __add__

    def __iadd__(self, other):
        self.value += other
        return self

    def __mul__(self, other):
        return self.value * other

    def __rsub__(self, other):
        return other - self.value

    def __lt__(self, other):
        return self.value < other

    def __neg__(self):
        return -self.value

    def __int__(self):
        return int(self.value)

    def __float__(self):
        return float(self.value)

    def __eq__(self, other):
        raise AssertionError("not asked")


class Scope:
    def __init__(self, log, swallows=()):
        self.log = log
        self.swallows = swallows

    def __enter__(self):
        self.log.append("enter")
        return self

    def __exit__(self, kind, error, trace):
        self.log.append(f"exit {None if kind is None else kind.__name__}: {error}")
        return kind is not None and issubclass(kind, self.swallows)


class AsyncScope:
    def __init__(self, log):
        self.log = log

    async def __aenter__(self):
        await asyncio.sleep(0)
        self.log.append("aenter")
        return 5

    async def __aexit__(self, kind, error, trace):
        await asyncio.sleep(0)
        self.log.append(f"aexit {None if kind is None else kind.__name__}")


class Streams(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        return x + 1

    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    def written(self):
        return list(self.log)

    def count(self, end, fail_at=None):
        """Counts, and logs what it did."""
        try:
            for number in range(end):
                if number == fail_at:
                    raise KeyError(f"no item {number}")
                self.log.append(f"made {number}")
                yield torch.full((2,), float(number))
            return "all"
        finally:
            self.log.append("ended")

    async def acount(self, end, fail_at=None):
        try:
            for number in range(end):
                await asyncio.sleep(0)
                if number == fail_at:
                    raise KeyError(f"no item {number}")
                self.log.append(f"made {number}")
                yield number
        finally:
            await asyncio.sleep(0)
            self.log.append("ended")

    async def twice(self, x, *, pause=0):
        """Twice x, later."""
        await asyncio.sleep(pause)
        self.log.append("doubled")
        return x * 2

    async def fails(self):
        await asyncio.sleep(0)
        raise ValueError("later")

    def documented(self, x: "torch.Tensor", /, size: int = 3, *rest, scale=float("inf"), **options) -> "list[int]":
        """What it does.

        And more of it.
        """

    def scope(self, swallows=None):
        return Scope(self.log, (swallows,) if swallows else ())

    @contextlib.contextmanager
    def managed(self):
        try:
            yield "inside"
        except ValueError as error:
            self.log.append(f"caught {error}")

    def ascope(self):
        return AsyncScope(self.log)

    def number(self, value):
        return Number(value)

    def echo(self, value):
        return value


def streams():
    """A module with all of them."""
    return Streams()
