"""pytest's plugin, in a pytest of its own: options, markers, a failure that can be read, and no torch at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.isohub(repo="./net", model="model", inputs="randn(4,8)")
class TestNet:
    def test_stays(self, isohub_compare):
        (found,) = isohub_compare()
        assert found.refs[1].reference.endswith("/net")

    @pytest.mark.isohub(model="model", inputs="randn(2,8)")
    def test_changed(self, isohub_compare):
        isohub_compare(against=[":values"])

    @pytest.mark.isohub(atol=1e-2, rtol=0)
    def test_within(self, isohub_compare):
        isohub_compare(against=":nudged")

def test_lacking(isohub_compare):
    isohub_compare()

@pytest.mark.isohub("./net", "model")
def test_positional(isohub_compare):
    pass
"""


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *arguments]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def place(variants: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project")
    (directory / "pytest.ini").write_text("[pytest]\n")
    (directory / "net").symlink_to(variants)
    (directory / "test_net.py").write_text(TESTS)
    return directory


def test_refs_markers_and_failures(place: Path) -> None:
    done = run(place, "--strict-markers", "-rA", "--isohub-ref", ":same")
    assert "2 failed, 2 passed, 1 error" in done.stdout or "3 failed, 2 passed" in done.stdout, done.stdout
    assert "PASSED test_net.py::TestNet::test_stays" in done.stdout
    assert "PASSED test_net.py::TestNet::test_within" in done.stdout
    assert "FAILED test_net.py::TestNet::test_changed" in done.stdout
    assert "worst at output['logits'][" in done.stdout
    assert "closeness.py" not in done.stdout  # no traceback of the plugin's
    assert "isohub_compare needs repo= and model=" in done.stdout
    assert "takes keywords: repo=, model=, inputs=" in done.stdout


def test_a_ref_of_a_repo_that_is_written_with_one(place: Path) -> None:
    (place / "at_a_ref.py").write_text(
        "import pytest\n@pytest.mark.isohub(repo='./net:values', model='model', inputs='randn(4,8)', against=':values')\n"
        "def test(isohub_compare):\n    isohub_compare()\n"
    )
    done = run(place, "at_a_ref.py")
    assert "1 passed" in done.stdout, done.stdout


def test_a_ref_that_is_none_is_said_without_a_traceback(place: Path) -> None:
    done = run(place, "-k", "stays", "--isohub-ref", "nope", "--isohub-ref", ":nope")
    assert "nope: InvalidReferenceError: 'nope' is no reference" in done.stdout, done.stdout
    assert "no branch, tag or commit 'nope'" in done.stdout
    assert "reference.py" not in done.stdout


def test_nothing_to_compare_with_is_said(place: Path) -> None:
    done = run(place, "-rs", "-k", "stays")
    assert "nothing to compare with: give --isohub-ref REF" in done.stdout
    assert "1 skipped" in done.stdout


def test_the_start_does_not_pay_for_torch(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import sys\ndef test():\n    assert 'isohub.comparison.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'isohub.hub'} & set(sys.modules)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
