"""What the ``dependencies`` of a hubconf ask for, and the one error that names all that is missing.

torch.hub wants import names and looks each one up with `find_spec`; repos write those, and also what
pip wants ("numpy>=1.0", "opencv-python"). Both are understood here. Nothing is imported, installed or
run, and no entry reaches a command line but as one word that a shell takes literally.

Runs in the caller. Every entry is text that the repo controls.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isohub.errors import MissingDependenciesError, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from packaging.markers import Marker
    from packaging.requirements import Requirement

__all__ = [
    "Dependency",
    "canonical_name",
    "holds",
    "installed_version",
    "is_excessive",
    "is_package_name",
    "missing_error",
    "parse_dependencies",
    "parsed_requirement",
    "unmet",
]

_REQUIREMENT_CHARS = 8_000
_MOST_BRACKETS = 50
_LONG_NUMBER = re.compile(r"\d{100}")

# Import names whose distribution is called otherwise. Where pip's name differs only in `-` and `_`
# or in case, pip finds it by itself.
_DISTRIBUTION_OF = {
    "Crypto": "pycryptodome",
    "OpenSSL": "pyOpenSSL",
    "PIL": "Pillow",
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "faiss": "faiss-cpu",
    "ffmpeg": "ffmpeg-python",
    "fitz": "PyMuPDF",
    "git": "GitPython",
    "google.protobuf": "protobuf",
    "hydra": "hydra-core",
    "jwt": "PyJWT",
    "magic": "python-magic",
    "mpl_toolkits": "matplotlib",
    "osgeo": "GDAL",
    "pkg_resources": "setuptools",
    "pywt": "PyWavelets",
    "ruamel.yaml": "ruamel.yaml",
    "serial": "pyserial",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "slugify": "python-slugify",
    "umap": "umap-learn",
    "yaml": "PyYAML",
    "zmq": "pyzmq",
}


def canonical_name(name: str) -> str:
    """A distribution's name as an index compares it. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


_IMPORT_OF: dict[str, str] = {canonical_name(distribution): name for name, distribution in _DISTRIBUTION_OF.items()}
# Other builds of the same module.
_IMPORT_OF.update({"opencv-python-headless": "cv2", "opencv-contrib-python": "cv2", "faiss-gpu": "faiss"})


def installed_version(name: str) -> str | None:
    """The version that this interpreter has of a distribution, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Dependency:
    """One entry of ``dependencies``.

    Attributes:
        text: The entry as written. Trust: repo.
        import_name: Top-level name to look up; None if the entry is neither an import name nor a
            requirement.
        requirement: What to ask pip for; None where nothing can be (the standard library, an entry
            that is no name, a direct URL, which nobody should install on a repo's word).
    """

    text: str
    import_name: str | None
    requirement: str | None

    def __str__(self) -> str:
        return printable(self.text, limit_chars=200, newlines=False)


def parse_dependencies(names: Sequence[str], markers: Mapping[str, str] | None = None) -> tuple[Dependency, ...]:
    """Reads the entries of ``dependencies``.

    Args:
        names: Entries as `isohub.repos.outline` gives them. Trust: repo.
        markers: What environment markers are about: the interpreter that the repo will run on; None is this one.

    Returns:
        One for each entry, in order, without repetitions. An entry with an environment marker that
        does not hold there (``; python_version < "3.7"``) is left out, since nobody needs it.
    """
    parsed = (_parse(text, markers or {}) for text in dict.fromkeys(names))
    return tuple(dependency for dependency in parsed if dependency is not None)


def _parse(text: str, markers: Mapping[str, str]) -> Dependency | None:
    stripped = text.strip()
    if all(part.isidentifier() for part in stripped.split(".")):
        return _from_import_name(text, stripped)
    requirement = parsed_requirement(stripped)
    if requirement is None:
        return Dependency(text, import_name=None, requirement=None)
    if requirement.marker is not None and not holds(requirement.marker, markers):
        return None
    import_name = _IMPORT_OF.get(canonical_name(requirement.name)) or requirement.name.replace("-", "_")
    top = import_name.split(".")[0]
    if requirement.url is not None or not top.isidentifier():
        return Dependency(text, top if top.isidentifier() else None, requirement=None)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    # "cv2>=4" names a module and a version; pip knows the version under the distribution's name.
    name = _DISTRIBUTION_OF.get(requirement.name, requirement.name)
    return Dependency(text, top, f"{name}{extras}{requirement.specifier}")


def is_excessive(text: str) -> bool:
    """Whether a requirement or version is longer, deeper or of larger numbers than any that somebody means.

    Parsers recurse into brackets, and Python refuses to convert a number of thousands of digits.
    """
    return len(text) > _REQUIREMENT_CHARS or text.count("(") > _MOST_BRACKETS or _LONG_NUMBER.search(text) is not None


def parsed_requirement(text: str) -> Requirement | None:
    """A PEP 508 requirement; None if it is none, or one that nobody means.

    Args:
        text: Trust: repo.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    if is_excessive(text):
        return None
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def holds(marker: Marker, markers: Mapping[str, str]) -> bool:
    """Whether an environment marker holds.

    Args:
        marker: Trust: repo.
        markers: Of the interpreter, as `Interpreter.markers`; what is not there is this interpreter's.
    """
    from packaging.markers import UndefinedComparison, UndefinedEnvironmentName

    try:
        return marker.evaluate({**markers, "extra": markers.get("extra", "")})
    except (UndefinedComparison, UndefinedEnvironmentName):
        return True  # what cannot be told is asked for


def _from_import_name(text: str, name: str) -> Dependency:
    parts = name.split(".")
    dotted = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    known = next((_DISTRIBUTION_OF[prefix] for prefix in dotted if prefix in _DISTRIBUTION_OF), None)
    top = parts[0]
    if known is not None:
        return Dependency(text, top, known)
    if top in sys.stdlib_module_names:
        return Dependency(text, top, requirement=None)
    if len(parts) == 1 and canonical_name(top) in _IMPORT_OF:  # "Pillow", "PyYAML": pip's name
        return Dependency(text, _IMPORT_OF[canonical_name(top)].split(".")[0], top)
    return Dependency(text, top, top if is_package_name(top) else None)


def is_package_name(name: str) -> bool:
    """Whether an index could have it: Python takes other scripts and a leading underscore, an index does not."""
    # PEP 508's names, and no more: of what begins like an option nothing may reach a command line.
    return re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name) is not None


def unmet(
    dependencies: Sequence[Dependency],
    not_found: Collection[str],
    installed: Callable[[str], str | None] = installed_version,
) -> tuple[Dependency, ...]:
    """Those that are not there, are there in a version that was not asked for, or are no names at all.

    Args:
        dependencies: What `parse_dependencies` gave. Trust: repo.
        not_found: Import names that the worker cannot find. It looks there, since its path is not the caller's.
        installed: Callable[[str], str | None] of what its environment has; this interpreter's unless given.
    """
    return tuple(dependency for dependency in dependencies if not _is_met(dependency, not_found, installed))


def _is_met(dependency: Dependency, not_found: Collection[str], installed: Callable[[str], str | None]) -> bool:
    if dependency.import_name is None or dependency.import_name in not_found:
        return False
    if dependency.requirement is None:
        return True
    if is_package_name(dependency.requirement):
        return True  # a name, and any version
    requirement = parsed_requirement(dependency.requirement)
    version = None if requirement is None else installed(requirement.name)
    # Importable, and under another distribution's name: its version is not known.
    return requirement is None or version is None or requirement.specifier.contains(version, prereleases=True)


def missing_error(
    missing: Sequence[Dependency],
    reference: str,
    commit: str,
    environment: str = "host",
    installed: Callable[[str], str | None] = installed_version,
) -> MissingDependenciesError:
    """The error that names all missing dependencies at once and gives the line that installs them.

    Args:
        missing: At least one. Trust: repo.
        reference: What the user wrote. Trust: caller.
        commit: Full commit, or what stands for it in a plain directory.
        environment: `Environment.name` of what it was to run on; with "host" the hint is pip's line.
        installed: Versions of what that has.
    """
    named = [dependency for dependency in missing if dependency.import_name is not None]
    unnamed = [dependency for dependency in missing if dependency.import_name is None]
    parts = []
    if named:
        where = "not installed" if environment == "host" else f"not in its environment ({environment})"
        parts.append(f"needs packages that are {where}: {', '.join(_described(each, installed) for each in named)}")
    if unnamed:
        entries = ", ".join(repr(str(dependency)) for dependency in unnamed)
        parts.append(f"declares dependencies that are no package names: {entries}")
    requirements = dict.fromkeys(dependency.requirement for dependency in named if dependency.requirement)
    command = shlex.join(["python", "-m", "pip", "install", *requirements]) if requirements else None
    hint = f"{command}; or load it with environment='auto', which brings what the repo asks for" if command else None
    if environment != "host":
        listed = ", ".join(repr(each) for each in requirements)
        command, hint = None, f"add them to what you ask for: requirements=[..., {listed}]" if requirements else None
    return MissingDependenciesError(
        f"hubconf of {reference} at {commit} {'; it also '.join(parts)}",
        hint=hint,
        command=command,
        missing=tuple(str(dependency) for dependency in missing),
    )


def _described(dependency: Dependency, installed: Callable[[str], str | None]) -> str:
    text = str(dependency)
    if dependency.requirement is None:
        return f"{text} (not from a package index)"
    requirement = parsed_requirement(dependency.requirement)
    version = None if requirement is None else installed(requirement.name)
    if requirement is None or version is None:
        return text
    wanted = printable(str(requirement.specifier), limit_chars=100, newlines=False)
    return f"{requirement.name} (have {version}, want {wanted})" if wanted else text
