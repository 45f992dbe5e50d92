"""Raises errors of its own classes, which exist nowhere but here."""

dependencies = ["torch"]


class HubError(Exception):
    """Takes two arguments, so that it cannot be rebuilt from its message."""

    def __init__(self, code, detail):
        super().__init__(f"code {code}: {detail}")
        self.code = code


class MissingKeyError(KeyError):
    """Is also a KeyError."""


class BadText(Exception):
    def __str__(self):
        raise RuntimeError("an error whose message raises")


def model():
    """Raises HubError."""
    raise HubError(7, "no such model")


def key_error():
    """Raises a subclass of KeyError."""
    raise MissingKeyError("absent")


def bad_text():
    """Raises an error that cannot be turned into text."""
    raise BadText


def unicode():
    """Raises an error whose message no encoding can write."""
    raise HubError(8, "\ud800 lone surrogate")
