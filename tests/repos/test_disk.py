"""Locks on directories that others may read."""

import fcntl
import os

from isohub.repos import disk


def test_who_keeps_a_directory_for_himself_holds_nobody(tmp_path, monkeypatch):
    """A worker can lock what it may read, for as long as it lives."""
    monkeypatch.setattr(disk, "_SHARE_S", 0.2)
    keeper = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(keeper, fcntl.LOCK_EX)
    assert disk.hold(tmp_path) is None
    os.close(keeper)
    held = disk.hold(tmp_path)
    assert held is not None
    os.close(held)
