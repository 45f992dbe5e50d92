"""Two refs of one repo in one session: `python examples/two_refs.py` (git must be installed)."""

import pathlib
import shutil
import subprocess
import tempfile

import torch

import isohub

repo = pathlib.Path(tempfile.mkdtemp()) / "digits"
for tag in ("v1", "v2"):  # one real git repository with two tags
    shutil.copytree(pathlib.Path(__file__).parent / "two_refs" / tag, repo, dirs_exist_ok=True)
    for step in (
        "init -q",
        "add --all",
        f"-c user.name=me -c user.email=me@localhost commit -q -m {tag}",
        f"tag {tag}",
    ):
        subprocess.run(["git", *step.split()], check=True, cwd=repo)  # noqa: S607 -- the user's own git

v1, v2 = isohub.load(f"{repo}:v1", "model"), isohub.load(f"{repo}:v2", "model")
x = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
for handle in (v1, v2):
    with handle:
        parameters = sum(parameter.numel() for parameter in handle.parameters())
        print(handle.commit[:7], f"{parameters:,} parameters, mean |output|", f"{handle(x).abs().mean():.6f}")
