"""isohub.repos.outline: what can be read of a hubconf, and that nothing of it is run."""

from __future__ import annotations

import json
import os
import pickle
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.errors import HubconfError, HubconfNotFoundError
from isohub.repos.outline import Entrypoint, Outline, read_outline

HUBS = Path(__file__).parents[1] / "hubs"


@pytest.fixture
def read(tmp_path):
    def read(source: str | bytes) -> Outline:
        content = source if isinstance(source, bytes) else textwrap.dedent(source).encode()
        (tmp_path / "hubconf.py").write_bytes(content)
        return read_outline(tmp_path)

    return read


def names(outline: Outline) -> list[str]:
    return [entry.name for entry in outline.entrypoints]


def test_definitions_have_signature_docstring_and_line(read):
    outline = read('''
        """A repo."""
        dependencies = ["torch"]

        def small(width=8, *, depth: int = 2, **kwargs) -> "Module":
            """A small one.

                Indented.
            """

        async def later(x, /, y): ...

        class Net:
            """A class."""
            def __init__(self, width, depth=3): ...

        def _private(): ...
    ''')
    assert outline.doc == "A repo."
    assert outline.entrypoints == (
        Entrypoint("small", "(width=8, *, depth: int=2, **kwargs) -> 'Module'", "A small one.\n\nIndented.", 5,
                   "function"),
        Entrypoint("later", "(x, /, y)", None, 11, "function"),
        Entrypoint("Net", "(width, depth=3)", "A class.", 13, "class"),
    )  # fmt: skip


def test_imports_aliases_lambdas_and_partials_are_entrypoints(read):
    outline = read("""
        import functools, torch
        from functools import partial
        from models import Net as net, other
        from .more import *
        def _base(width=8):
            "doc"
        model = _base
        wide = partial(_base, 16)
        wider = functools.partial(_base, width=32)
        resnet = models.resnet18
        a = b = lambda x, y=1: None
        made = _make("b0")
        number, text, version = 3, "text", torch.__version__
        one, two = _base, 7
    """)
    kinds = {entry.name: entry.kind for entry in outline.entrypoints}
    assert kinds == {
        "partial": "import", "net": "import", "other": "import", "model": "alias", "wide": "alias",
        "wider": "alias", "resnet": "alias", "a": "alias", "b": "alias", "one": "alias",
    }  # fmt: skip
    assert outline.star_imports == (".more",)
    assert outline.undecided == ("made",)
    by_name = {entry.name: entry for entry in outline.entrypoints}
    assert (by_name["model"].signature, by_name["model"].doc) == ("(width=8)", "doc")
    assert by_name["b"].signature == "(x, y=1)"


def test_conditional_definitions_count_and_later_bindings_replace(read):
    outline = read("""
        from typing import TYPE_CHECKING as _t
        import typing
        try:
            from fast import run
        except ImportError:
            run = None
        if CUDA:
            def on_gpu(): ...
        else:
            def on_cpu(): ...
        with context():
            def inside(): ...
        for _ in range(3):
            def looped(): ...
        if typing.TYPE_CHECKING:
            from somewhere import Type
        if __name__ == "__main__":
            def main(): ...
        def replaced(): ...
        replaced = 3
        def deleted(): ...
        del deleted
    """)
    assert names(outline) == ["run", "on_gpu", "on_cpu", "inside", "looped"]


@pytest.mark.parametrize(
    ("source", "expected", "unreadable"),
    [
        ("", [], False),
        ("dependencies = ['torch', 'numpy>=1']", ["torch", "numpy>=1"], False),
        ("dependencies = ('torch',)", ["torch"], False),
        ("dependencies: list = ['torch']", ["torch"], False),
        ("dependencies = 'torch'", ["torch"], False),
        ("dependencies = ['a'] + ['b', 'a']", ["a", "b"], False),
        ("dependencies = ['to' + 'rch']", ["torch"], False),
        ("dependencies = ['a']\ndependencies = ['b']", ["b"], False),
        ("dependencies = ['a']\ndependencies = dependencies + ['b']", ["a", "b"], False),
        ("dependencies = ['a']\ndependencies += ['b']", ["a", "b"], False),
        (
            "dependencies = ['a']\ndependencies.append('b')\ndependencies.extend(['c', 'd'])",
            ["a", "b", "c", "d"],
            False,
        ),
        ("_more = ['b']\ndependencies = ['a', *_more]", ["a", "b"], False),
        ("def dependencies(): ...", [], True),
        ("from deps import dependencies", [], True),
        ("dependencies = open('requirements.txt').read().split()", [], True),
        ("dependencies = [line for line in LINES]", [], True),
        ("dependencies = ['torch', NAME]", ["torch"], True),
        ("dependencies = ['a'] + rest()", ["a"], True),
        ("dependencies = ['a']\nif OLD:\n    dependencies.append('b')", ["a"], True),
        ("dependencies = ['a']\nif OLD:\n    dependencies = ['b']", [], True),
        ("try:\n    dependencies = ['a']\nexcept E:\n    dependencies = ['b']", [], True),
        ("dependencies = ['a']\ndependencies.extend('bc')", ["a"], True),
        ("dependencies = ['a']\ndependencies.remove('a')", ["a"], True),
        ("dependencies = ['a']\ndependencies[0] = 'b'", ["a"], True),
        ("dependencies = ['a']\nfix(dependencies)", ["a"], True),
        ("dependencies = None", [], True),
        ("dependencies = ['a']\ndel dependencies", [], False),
    ],
)
def test_dependencies(read, source, expected, unreadable):
    outline = read(source)
    assert list(outline.dependencies) == expected
    assert outline.dependencies_unreadable is unreadable
    assert "dependencies" not in names(outline)


def test_nothing_is_run(read, tmp_path):
    marker = tmp_path / "ran"
    modules = set(sys.modules)
    outline = read(f"""
        import this, antigravity
        open({str(marker)!r}, "w")
        raise SystemExit(3)
        def model(x=open({str(marker)!r}, "w")): ...
    """)
    assert names(outline) == ["model"]
    assert not marker.exists()
    assert not {"this", "antigravity"} & (set(sys.modules) - modules)


def test_outline_is_json(read):
    outline = read('"""\x1b[31mred"""\nfrom a import *\ndef f(): ...\nx = g()\n')
    plain = json.loads(json.dumps(outline.to_dict()))
    assert plain["entrypoints"] == [{"name": "f", "signature": "()", "doc": None, "line": 3, "kind": "function"}]
    assert plain["star_imports"] == ["a"]
    assert plain["undecided"] == ["x"]
    assert plain["doc"] == "\x1b[31mred"  # as it was written: printing is what escapes


def test_missing_hubconf_says_what_is_there(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "evil\x1b[2Jname").write_text("")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "hubconf.py").write_text("")
    with pytest.raises(HubconfNotFoundError, match=r"README\.md") as caught:
        read_outline(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert "inner/" in (caught.value.hint or "")
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), FileNotFoundError)


def test_missing_directory_and_file_for_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(HubconfNotFoundError, match="no directory"):
            read_outline(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"def f(:\n", "line 1"),
        (b"x = 1\ny = (\n", "line 2"),
        (b"x = 1\n\n# caf\xe9\n", "line 3"),
        (b"# coding: punycode\n", "encoding 'punycode'"),
        (b"# coding: no-such-thing\n", "cannot be decoded"),
        (b"x = '\x00'\n", "no valid Python"),
        (b"#" * (256 * 1024 + 1), "larger than"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_unusable_sources(read, source, message):
    with pytest.raises(HubconfError, match=message):
        read(source)


@pytest.mark.parametrize(
    "source",
    [
        b"x = " + b"-" * 100_000 + b"1",
        b"x = " + b"(" * 100_000 + b")" * 100_000,
        b"x = a" + b".b" * 60_000,
        b"def f(a=" + b"not " * 5_000 + b"a): ...",
        b"if a: pass\n" + b"elif a: pass\n" * 15_000,
    ],
    ids=["minus", "parentheses", "attributes", "not", "elif"],
)
def test_deep_sources_are_read_or_refused_and_crash_nobody(read, source):
    """How deep is too deep differs between Pythons; a crash or a bare RecursionError is wrong on all of them."""
    try:
        assert read(source).entrypoints is not None
    except HubconfError as error:
        assert "nested" in str(error)


def test_encodings_that_sources_use(read):
    assert read('# coding: latin-1\n"""café"""'.encode("latin-1")).doc == "café"
    assert read(b'\xef\xbb\xbf"""bom"""\r\nx = 1\r\n').doc == "bom"


def test_invalid_escapes_of_a_repo_are_no_warnings_of_ours(read):
    # The suite turns warnings into errors, so a warning would fail here.
    assert read("pattern = '\\d'\ndef f(): ...\n").entrypoints


def test_long_signatures_are_cut(read):
    (entry,) = read(f"def f(x={'9' * 3_000}): ...").entrypoints
    assert entry.signature is not None
    assert len(entry.signature) < 2_100


def test_symbolic_link_inside_is_read_and_one_that_leaves_is_not(tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "src").mkdir(parents=True)
    (checkout / "src" / "hub.py").write_text("def inside(): ...")
    (checkout / "hubconf.py").symlink_to("src/hub.py")
    assert names(read_outline(checkout)) == ["inside"]

    (tmp_path / "secret.py").write_text("def secret(): ...")
    (checkout / "hubconf.py").unlink()
    (checkout / "hubconf.py").symlink_to("../secret.py")
    with pytest.raises(HubconfError, match="leads out of the checkout"):
        read_outline(checkout)
    # A sibling whose name begins alike is outside too.
    (tmp_path / "checkout2").mkdir()
    (tmp_path / "checkout2" / "h.py").write_text("")
    (checkout / "hubconf.py").unlink()
    (checkout / "hubconf.py").symlink_to(tmp_path / "checkout2" / "h.py")
    with pytest.raises(HubconfError, match="leads out of the checkout"):
        read_outline(checkout)


def test_fifo_directory_and_loop_neither_hang_nor_pass(tmp_path):
    os.mkfifo(tmp_path / "hubconf.py")
    with pytest.raises(HubconfError, match="no regular file"):
        read_outline(tmp_path)
    (tmp_path / "hubconf.py").unlink()
    (tmp_path / "hubconf.py").mkdir()
    with pytest.raises(HubconfError, match=r"regular file|cannot be read"):
        read_outline(tmp_path)
    (tmp_path / "hubconf.py").rmdir()
    (tmp_path / "hubconf.py").symlink_to("hubconf.py")
    with pytest.raises(HubconfError):
        read_outline(tmp_path)


_PIECES = st.sampled_from(
    ["dependencies", " = ", "['a']", " += ", "+", "def f():", "\n", "    pass", "if x:", "else:", "try:", "lambda: 0",
     "from m import *", "import ", "a.b", "(", ")", ",", "'", '"""', "*", "class C:", "\t", "\x00", "\\", "#", "é", "🜚"]
)  # fmt: skip


@given(st.one_of(st.binary(max_size=200), st.lists(_PIECES, max_size=20).map(lambda parts: "".join(parts).encode())))
def test_any_bytes_give_an_outline_or_a_hubconf_error(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "any"
    directory.mkdir(exist_ok=True)
    (directory / "hubconf.py").write_bytes(content)
    try:
        outline = read_outline(directory)
    except HubconfError:
        return
    json.dumps(outline.to_dict())


@pytest.mark.parametrize("hub", sorted(path.name for path in HUBS.iterdir() if path.is_dir()))
def test_every_hub_of_the_suite(hub):
    if hub == "no_hubconf":
        with pytest.raises(HubconfNotFoundError, match=r"README\.md"):
            read_outline(HUBS / hub)
    elif hub == "syntax_error":
        with pytest.raises(HubconfError, match="line"):
            read_outline(HUBS / hub)
    else:
        outline = read_outline(HUBS / hub)
        assert outline.doc
        assert outline.entrypoints
