"""Puts its own folder on `sys.path` for good, takes others off, and shadows a module of everyone's."""

dependencies = ["torch"]

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lib"))

import hidden_part  # found in lib/

sys.path.append("/nonexistent/of/edits_sys_path")
sys.modules["json"] = hidden_part


def model():
    """What the module in lib/ builds."""
    return hidden_part.build()
