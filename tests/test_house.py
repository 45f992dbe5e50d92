"""The house rules: names, imports, lint, and pages that say what the code does."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import isohub
from isohub.wire.codec import TAGS
from isohub.wire.protocol import TURNS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "isohub"
MODULES = sorted(PACKAGE.rglob("*.py"))
WORKER_SIDE = sorted(
    [
        PACKAGE / "errors.py",
        *(path for name in ("worker", "wire", "sandbox") for path in (PACKAGE / name).rglob("*.py")),
    ]
)
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
BIN = Path(sys.executable).parent


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_public_names() -> None:
    assert sorted(isohub.__all__) == [
        "Comparison",
        "Environment",
        "RemoteModule",
        "RemoteObject",
        "Sandbox",
        "Session",
        "__version__",
        "assert_close",
        "bisect",
        "compare",
        "doctor",
        "download_url_to_file",
        "errors",
        "evaluate",
        "fetch",
        "get_dir",
        "help",
        "inspect",
        "list",
        "load",
        "load_state_dict_from_url",
        "set_dir",
        "trust",
        "trusted",
        "untrust",
    ]
    assert all(getattr(isohub, name) is not None for name in isohub.__all__)
    assert set(isohub.__all__) <= set(dir(isohub))
    with pytest.raises(AttributeError, match="nothing"):
        isohub.nothing  # noqa: B018


def test_the_version_is_said_once() -> None:
    assert f'\nversion = "{isohub.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{isohub.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "work",
    [
        "import isohub",
        "import isohub; isohub.errors; isohub.Session; isohub.trusted()",
        "import isohub.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass",
        "import isohub.cli.main as m\ntry: m.main(['run', '--help'])\nexcept SystemExit: pass",
        "import isohub.cli.main as m\ntry: m.main(['cache', 'dir'])\nexcept SystemExit: pass",
        "import isohub; isohub.evaluate; isohub.bisect; import isohub.distributed",
        "import isohub.cli.main as m\ntry: m.main(['evaluate', '--help'])\nexcept SystemExit: pass",
        "import isohub.cli.main as m\ntry: m.main(['bisect', '--help'])\nexcept SystemExit: pass",
        "import isohub; isohub.inspect('tests/hubs/good', source='local')",
    ],
)
def test_torch_is_imported_by_what_needs_it_alone(work: str) -> None:
    program = f"{work}\nimport sys, json\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr))
    assert not {"torch", "numpy", "ray", "pandas"} & loaded
    assert not {name for name in loaded if name.startswith(("isohub.worker", "isohub.session"))}
    if work == "import isohub":
        assert {name for name in loaded if name.startswith("isohub")} == {"isohub"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_what_it_offers(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no docstring"
    if path.name == "__init__.py" and len(tree.body) == 1:
        return  # a package that holds nothing itself
    if path.name == "start.py":
        return  # run by its path, before there is a package
    targets = [
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    ]
    assert "__all__" in targets
    assert not path.stem.startswith("_") or path.stem.startswith("__")


@pytest.mark.parametrize("path", WORKER_SIDE, ids=name_of)
def test_what_runs_in_a_worker_is_python_3_8(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def _run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command], cwd=cwd, capture_output=True, text=True, check=False)


BANNED = {
    "import pickle": "TID251",
    "from pickle import loads": "TID251",
    "import marshal": "TID251",
    "import shelve": "TID251",
    "import torch\n\ntorch.load('x')": "TID251",
    "from torch import load\n\nload('x')": "TID251",
    "import torch\n\ntorch.jit.load('x')": "TID251",
    "import torch\n\ntorch.export.load('x')": "TID251",
    "import importlib\n\nimportlib.import_module('x')": "TID251",
    "eval('1')": "S307",
    "exec('1')": "S102",
    "import yaml\n\nyaml.load('x')": "S506",
    "import os\n\nos.system('x')": "S605",
    "import subprocess\n\nsubprocess.run('x', shell=True)": "S602",
    "print('x')": "T201",
}


@pytest.mark.parametrize("package", ["session", "wire", "cli", "repos"])
def test_the_bans_bite(package: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    place = tmp_path / "isohub" / package
    place.mkdir(parents=True)
    for number, code in enumerate(BANNED):
        (place / f"bad{number}.py").write_text(f'"""A module."""\n\n{code}\n')
    (place / "good.py").write_text('"""A module."""\n\nimport json\n\njson.loads("1")\n')
    done = _run(str(BIN / "ruff"), "check", "--no-cache", "--output-format=json", ".", cwd=tmp_path)
    found: dict[str, set[str]] = {}
    for problem in json.loads(done.stdout):
        found.setdefault(Path(problem["filename"]).name, set()).add(problem["code"])
    for number, (code, rule) in enumerate(BANNED.items()):
        assert rule in found.get(f"bad{number}.py", set()), code
    assert not {"TID251", "S307", "S102"} & found.get("good.py", set())


def test_imports_go_down_only() -> None:
    done = _run(str(BIN / "lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def _tracked() -> list[Path]:
    done = _run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if done.returncode != 0:
        pytest.skip("no git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


# Split, so that this file does not name them either.
PLACES = [
    "/" + "work/",
    "/" + "opt/",
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "download.pytorch" + ".org",
    "/root" + "/",
]
# A place of weights as well as of packages.
WEIGHT_PLACES = {"isohub/sandbox/hosts.py", "tests/sandbox/test_hosts.py"}


def test_no_file_names_a_place_of_the_machine_it_was_written_on() -> None:
    for path in _tracked():
        text = path.read_bytes().decode("utf-8", "replace")
        for place in PLACES:
            if place.startswith("download") and name_of(path) in WEIGHT_PLACES:
                continue
            assert place not in text, f"{name_of(path)} names {place}"


def test_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines
    names = {re.split(r"==", line)[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(
        r'^    "([A-Za-z0-9-]+)>=', project.partition("dependencies = [")[2].partition("]")[0], re.MULTILINE
    )
    assert len(wanted) > 8
    assert {name.lower() for name in wanted} <= names


def test_every_dependency_has_its_reason() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(
        r'^    "([A-Za-z0-9-]+)>=', project.partition("dependencies = [")[2].partition("]")[0], re.MULTILINE
    )
    page = (ROOT / "docs" / "decisions" / "0002-dependencies.md").read_text()
    assert re.findall(r"^\| ([a-z0-9-]+) \|", page, re.MULTILINE)[1:] == sorted(wanted)


def test_the_page_s_turns_are_the_machine_s() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Turns")[2]
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \|$", page, re.MULTILINE)
    assert {(state, event): following for state, event, following in rows} == {
        (state.value, event.value): following.value for (state, event), following in TURNS.items()
    }


def test_the_page_s_tags_are_the_codec_s() -> None:
    page = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w)` \| (.+) \|$", page, re.MULTILINE)) == TAGS


def test_the_page_s_limits_are_the_protocol_s() -> None:
    from isohub.wire import arena, protocol

    page = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    for words in (
        f"at most {protocol.MAX_DESCRIPTORS} |",
        f"at most {protocol.MAX_FRAME_BYTES >> 20} MiB",
        f"deeper than {protocol.MAX_DEPTH} levels",
        f"more than {protocol.MAX_NODES:,} parts",
        f"{protocol.MAX_TENSORS:,} tensors",
        f"at most {protocol.MAX_DIMENSIONS} dimensions",
        f"a multiple of {arena.ALIGNMENT};",
        f"header of {protocol.HEADER.size} bytes",
    ):
        assert words in page, words


def test_every_claim_has_a_test() -> None:
    claims = re.findall(r"^\| (C\d+) \|", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert claims == [f"C{number}" for number in range(1, len(claims) + 1)]
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "attacks").glob("test_*.py"))
    assert {f"C{number}" for number in re.findall(r"def test_c(\d+)_", tests)} == set(claims)


def test_every_test_that_a_page_names_exists() -> None:
    named = [
        (page, *match)
        for page in PAGES
        for match in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 30
    for page, file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{name_of(page)}: {file}::{test}"
        )


def test_every_case_of_pytorch_s_is_here() -> None:
    page = (ROOT / "docs" / "torch-hub.md").read_text(encoding="utf-8").partition("## PyTorch's own tests")[2]
    there = set(re.findall(r"`(test_\w+)`", page.partition("## What users report")[0]))
    here = set(re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / "test_torch_hub_cases.py").read_text(), re.MULTILINE))
    # Those that answer a prompt are one test here: there is no prompt.
    assert {name for name in there - here if "trust" not in name} == set()


def test_the_platform_is_said() -> None:
    project, readme = (ROOT / "pyproject.toml").read_text(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Operating System :: POSIX :: Linux" in project
    assert "You use Windows or macOS" in readme.partition("## When not to use it")[2]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        place = page.parent / file if file else page
        assert place.exists(), f"{name_of(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name_of(page)}: {target}"


def test_decisions_are_numbered_and_short() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    for number, page in enumerate(pages, start=1):
        assert page.name.startswith(f"{number:04d}-")
        assert page.read_text(encoding="utf-8").startswith(f"# {number}. ")
        assert len(page.read_text(encoding="utf-8").split()) < 600


def test_the_ci_script_is_what_make_has() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [word for line in re.findall(r"^make (.+)$", script, re.MULTILINE) for word in line.split()]
    assert set(called) <= targets
    assert called[-1] == "test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
