"""Two releases of timm from the user's own package index, each for the ref that pins it, in one session.

Skipped where no index has them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import isohub
from isohub import errors
from tests.servers.git_repo import GitRepo

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.version_info >= (3, 12), reason="torchvision 0.16.2 has no wheels for this Python"),
]

VERSIONS = ("0.6.13", "1.0.20")
#: timm imports torchvision, whose newest release needs torch's own build; this one imports beside any.
ON = isohub.Environment("auto", overrides=["torch", "torchvision==0.16.2"])
HUBCONF = """
dependencies = ["torch", "timm"]

def model():
    import timm
    return timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()

def facts():
    import timm
    return {"version": timm.__version__, "models": len(timm.list_models())}
"""
ALONE = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import torch, hubconf
torch.manual_seed(0)
model = hubconf.model()
with torch.inference_mode():
    output = model(torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224))
print(json.dumps([output.tolist(), hubconf.facts()]))
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> GitRepo:
    made = GitRepo(tmp_path_factory.mktemp("timm") / "repo")
    for version in VERSIONS:
        made.commit({"hubconf.py": HUBCONF, "requirements.txt": f"timm=={version}\n"}, version)
        made.git("tag", f"v{version}")
    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, repo: GitRepo) -> Iterator[isohub.Session]:
    with isohub.Session(tmp_path_factory.mktemp("store"), environment=ON, timeout_s=300) as session:
        try:
            for version in VERSIONS:
                session.prepare(f"{repo.path}:v{version}")
        except (errors.SourceUnavailableError, errors.EnvironmentBuildError) as error:
            if isinstance(error, errors.SourceUnavailableError) or "not found in the package registry" in str(error):
                pytest.skip(f"no package index has timm: {error.message[:500]}")
            raise
        yield session


def test_each_ref_on_its_own_timm(repo: GitRepo, opened: isohub.Session):
    x = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    models = {version: opened.load(f"{repo.path}:v{version}", "model", seed=0) for version in VERSIONS}
    facts = {version: opened.load(f"{repo.path}:v{version}", "facts") for version in VERSIONS}
    with torch.inference_mode():
        outputs = {version: model(x) for version, model in models.items()}
        again = models[VERSIONS[0]](x)
    assert torch.equal(again, outputs[VERSIONS[0]])
    for version in VERSIONS:
        prepared = opened.prepare(f"{repo.path}:v{version}")
        checkout = opened.fetch(f"{repo.path}:v{version}")
        command = [prepared.runtime.python, "-I", "-W", "ignore", "-c", ALONE, json.dumps(prepared.runtime.packages)]
        done = subprocess.run([*command, str(checkout.path)], capture_output=True, text=True, check=True)
        output, alone = json.loads(done.stdout)
        assert facts[version] == alone
        assert alone["version"] == version
        torch.testing.assert_close(outputs[version], torch.tensor(output), rtol=1e-5, atol=1e-6)
    assert facts[VERSIONS[0]]["models"] != facts[VERSIONS[1]]["models"]


def test_a_package_that_is_there_as_source_alone(tmp_path: Path, opened: isohub.Session):
    with isohub.Session(tmp_path, timeout_s=300) as session:
        wanted = isohub.Environment("auto", requirements=["antlr4-python3-runtime==4.9.3"], allow_build=True)
        prepared = session.prepare(None, wanted)
    assert prepared.version("antlr4-python3-runtime") == "4.9.3"
    assert Path(prepared.runtime.packages[0], "antlr4", "Parser.py").is_file()
