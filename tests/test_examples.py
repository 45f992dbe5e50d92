"""The GitHub Action's compare step, run as a runner runs it, on a repository of its own; and what it may do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.comparison.conftest import git

WORKFLOW = Path(__file__).parent.parent / "examples" / "github-action" / "compare.yml"
HUBCONF = (
    "import torch\n\ndef model():\n    net = torch.nn.Linear(3, 2)\n    net.bias.data += {shift}\n    return net\n"
)


def step(name: str) -> str:
    """The script of a step."""
    text = WORKFLOW.read_text(encoding="utf-8").partition(f"- name: {name}\n")[2]
    lines = text.partition("run: |\n")[2].splitlines()
    return "\n".join(line[10:] for line in lines[: next(n for n, line in enumerate(lines) if line[:9].strip())])


def test_the_compare_step_writes_its_report_and_fails_on_a_change(tmp_path: Path) -> None:
    repo, temp = tmp_path / "repo", tmp_path / "temp"
    repo.mkdir(), temp.mkdir()
    git(repo, "init", "--quiet", "--initial-branch=main")
    commits = []
    for shift in (0, 0.5):
        (repo / "hubconf.py").write_text(HUBCONF.format(shift=shift))
        git(repo, "add", "--all")
        git(repo, "commit", "--quiet", "-m", "x")
        commits.append(git(repo, "rev-parse", "HEAD").strip())
    git(repo, "checkout", "--quiet", "--detach")
    own = {"BASE": commits[0], "HEAD": commits[1], "MODEL": "model", "INPUT": "randn(4,3)", "TOLERANCE": "1e-5"}
    own.update(RUNNER_TEMP=str(temp), GITHUB_STEP_SUMMARY=str(temp / "summary"), ISOHUB_HOME=str(tmp_path / "home"))
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = step("Compare")
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=repo, env={**os.environ, **own}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert (temp / "comparison.md").read_text().startswith("**outputs changed: max abs 0.5 at `output`; state changed")
    assert (temp / "summary").read_text() == (temp / "comparison.md").read_text()
    assert (temp / "comparison.json").is_file()


def test_the_workflow_may_do_what_it_needs() -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    assert re.search(r"^on: pull_request(?!_target)", text, re.MULTILINE)
    assert re.findall(r"^permissions: (.+)$", text, re.MULTILINE) == ["{}"]
    jobs = dict(re.findall(r"^  (\w+):\n((?:    .*\n|\n)+)", text.partition("jobs:\n")[2], re.MULTILINE))
    granted = {
        name: re.findall(r"^      ([a-z-]+: (?:read|write))$", body, re.MULTILINE) for name, body in jobs.items()
    }
    assert granted == {"compare": ["contents: read"], "comment": ["pull-requests: write"]}
    # Nothing of an event's is put into a script: a branch's name is text of a stranger's.
    for script in re.findall(r"run: \|\n((?:          .*\n)+)", text):
        assert "${{" not in script
