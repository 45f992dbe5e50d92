"""Objects that raise or lie when they are looked at."""

dependencies = ["torch"]

import torch


class RaisesOnLook:
    """`repr`, `str`, `len`, `bool`, `==`, `hash` and unknown attributes raise."""

    def _raise(self, *args):
        raise RuntimeError("do not look at me")

    __repr__ = __str__ = __len__ = __bool__ = __eq__ = __hash__ = _raise

    def __getattr__(self, name):
        raise RuntimeError(f"no attribute {name}, and no AttributeError either")

    def works(self):
        return 1


class Lies:
    """Says that it is a tensor, a dict and an int, and has every attribute."""

    @property
    def __class__(self):
        return torch.Tensor

    shape = (2**62, 2**62)
    dtype = torch.float32

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __repr__(self):
        return 3  # no string

    def __len__(self):
        return -1

    def __iter__(self):
        while True:
            yield self


class FakeInt(int):
    def __index__(self):
        return 10**30

    def __repr__(self):
        raise RuntimeError("a number that cannot be shown")


class FakeTensor(torch.Tensor):
    """A subclass of Tensor that intercepts every operator."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("no operator on me")


class BadModule(torch.nn.Module):
    def __repr__(self):
        raise RuntimeError("do not show me")

    def state_dict(self, *args, **kwargs):
        raise RuntimeError("no state")

    def parameters(self, recurse=True):
        return 7

    def forward(self, x):
        return RaisesOnLook()


class RaisingKeys(dict):
    def items(self):
        raise RuntimeError("no items")


def raises_on_look():
    """An object that raises when it is looked at."""
    return RaisesOnLook()


def lies():
    """An object that claims to be a tensor."""
    return Lies()


def fake_int():
    """An int with other ideas."""
    return FakeInt(5)


def fake_tensor():
    """A tensor that refuses every operator."""
    return torch.zeros(2).as_subclass(FakeTensor)


def raising_dict():
    """A dict whose items raise."""
    return RaisingKeys(a=1)


def model():
    """A module that cannot be shown and has no state."""
    return BadModule()
