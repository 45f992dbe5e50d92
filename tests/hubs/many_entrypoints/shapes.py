"""Imported by name."""


class Square:
    """A class from another module."""


def circle(radius=1):
    """A function under another name."""
    return radius
