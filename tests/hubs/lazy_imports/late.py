"""Imported when `Lazy` is called for the first time."""


def double(x):
    return x * 2
