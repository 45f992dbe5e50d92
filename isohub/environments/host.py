"""The packages that the caller's own interpreter has, as a worker on it sees them.

They are what "auto" builds upon. To the resolver each is offered as a wheel that holds its metadata and nothing else,
so that what the host has and an index has not (a build of torch for one machine, a checkout that is being worked on)
is reused like any other, with what it needs itself. None of them is ever installed.

Side: caller. Trust: the caller's own packages. Source: PEP 427, PEP 566; `site`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import json
import os
import re
import site
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from isohub.environments.declared import Asked
from isohub.environments.dependencies import canonical_name, holds, parsed_requirement
from isohub.repos.lock_format import LockedPackage

__all__ = ["HostPackages", "host_packages", "is_importable"]

_DEEPEST = 20


@dataclass(frozen=True)
class HostPackages:
    """What is installed.

    Attributes:
        versions: By the name as an index compares it.
        metadata: The text of each one's METADATA.
        digest: Of names and versions.
    """

    versions: Mapping[str, str]
    metadata: Mapping[str, str]
    digest: str

    def version(self, name: str) -> str | None:
        """The version of a distribution, or None."""
        from packaging.utils import canonicalize_name

        return self.versions.get(canonicalize_name(name))

    def meets(self, asked: Asked, markers: Mapping[str, str]) -> bool:
        """Whether a requirement is met, the extras that it names included.

        Args:
            asked: Trust: repo.
            markers: Of this interpreter.
        """
        if asked.import_name is not None and is_importable(asked.import_name):
            return True
        return self._meets(asked.text, {**markers, "extra": ""}, _DEEPEST)

    def _meets(self, text: str, markers: Mapping[str, str], depth: int) -> bool:
        from packaging.requirements import InvalidRequirement, Requirement
        from packaging.utils import canonicalize_name

        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return False
        if requirement.marker is not None and not holds(requirement.marker, markers):
            return True  # nobody asks for it here
        version = self.version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            return False
        if not requirement.extras:
            return True
        if depth == 0:
            return False
        needs = _required_by(self.metadata[canonicalize_name(requirement.name)])
        return all(
            self._meets(need, {**markers, "extra": extra}, depth - 1)
            for extra in requirement.extras
            for need in needs
            if "extra" in need
        )

    def with_locked(self, packages: Sequence[LockedPackage]) -> HostPackages:
        """These, and others in front of them. Extras of what is locked are locked too, so it has none to look up."""
        versions = {each.name: each.version for each in packages}
        metadata = {**self.metadata, **dict.fromkeys(versions, "")}
        return HostPackages({**self.versions, **versions}, metadata, self.digest)

    def lacking(self, places: Sequence[str], markers: Mapping[str, str], but: Collection[str]) -> list[str]:
        """What the packages in directories need and these do not have.

        Args:
            places: The directories, which do not change. Trust: names and versions in them are an index's.
            markers: Of this interpreter.
            but: Names that anything stands for.
        """
        parsed = {need: parsed_requirement(need) for place in places for need in _needs_in(place)}
        return [
            str(requirement)
            for need, requirement in parsed.items()
            if requirement is not None
            and canonical_name(requirement.name) not in but
            and not self._meets(need, {**markers, "extra": ""}, _DEEPEST)
        ]

    def write_stubs(self, directory: Path) -> None:
        """Write a wheel of metadata for each, for `resolver` to be offered."""
        for name, version in self.versions.items():
            stem = f"{name.replace('-', '_')}-{version}"
            with zipfile.ZipFile(directory / f"{stem}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{stem}.dist-info/METADATA", self.metadata[name])
                wheel.writestr(
                    f"{stem}.dist-info/WHEEL",
                    "Wheel-Version: 1.0\nGenerator: isohub\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                )
                wheel.writestr(f"{stem}.dist-info/RECORD", "")


def host_packages() -> HostPackages:
    """What is installed now; read again when a directory of packages has changed."""
    places = _places()
    seen = []
    for place in places:
        try:
            status = os.stat(place)  # noqa: PTH116
        except OSError:
            continue
        seen.append((place, status.st_ino, status.st_mtime_ns))
    return _read(tuple(seen))


def is_importable(name: str) -> bool:
    """Whether a worker on the host finds a top-level module. Nothing is imported."""
    return importlib.machinery.PathFinder.find_spec(name, _places()) is not None


def _places() -> list[str]:
    """Directories of packages of ``python -I``, and the user's own, where they are in use (`session.spawn`)."""
    places = list(site.getsitepackages())
    if site.ENABLE_USER_SITE:
        places.append(site.getusersitepackages())
    return [place for place in dict.fromkeys(places) if os.path.isdir(place)]  # noqa: PTH112


@functools.lru_cache(maxsize=2)
def _read(seen: tuple[tuple[str, int, int], ...]) -> HostPackages:
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    versions: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for found in distributions(path=[place for place, *_ in seen]):
        text = found.read_text("METADATA") or found.read_text("PKG-INFO")
        name = found.metadata["Name"] if text else None
        if not text or not name:
            continue  # what is left of one that was removed
        try:
            version = str(Version(found.version))
        except (InvalidVersion, TypeError):
            continue
        # The first one is the one that is imported.
        versions.setdefault(canonicalize_name(name), version)
        metadata.setdefault(canonicalize_name(name), text)
    digest = hashlib.sha256(json.dumps(sorted(versions.items())).encode()).hexdigest()
    return HostPackages(versions, metadata, digest)


@functools.lru_cache(maxsize=32)
def _needs_in(place: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(need for found in distributions(path=[place]) for need in found.requires or ()))


def _required_by(metadata: str) -> list[str]:
    head = metadata.replace("\r\n", "\n").partition("\n\n")[0]
    return re.findall(r"^Requires-Dist:\s*(.+)$", head, re.MULTILINE)
