"""Where packages come from: what the user has set up for pip and for uv, read and handed to uv.

1. uv's own settings win, each kind by itself (indexes, links, certificates, hosts): ``UV_*`` and ``uv.toml``. What they
   leave open is as pip has it: its configuration files in their order, then ``PIP_*``.
2. pip takes the best version of all indexes; uv the first index that has a package. Where the indexes are pip's, pip's
   rule holds.
3. Addresses may hold credentials: they reach uv in its environment and never in its arguments, and are taken out of
   everything that is said, logged or hashed.
4. Nothing here comes from a repo.

Side: caller. Trust: the user's own files and variables.
Source: pip's "Configuration"; uv's "Configuration files" and "Environment variables".
"""

from __future__ import annotations

import configparser
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from isohub.environments.declared import Indexes
from isohub.errors import EnvironmentBuildError, printable

__all__ = ["PackageSettings", "package_settings"]

_USERINFO = re.compile(r"(?<=://)[^/\s\"]*@")
#: What would lead uv to another interpreter, project or place, or is said for each call.
_DROPPED = frozenset(
    {
        "CONDA_DEFAULT_ENV", "CONDA_PREFIX", "UV_BREAK_SYSTEM_PACKAGES", "UV_BUILD_CONSTRAINT", "UV_COMPILE_BYTECODE",
        "UV_CONSTRAINT", "UV_EXCLUDE", "UV_FIND_LINKS", "UV_FORK_STRATEGY", "UV_LINK_MODE", "UV_MANAGED_PYTHON",
        "UV_NO_BINARY", "UV_NO_BINARY_PACKAGE", "UV_NO_BUILD", "UV_NO_BUILD_ISOLATION", "UV_NO_BUILD_PACKAGE",
        "UV_NO_MANAGED_PYTHON", "UV_NO_VERIFY_HASHES", "UV_OVERRIDE", "UV_PROJECT", "UV_PROJECT_ENVIRONMENT",
        "UV_PYTHON", "UV_REQUIRE_HASHES", "UV_SYSTEM_PYTHON", "UV_WORKING_DIR", "VIRTUAL_ENV",
    }
)  # fmt: skip
#: Of uv's variables, those that say where and how, and not what.
_NO_IDENTITY = re.compile(r"UV_(?:CACHE_DIR|CONCURRENT_\w+|HTTP_\w+|INDEX_\w+_(?:USERNAME|PASSWORD)|NO_CACHE|LOG\w*)")
#: uv's variables that hold a path.
_PATHS = ("SSL_CERT_DIR", "SSL_CERT_FILE", "SSL_CLIENT_CERT", "UV_CACHE_DIR", "UV_CONFIG_FILE", "UV_PYTHON_INSTALL_DIR")
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
_INDEX_KEYS = ("index", "index-url", "extra-index-url", "no-index")


@dataclass(frozen=True)
class PackageSettings:
    """What uv is told beside the work itself.

    Attributes:
        variables: uv's whole environment.
        arguments: Options without secrets.
        find_links: Directories and pages of files; their addresses may hold credentials.
        constraints: Files of constraints of the user's.
        identity: What of this decides which packages are found; without credentials.
        secrets: Texts that nobody is shown.
        remarks: What could not be honoured.
    """

    variables: Mapping[str, str]
    arguments: tuple[str, ...]
    find_links: tuple[str, ...]
    constraints: tuple[str, ...]
    identity: tuple[str, ...]
    secrets: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def linked(self, *more: str) -> tuple[tuple[str, ...], Mapping[str, str]]:
        """Options and variables that also look at more directories of files."""
        places = (*more, *self.find_links)
        if any(_USERINFO.search(place) for place in self.find_links):
            return (), {**self.variables, "UV_FIND_LINKS": ",".join(places)}
        return tuple(word for place in places for word in ("--find-links", place)), self.variables

    def shown(self, text: str) -> str:
        """What uv says, without secrets and printable."""
        for secret in self.secrets:
            text = text.replace(secret, "****")
        return printable(_USERINFO.sub("****@", text), limit_chars=8_000)


def package_settings(indexes: Indexes | None = None) -> PackageSettings:
    """Read the user's settings.

    Args:
        indexes: Of a requirements file of the caller's own.

    Raises:
        EnvironmentBuildError: A configuration file cannot be read.
    """
    indexes = indexes or Indexes()
    toml = _uv_toml()
    pip = _pip_settings()
    variables = {
        name: value for name, value in os.environ.items() if name not in _DROPPED and not name.startswith("PYTHON")
    }
    arguments: list[str] = []
    _set_indexes(variables, arguments, toml, pip, indexes)
    _anchor(variables)
    links = os.environ.get("UV_FIND_LINKS", "").split(",")
    if not any(links) and not _in_toml(toml, ("find-links",)):
        links = pip.get("find-links", "").split()
    found = [_anchored(link) for link in (*indexes.find_links, *links) if link]
    present = [link for link in found if "://" in link or Path(link).exists()]
    remarks = [f"find-links: {_bare(link)} is not there" for link in found if link not in present]
    _set_transport(variables, toml, pip)
    named = os.environ.get("UV_CONSTRAINT", "").split()
    constraints = [_anchored(path) for path in named or pip.get("constraint", "").split()]
    for path in constraints:
        if "://" in path or not Path(path).is_file():
            whose, hint = ("UV_CONSTRAINT", None) if named else ("pip's setting constraint", "pip config list shows it")
            raise EnvironmentBuildError(f"{whose} names {_bare(path)}, which is no file here", hint=hint)
    if indexes.prereleases or pip.get("pre", "").lower() in ("1", "true", "yes", "on"):
        arguments += ["--prerelease", "allow"]
    texts = [*variables.items(), *(("toml", text) for text in toml.texts)]
    return PackageSettings(
        variables=variables,
        arguments=tuple(arguments),
        find_links=tuple(present),
        constraints=tuple(constraints),
        identity=_identity(variables, arguments, present, constraints, toml),
        secrets=tuple(_secrets(value for _, value in texts) | _secrets(present) | _passwords(variables)),
        remarks=tuple(remarks),
    )


@dataclass(frozen=True)
class _UvToml:
    documents: tuple[dict[str, Any], ...] = ()
    texts: tuple[str, ...] = ()


def _anchored(place: str) -> str:
    """A path from where the caller stands, since uv stands elsewhere; an address as it is."""
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _anchor(variables: dict[str, str]) -> None:
    for name in _PATHS:
        if variables.get(name):
            variables[name] = _anchored(variables[name])


def _set_indexes(
    variables: dict[str, str], arguments: list[str], toml: _UvToml, pip: Mapping[str, str], indexes: Indexes
) -> None:
    default, extra, no_index = None, [], False
    if not any(variables.get(name) for name in _INDEX_VARIABLES) and not _in_toml(toml, _INDEX_KEYS):
        default, extra = pip.get("index-url"), pip.get("extra-index-url", "").split()
        no_index = pip.get("no-index", "").lower() in ("1", "true", "yes", "on")
    if indexes.default is not None:
        default = indexes.default
        variables.pop("UV_INDEX_URL", None)
    extra = [*extra, *indexes.extra]
    if default:
        variables["UV_DEFAULT_INDEX"] = default
    if extra:
        variables["UV_INDEX"] = " ".join([*variables.get("UV_INDEX", "").split(), *extra])
    if no_index or indexes.no_index:
        arguments.append("--no-index")
    if (default or extra) and not _in_toml(toml, ("index-strategy",)):
        variables.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")


def _set_transport(variables: dict[str, str], toml: _UvToml, pip: Mapping[str, str]) -> None:
    """Certificates, hosts without them, proxies and patience, where uv is told nothing of its own."""
    if pip.get("cert") and Path(pip["cert"]).exists():
        variables.setdefault("SSL_CERT_FILE", _anchored(pip["cert"]))
    if pip.get("client-cert"):
        variables.setdefault("SSL_CLIENT_CERT", _anchored(pip["client-cert"]))
    if pip.get("trusted-host") and not _in_toml(toml, ("allow-insecure-host",)):
        variables.setdefault("UV_INSECURE_HOST", " ".join(pip["trusted-host"].split()))
    if pip.get("proxy"):
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            if name not in variables and name.lower() not in variables:
                variables[name] = pip["proxy"]
    patience = pip.get("timeout") or pip.get("default-timeout")
    if patience:
        variables.setdefault("UV_HTTP_TIMEOUT", str(int(float(patience))) if _is_number(patience) else "30")


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,6}(?:\.\d+)?", text) is not None


def _identity(
    variables: Mapping[str, str],
    arguments: Iterable[str],
    links: Iterable[str],
    constraints: Iterable[str],
    toml: _UvToml,
) -> tuple[str, ...]:
    named = sorted(
        f"{name}={_bare(value)}"
        for name, value in variables.items()
        if name.startswith("UV_") and not _NO_IDENTITY.fullmatch(name)
    )
    files = [Path(path).read_text("utf-8", "replace") for path in constraints]
    return (*named, *arguments, *map(_bare, links), *map(_bare, files), *map(_bare, toml.texts))


def _bare(text: str) -> str:
    """A text without credentials in its addresses."""
    return _USERINFO.sub("", text)


def _secrets(texts: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for text in texts:
        for match in _USERINFO.finditer(text):
            user, _, password = match[0][:-1].partition(":")
            found |= {each for each in (password or user, unquote(password or user)) if len(each) > 2}
    return found


def _passwords(variables: Mapping[str, str]) -> set[str]:
    return {
        value for name, value in variables.items() if re.fullmatch(r"UV_INDEX_\w+_PASSWORD", name) and len(value) > 2
    }


# The files.


def _in_toml(toml: _UvToml, keys: Iterable[str]) -> bool:
    for document in toml.documents:
        pip = document.get("pip")
        if any(key in document or (isinstance(pip, dict) and key in pip) for key in keys):
            return True
    return False


def _uv_toml() -> _UvToml:
    if os.environ.get("UV_NO_CONFIG", "").lower() in ("1", "true"):
        return _UvToml()
    named = os.environ.get("UV_CONFIG_FILE")
    if named:
        paths = [Path(named)]
    else:
        home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111
        paths = [
            Path(home, "uv", "uv.toml"),
            *(Path(place, "uv", "uv.toml") for place in _system_places()),
            Path("/etc/uv/uv.toml"),
        ]
    documents, texts = [], []
    for path in paths:
        try:
            text = path.read_text("utf-8")
            documents.append(msgspec.toml.decode(text, type=dict[str, Any]))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise EnvironmentBuildError(f"uv's configuration {path} cannot be read: {printable(str(error))}") from error
        texts.append(text)
    return _UvToml(tuple(documents), tuple(texts))


def _system_places() -> list[str]:
    return [place for place in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep) if place]


def _pip_settings() -> dict[str, str]:
    """Pip's options by name, the last word winning; what is for all commands, then what is for ``install``."""
    settings: dict[str, str] = {}
    for path in _pip_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, configparser.Error) as error:
            reason = printable(_bare(str(error)), limit_chars=300)
            raise EnvironmentBuildError(f"pip's configuration {path} cannot be read: {reason}") from error
        for section in ("global", "install"):
            if parser.has_section(section):
                settings |= {name.lower().replace("_", "-"): value for name, value in parser.items(section)}
    for name, value in os.environ.items():
        if name.startswith("PIP_") and value:
            settings[name[4:].lower().replace("_", "-")] = value
    return settings


def _pip_files() -> list[Path]:
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    home = os.path.expanduser("~")  # noqa: PTH111
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")  # noqa: PTH118
    files = [*(Path(place, "pip", "pip.conf") for place in _system_places()), Path("/etc/pip.conf")]
    files += [Path(home, ".pip", "pip.conf"), Path(config, "pip", "pip.conf"), Path(sys.prefix, "pip.conf")]
    return [*files, *([Path(named)] if named else [])]
