"""The tables of system calls, against the headers of the system where those are installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isohub.sandbox.syscalls import GROUPS, MACHINES, numbers

HEADERS = {
    "x86_64": [
        "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "/usr/include/asm/unistd_64.h",
        "/usr/x86_64-linux-gnu/include/asm/unistd_64.h",
    ],
    # aarch64's own header takes this one.
    "aarch64": ["/usr/include/asm-generic/unistd.h", "/usr/aarch64-linux-gnu/include/asm-generic/unistd.h"],
}
_DEFINE = re.compile(r"^#define (__NR(?:3264)?_\w+)\s+(\w+)", re.MULTILINE)


def of_headers(machine: str) -> dict[str, int]:
    """Name to number, as the kernel's headers have it."""
    found = [Path(path) for path in HEADERS[machine] if Path(path).exists()]
    if not found:
        pytest.skip(f"no header with the numbers of {machine}: {', '.join(HEADERS[machine])}")
    defined: dict[str, str] = {}
    for name, value in _DEFINE.findall(found[0].read_text()):
        defined.setdefault(name, value)  # of two, the first is that of 64 bits
    resolved = {}
    for name, value in defined.items():
        while value in defined:
            value = defined[value]
        if name.startswith("__NR_") and value.isdigit():
            resolved[name.removeprefix("__NR_")] = int(value)
    assert len(resolved) > 250
    return resolved


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_is_the_headers(machine):
    theirs = of_headers(machine)
    newest = max(theirs.values())
    ours = numbers(machine)
    differ = {
        name: (number, theirs.get(name))
        for name, number in ours.items()
        if theirs.get(name) != number and not (name not in theirs and number > newest)
    }
    assert differ == {}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_call_that_a_machine_has_is_not_left_out(machine):
    theirs = of_headers(machine)
    names = {name for group in GROUPS.values() for name in group}
    assert {name for name in names if name in theirs and name not in numbers(machine)} == set()


@pytest.mark.parametrize("machine", MACHINES)
def test_a_number_has_one_name_and_a_name_one_group(machine):
    ours = numbers(machine)
    assert len(set(ours.values())) == len(ours)
    assert all(0 <= number < 1024 for number in ours.values())
    names = [name for group in GROUPS.values() for name in group]
    assert len(set(names)) == len(names)


def test_newer_calls_have_one_number_everywhere():
    """From 424 on, all architectures share numbers."""
    one, other = (numbers(machine) for machine in MACHINES)
    for name in one.keys() & other.keys():
        if max(one[name], other[name]) >= 424:
            assert one[name] == other[name], name
