"""Raises when it is imported."""

dependencies = ["torch"]

raise ImportError("this repo cannot be imported")


def model():
    """Never reached."""
