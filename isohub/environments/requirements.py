"""What a repo asks for, all of its files considered; and what the caller asks for in its place.

Which files count:

1. The ``dependencies`` of hubconf, always: they are what torch.hub's contract is. A name there that another entry
   brings as well is that entry.
2. Beside them one file, the first of ``requirements.txt``, ``pyproject.toml``, ``setup.cfg``, ``environment.yml`` that
   asks for something. ``-e .`` in a requirements file adds the project's own.
3. ``setup.py`` is never run. Where it is all there is, that is said.
4. With ``requirements=`` none of the files counts: hubconf's ``dependencies`` are then looked up before it runs, as
   with "host".

Markers of files are kept as they are: the target decides them. Side: caller. Trust: a repo's text, or the caller's own
words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from isohub.environments.declared import MOST_ENTRIES, Asked, Declared
from isohub.environments.dependencies import parse_dependencies
from isohub.environments.environment import Environment
from isohub.environments.project_files import read_environment_yml, read_pyproject, read_setup_cfg
from isohub.environments.requirements_file import read_requirements_file
from isohub.errors import EnvironmentBuildError
from isohub.repos.naming import has_hidden
from isohub.repos.outline import Outline

__all__ = ["declared_by", "required_name"]


def required_name(text: str) -> str:
    """The name that a PEP 508 requirement asks for, as an index compares it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return canonicalize_name(Requirement(text).name)


def declared_by(
    environment: Environment, root: Path | None, outline: Outline | None, markers: Mapping[str, str]
) -> Declared:
    """What is to be installed, before anything was looked up.

    Args:
        environment: What the caller wants.
        root: The checkout's directory; None where `environment` says all of it.
        outline: Of its hubconf; None likewise.
        markers: Of the interpreter that it will run on.

    Raises:
        EnvironmentBuildError: A file cannot be read, or there is nothing to read it from.
    """
    wanted = environment.requirements
    if isinstance(wanted, str):
        declared, _ = read_requirements_file(Path(wanted), None)
        return declared
    if wanted is not None:
        return Declared(asked=[Asked(text, "requirements=") for text in wanted])
    assert root is not None, "what a repo asks for is asked of a repo"
    declared = _of_files(root, environment.extras)
    if outline is not None:
        _add_hubconf(outline, declared, markers, root)
    count = len(declared.asked) + len(declared.constraints) + len(declared.unusable)
    if count > MOST_ENTRIES:
        raise EnvironmentBuildError(f"the repo asks for {count} packages; expected {MOST_ENTRIES} at most")
    return declared


def _of_files(root: Path, extras: tuple[str, ...]) -> Declared:
    if (root / "requirements.txt").is_file():
        declared, own = read_requirements_file(root / "requirements.txt", root)
        if own is not None or extras:
            project = _of_project(root, (*(own or ()), *extras))
            if project is not None:
                declared.extend(project)
        if declared.asked or declared.unusable:
            return declared
    else:
        declared = Declared()
    found = _of_project(root, extras) or read_environment_yml(root)
    if found is not None:
        declared.extend(found)
    elif (root / "setup.py").is_file():
        declared.remarks.append("setup.py is not run, so what it asks for is not known")
    return declared


def _of_project(root: Path, extras: tuple[str, ...]) -> Declared | None:
    return read_pyproject(root, extras) or read_setup_cfg(root, extras)


def _is_own(root: Path, name: str) -> bool:
    """Whether a repo itself has a module of that name, which hubconf finds before any package."""
    try:
        return (root / f"{name}.py").is_file() or (root / name / "__init__.py").is_file()
    except OSError:  # a name that no file can have
        return False


def _add_hubconf(outline: Outline, declared: Declared, markers: Mapping[str, str], root: Path) -> None:
    """The ``dependencies`` that no other entry brings, under the names that an index has for them."""
    named = {required_name(each.text) for each in declared.asked}
    brought = {each.import_name for each in parse_dependencies([each.text for each in declared.asked], markers)}
    for dependency in parse_dependencies(outline.dependencies, markers):
        if dependency.requirement is None or dependency.import_name is None or has_hidden(dependency.requirement):
            continue  # of the standard library, or no name: `unmet` says that
        plain = dependency.text.strip().replace(".", "").isidentifier()
        if plain and _is_own(root, dependency.import_name):
            continue  # what an index has under that name is another package
        if plain and (dependency.import_name in brought or required_name(dependency.requirement) in named):
            continue
        import_name = dependency.import_name if plain else None
        declared.asked.append(Asked(dependency.requirement, "hubconf.py", import_name=import_name))
    if outline.dependencies_unreadable:
        declared.remarks.append("hubconf.py computes some of its dependencies; those are not known before it runs")
