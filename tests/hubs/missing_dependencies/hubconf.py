"""Declares what is not installed; its body must never run."""

dependencies = [
    "torch",
    "isohub_no_such_package",
    "numpy",
    "isohub_other_missing.inner",
    "isohub-third-missing>=2.0",
]

import pathlib

try:
    pathlib.Path(__file__).with_name("RAN").write_text("hubconf was run")
except OSError:
    pass

raise AssertionError("hubconf was run although its dependencies are missing")


def model():
    """Never reached."""
