"""C9: what a repo raises is text to its caller, whatever its class says that it is, or how it is to be made again."""

from __future__ import annotations

import builtins
import pickle

import pytest

import isohub
from isohub import errors
from tests.attacks import acts
from tests.attacks.acts import DONE

HUBCONF = """
import os, torch

class Reduces(ValueError):
    def __reduce__(self):
        return os.system, ("touch {mark}",)
    __reduce_ex__ = lambda self, protocol: self.__reduce__()

class Lies(Exception):
    __class__ = property(lambda self: {builtin})
    __module__, __qualname__, __name__ = "isohub.errors", "UntrustedRepoError", "SystemExit"

class Meta(type):
    def __instancecheck__(cls, instance): return True
    def __getattribute__(cls, name): return {{"__name__": "SystemExit", "__module__": "os", "__mro__": (SystemExit, BaseException, object)}}.get(name) or type.__getattribute__(cls, name)

class Shows(Exception, metaclass=Meta):
    def __str__(self): return "\\x1b[2J" + "x" * 10_000_000
    __repr__ = __str__
    def __getattr__(self, name): raise SystemExit(name)

class Sub(SystemExit): pass
class Interrupts(KeyboardInterrupt): pass
class Stops(StopIteration): pass

def model(): return torch.nn.Identity()
"""
NAMES = ("Reduces", "Lies", "Shows", "Sub", "Interrupts", "Stops")


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    place = tmp_path_factory.mktemp("errors")
    repo = place / "repo"
    repo.mkdir()
    mark = place / "mark"
    (repo / "hubconf.py").write_text(HUBCONF.format(mark=mark, builtin="SystemExit"))
    return repo, mark


def _raise(module, name):
    import sys

    hubconf = sys.modules["hubconf"]
    error = getattr(hubconf, name)("words")
    error.__cause__ = hubconf.Reduces("cause") if name != "Reduces" else None
    raise error


@pytest.mark.parametrize("name", NAMES)
def test_c9_no_class_of_a_repos_errors_is_built_or_believed(whole, repo, name):
    place, mark = repo
    with whole.load(place, "model") as handle:
        with pytest.raises(errors.RemoteError) as caught:
            handle.run(_raise, name)
        error = caught.value
        assert type(error).__module__ == "isohub.errors"
        bases = [base for base in type(error).__mro__ if base.__module__ == "builtins"]
        assert all(getattr(builtins, base.__name__) is base for base in bases)
        assert not isinstance(
            error, (SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, errors.UntrustedRepoError)
        )
        assert len(str(error)) < 1 << 20
        assert "\x1b" not in str(error)
        again = pickle.loads(pickle.dumps(error))  # ours to make again, not its
        assert type(again) is type(error)
        assert not mark.exists()
        assert handle.run(acts.attempt, acts.own) == DONE  # it lives


def test_c9_the_control(whole, repo):
    """Unpickled, that error would have done what it says."""
    place, mark = repo
    namespace: dict[str, object] = {}
    exec((place / "hubconf.py").read_text(), namespace)
    pickle.loads(pickle.dumps(namespace["Reduces"]("words")))  # type: ignore[operator]
    assert mark.exists()
    mark.unlink()
    assert isohub.errors.RemoteError is errors.RemoteError
