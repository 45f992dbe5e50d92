"""Model code that nobody here wrote: source distributions at two versions, as two tags of a git repository.

`fetch_sdist` lets pip, with the index that pip is set up for, download a file whose sha256 stands in
the table below, and runs nothing of it. `materialise` commits two versions with a few lines of
hubconf each. `alone` asks the oracle (alone.py) in a fresh process.

`python -m tests.real.packages` prints what torch.hub gives for each pair, alone and in one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.real.alone import make_tensors

__all__ = [
    "BROKEN",
    "CACHE",
    "PAIRS",
    "PROJECT",
    "SEED",
    "Pair",
    "Release",
    "alone",
    "commit",
    "export",
    "fetch_sdist",
    "hubconf_of",
    "make_inputs",
    "materialise",
    "quiet_threads",
    "same",
    "unpack",
]

#: Of builds and inputs, in the oracle and in what is held against it.
SEED = 11
PROJECT = Path(__file__).parents[2]
CACHE = PROJECT / ".cache" / "sdists"
ORACLE = Path(__file__).with_name("alone.py")


@dataclass(frozen=True)
class Release:
    """One version of a distribution: its sdist's hash, and the hubconf that is committed with it."""

    version: str
    sha256: str
    hubconf: str


@dataclass(frozen=True)
class Pair:
    """Two releases that are loaded by the same entrypoint with the same arguments and inputs.

    Attributes:
        name: Name of the distribution.
        kind: What the model is for.
        releases: The earlier one first.
        inputs: Specification of the input tensors; see alone.py.
        kwargs: Arguments of the entrypoint; values that JSON knows.
        entrypoint: Its name in both hubconfs.
    """

    name: str
    kind: str
    releases: tuple[Release, Release]
    inputs: tuple[dict[str, Any], ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    entrypoint: str = "model"

    @property
    def versions(self) -> tuple[str, str]:
        return (self.releases[0].version, self.releases[1].version)

    def __str__(self) -> str:
        return self.name


def hubconf_of(body: str) -> str:
    """A hubconf with this body."""
    return '"""Entrypoints of this release."""\n\ndependencies = ["torch"]\n\n' + textwrap.dedent(body).lstrip()


# Only sizes with a name can be built, and the last layer of 0.0.7 begins as zeros: a tiny size, and
# the features instead of the classes.
_VIT = """
    import torch
    from pytorch_pretrained_vit import ViT
    from pytorch_pretrained_vit.configs import PRETRAINED_MODELS

    PRETRAINED_MODELS["tiny"] = {
        "config": {**PRETRAINED_MODELS["B_16"]["config"], "patches": (8, 8), "dim": 64, "ff_dim": 128,
                   "num_heads": 4, "num_layers": 2},
        "num_classes": 10,
        "image_size": (32, 32),
    }

    def model():
        net = ViT("tiny", pretrained=False)
        net.fc = torch.nn.Identity()
        return net
"""
# Fresh weights make activations so small that the output is the last bias, whatever comes in; one pass
# that sets the statistics of the batch normalisation makes it depend on the input, as trained weights do.
_EFFICIENTNET = """
    import torch
    from efficientnet_pytorch import EfficientNet

    def model(classes=10):
        net = EfficientNet.from_name("efficientnet-b0", {arguments})
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        net(torch.randn(4, 3, 75, 75))
        return net
"""
_LINFORMER = """
    from linformer import LinformerLM

    def model(dim=32, depth=2):
        return LinformerLM(num_tokens=200, dim=dim, seq_len=64, depth=depth, k=16, heads=4)
"""
_TCN = """
    from pytorch_tcn import TCN

    def model(channels=(8, 8, 16)):
        return TCN(num_inputs=4, num_channels=list(channels), use_skip_connections=True)
"""
_LTC = """
    from ncps.torch import LTC
    from ncps.wirings import AutoNCP

    def model(units=16):
        return LTC(5, AutoNCP(units, 4))
"""
_RESNET = """
    from resnet_pytorch import ResNet

    def model(classes=10):
        return ResNet.from_name("resnet18", override_params={"num_classes": classes})
"""
_FILTERBANK = """
    import torch
    from asteroid_filterbanks import make_enc_dec

    def model(filters=64):
        learned = make_enc_dec("free", n_filters=filters, kernel_size=64, stride=32)
        fixed = make_enc_dec("stft", n_filters=filters, kernel_size=64, stride=32)
        return torch.nn.Sequential(*learned, *fixed)
"""
_PYTORCHCV = """
    from pytorchcv.model_provider import get_model

    def model(name="espnetv2_wd2"):
        return get_model(name, pretrained=False)
"""
_UNET = """

def model(width=8):
    return UNet2D(out_channels_first_layer=width, num_encoding_blocks=3, padding=1, normalization="batch",
                  upsampling_type="linear")
"""
_GEFFNET = """
    import geffnet

    def model(classes=10):
        return geffnet.create_model("mnasnet_small", pretrained=False, num_classes=classes)
"""

PAIRS = (
    Pair(
        "efficientnet_pytorch",
        "image classification",
        (
            Release(
                "0.6.3",
                "6667459336893e9bf6367de3788ba449fed97f65da3b6782bf2204b6273a319f",
                _EFFICIENTNET.format(arguments='override_params={"num_classes": classes, "image_size": 75}'),
            ),
            Release(
                "0.7.1",
                "00b9b261effce59d2d47aae2ad238c29a2a65175470f41ada7ecac439b7c1ee1",
                _EFFICIENTNET.format(arguments="num_classes=classes, image_size=75"),
            ),
        ),
        inputs=({"shape": [1, 3, 75, 75]},),
    ),
    Pair(
        "pytorch-pretrained-vit",
        "vision transformer",
        (
            Release("0.0.4", "4765aec6082ff084dea04d87eec5dad2861a84ab665e5f59b7656e4f98fcaeac", _VIT),
            Release("0.0.7", "2c74057c5898c63c0076ac518645bcea0f380b8b1aa73dbb8fedbedec757e6ec", _VIT),
        ),
        inputs=({"shape": [2, 3, 32, 32]},),
    ),
    Pair(
        "pytorchcv",
        "image classification, a zoo",
        (
            Release("0.0.58", "1aaa13f03d2faaa23aca2d506d2462a4d936f63efde2b2adbe619b2a7f827752", _PYTORCHCV),
            Release("0.0.67", "aa9c64378ff2f0b74624e60ab4529bc4e28042f7bd9fd0e4e43e33f86a442067", _PYTORCHCV),
        ),
        inputs=({"shape": [1, 3, 224, 224]},),
    ),
    Pair(
        "unet",
        "segmentation",
        (
            Release(
                "0.7.7",
                "ec034daa2130c13620f73747905a16a76390102e5b0cfaee83dd7cea3caabc1c",
                "from unet import UNet2D\n" + _UNET,
            ),
            Release(
                "0.8.1",
                "d7a7529a755fa93a067c94ecaf023c248651721041cd316f987b964ad3f1f89b",
                "from unet import UNet1D, UNet2D\n" + _UNET,
            ),
        ),
        inputs=({"shape": [1, 1, 32, 32]},),
    ),
    Pair(
        "asteroid-filterbanks",
        "audio filterbanks",
        (
            Release("0.1.0", "388169c9e92edc9771800d8ed0ca93ad497d958d1927e0b9b2da5a03153511c9", _FILTERBANK),
            Release("0.4.0", "415f89d1dcf2b13b35f03f7a9370968ac4e6fa6800633c522dac992b283409b9", _FILTERBANK),
        ),
        inputs=({"shape": [2, 1, 1000]},),
    ),
    Pair(
        "linformer",
        "language model",
        (
            Release("0.1.0", "ade344909ed6b9159155d18d0a668b6449ecda3c76960776c6df52eafef01af3", _LINFORMER),
            Release("0.2.3", "747a4dc025a557d164b61170f140ec4aa37cfca3ce088318f3d5f39194cfcaba", _LINFORMER),
        ),
        inputs=({"shape": [2, 64], "below": 200},),
    ),
    Pair(
        "pytorch-tcn",
        "sequences, convolutional",
        (
            Release("1.0.0", "66a1ac71159242d11cfea7f42728f9aaee725358a74cbcc240a59ef66e16a4b4", _TCN),
            Release("1.2.3", "41e16600aae72691b2af82c87b56b18fd8c46bd98e0a2af8f109c0de1fc6da9b", _TCN),
        ),
        inputs=({"shape": [2, 4, 50]},),
        kwargs={"channels": [8, 8, 16]},
    ),
    Pair(
        "ncps",
        "sequences, recurrent; returns a tuple",
        (
            Release("0.0.7", "56fec1b8d7249574784add2c60d78e68fb0661d6dfac90659fa8cb3255c39abb", _LTC),
            Release("1.0.1", "fd791104318201de3b0e2e524577e3222435706d0e5368009b8ae2a9f3d1618f", _LTC),
        ),
        inputs=({"shape": [2, 10, 5]},),
    ),
    Pair(
        "kornia",
        "image features",
        (
            Release(
                "0.5.0",
                "a2e61c25812351296c880ff0458776a405d1e7f7f79975f76e714b0b54a6bdbe",
                """
                from kornia.feature import HardNet

                def model():
                    return HardNet(pretrained=False)
                """,
            ),
            Release(
                "0.5.11",
                "c2e3dd3f27a650b284fc8d261b9a7cba414c4d0a01e4d7ae518fd1466e7f3085",
                """
                from kornia.contrib import VisionTransformer

                def model():
                    return VisionTransformer(image_size=32, patch_size=8, in_channels=1, embed_dim=64, depth=2,
                                             num_heads=4)
                """,
            ),
        ),
        inputs=({"shape": [2, 1, 32, 32]},),
    ),
    Pair(
        "resnet_pytorch",
        "image classification",
        (
            Release("0.1.0", "fecee9f41fb2368dca2b42c0ff95521e61528d55ebf93ea287ef6523fd40fdeb", _RESNET),
            Release("0.2.0", "ba8f228c847037cceaa8c0213c9c8bf0fd04c00f44687edb7cc636259f871315", _RESNET),
        ),
        inputs=({"shape": [1, 3, 64, 64]},),
    ),
)

# The first release cannot be imported with any recent torch (it needs `torch._six`). torch.hub hides
# that in a process which has loaded the second one.
BROKEN = Pair(
    "geffnet",
    "a broken release and a working one",
    (
        Release("1.0.0", "9c9c852d6fa8cb32a860ee83102c7b68d91773759492c5a8e923c849258cd7cf", _GEFFNET),
        Release("1.0.2", "b0f5a8795f46ee59593130f1d2145e124f8e6e4e26324e4503159cac0070e116", _GEFFNET),
    ),
    inputs=({"shape": [1, 3, 64, 64]},),
)

# pip asks a source distribution's build backend for its metadata even when it only downloads, and
# for these the backend would run their setup.py. This one stands in its place and answers from the
# PKG-INFO that every source distribution carries.
_BACKEND = """
import pathlib


def prepare_metadata_for_build_wheel(directory, settings=None):
    fields = {}
    for line in pathlib.Path("PKG-INFO").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(": ")
        fields.setdefault(key, value)
    name = fields["Name"].replace("-", "_")
    info = pathlib.Path(directory) / "{}-{}.dist-info".format(name, fields["Version"])
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {Name}\\nVersion: {Version}\\n".format(**fields))
    return info.name


class __legacy__:
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


# The backends that the releases below name in their pyproject.toml, as package and module.
_BACKENDS = (("setuptools", "build_meta"), ("hatchling", "build"), ("flit_core", "buildapi"))


def fetch_sdist(name: str, release: Release) -> Path:
    """The verified source distribution, from the cache or from pip's index. Runs nothing of it."""
    cached = CACHE / f"{name}-{release.version}.tar.gz"
    if not cached.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            _download(name, release, Path(scratch)).replace(cached)
    got = hashlib.sha256(cached.read_bytes()).hexdigest()
    if got != release.sha256:
        raise AssertionError(f"{cached}: sha256 is {got}, expected {release.sha256}; delete it and run again")
    return cached


def _download(name: str, release: Release, scratch: Path) -> Path:
    for package, module in _BACKENDS:
        place = scratch / "backend" / package
        place.mkdir(parents=True)
        (place / "__init__.py").touch()
        (place / f"{module}.py").write_text(_BACKEND)
    # With a hash in the requirement, pip refuses any other file before it opens it.
    (scratch / "requirement.txt").write_text(f"{name}=={release.version} --hash=sha256:{release.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-binary", ":all:", "--no-build-isolation", "--use-pep517", "--require-hashes",
               "--requirement", str(scratch / "requirement.txt"), "--dest", str(scratch / "got")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(scratch / "backend")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    files = list((scratch / "got").glob("*.tar.gz"))
    if done.returncode != 0 or len(files) != 1:
        raise AssertionError(f"pip could not download {name}=={release.version}:\n{done.stderr[-2000:]}")
    return files[0]


# Python 3.10.12 and 3.11.4 brought tarfile's filters; what is unpacked here has a known hash or is our own.
_SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def materialise(pair: Pair, directory: Path) -> Path:
    """Commits both releases to a new git repository, as tags named by version, and returns its path."""
    repo = directory / pair.name
    repo.mkdir(parents=True)
    for release in pair.releases:
        for old in repo.iterdir():
            if old.name != ".git":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        unpack(fetch_sdist(pair.name, release), repo)
        (repo / "hubconf.py").write_text(hubconf_of(release.hubconf))
        commit(repo, f"{pair.name} {release.version}")
        _git(repo, "tag", release.version)
    return repo


def unpack(sdist: Path, directory: Path) -> None:
    """Puts the files of a source distribution into a directory, without its top folder."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, **_SAFELY)
        (top,) = Path(scratch).iterdir()
        for entry in top.iterdir():
            entry.rename(directory / entry.name)


def commit(repo: Path, message: str) -> None:
    """Commits all that a directory holds; makes it a repository if it is none."""
    if not (repo / ".git").is_dir():
        _git(repo, "init", "--quiet", "--initial-branch=main")
    _git(repo, "add", "--all", "--force")
    _git(repo, "commit", "--quiet", "--message", message)


def export(repo: Path, tag: str, directory: Path) -> Path:
    """A plain directory with the files of one tag."""
    target = directory / f"{repo.name}-{tag}"
    target.mkdir(parents=True)
    with tempfile.TemporaryFile() as stream:
        _git(repo, "archive", "--format=tar", tag, stdout=stream)
        stream.seek(0)
        with tarfile.open(fileobj=stream) as archive:
            archive.extractall(target, **_SAFELY)
    return target


def _git(repo: Path, *arguments: str, stdout: Any = subprocess.PIPE) -> None:
    # Nothing of the user's git set-up, and fixed dates: the same commits everywhere.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "isohub tests", f"GIT_{role}_EMAIL": "tests@localhost",
                        f"GIT_{role}_DATE": "2024-01-01T00:00:00Z"}  # fmt: skip
    command = ["git", "-C", str(repo), *arguments]
    done = subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr.decode()


def make_inputs(pair: Pair, seed: int) -> tuple[torch.Tensor, ...]:
    """The inputs that the oracle uses for this seed."""
    return make_tensors(pair.inputs, seed)


def quiet_threads() -> dict[str, str]:
    """The environment for a process beside others: its threads sleep while they wait, and are as many as ever."""
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


def alone(checkout: Path, pair: Pair, seed: int, after: Path | None = None) -> dict[str, Any]:
    """What torch.hub gives for a checkout in a fresh process.

    Args:
        checkout: Directory with hubconf.py.
        pair: What to call, with which arguments and inputs.
        seed: For torch, numpy and Python before the load, and for the inputs.
        after: Another checkout that is loaded first in the same process; then it is not alone.

    Returns:
        ``params``, ``state_dict``, ``outputs``, ``second_outputs`` (with the inputs of seed + 1) and
        ``type``; or ``error``, its class and message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.pt"
        command = [sys.executable, "-I", str(ORACLE), str(checkout), pair.entrypoint, json.dumps(pair.kwargs),
                   str(seed), str(out), "--inputs", json.dumps(pair.inputs)]  # fmt: skip
        command += ["--after", str(after)] if after is not None else []
        done = subprocess.run(
            command, env=quiet_threads(), capture_output=True, text=True, timeout=300, check=False, cwd=scratch
        )
        assert done.returncode == 0, done.stderr[-2000:]
        result = torch.load(out, weights_only=True)
    assert isinstance(result, dict)
    return result


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two answers agree bit for bit in parameters, state and outputs."""
    return (
        "error" not in a
        and "error" not in b
        and a["params"] == b["params"]
        and list(a["state_dict"]) == list(b["state_dict"])
        and _equal(list(a["state_dict"].values()), list(b["state_dict"].values()))
        and _equal(a["outputs"], b["outputs"])
        and _equal(a["second_outputs"], b["second_outputs"])
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _described(result: dict[str, Any], right: dict[str, Any]) -> str:
    if "error" in result:
        return f"error: {result['error'].split(' (/')[0].splitlines()[0][:90]}"
    if "error" in right:
        return f"WRONG, {result['params']:,} and no error"
    return f"{'right' if same(result, right) else 'WRONG'}, {result['params']:,}"


def main() -> None:
    """Prints the table: torch.hub alone, and torch.hub after the other release."""
    print("| package | kind | versions | alone | second after first | first after second |")
    print("|---|---|---|---|---|---|")
    for pair in (*PAIRS, BROKEN):
        with tempfile.TemporaryDirectory() as scratch:
            repo = materialise(pair, Path(scratch))
            first, second = (export(repo, version, Path(scratch) / "at") for version in pair.versions)
            a, b = alone(first, pair, 0), alone(second, pair, 0)
            figures = " / ".join(f"{r['params']:,}" if "params" in r else r["error"][:50] for r in (a, b))
            print(f"| {pair.name} | {pair.kind} | {' / '.join(pair.versions)} | {figures}{' (same)' * same(a, b)} "
                  f"| {_described(alone(second, pair, 0, after=first), b)} "
                  f"| {_described(alone(first, pair, 0, after=second), a)} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
