"""Source distributions: found on the user's indexes, downloaded, and read for what building them needs. Nothing runs.

1. The indexes are those that uv says it asks. A page of theirs names files; a file is taken by the hash that the page
   gives for it, or not at all.
2. Of an archive one file is read, ``pyproject.toml``, from its stream and within limits; nothing is unpacked.

Side: caller. Trust: pages and archives are the network's. Source: PEP 503, PEP 592 (yanked), PEP 625; PEP 518.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html.parser
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import msgspec

from isohub.environments.environment import check_requirement
from isohub.errors import EnvironmentBuildError, SourceUnavailableError, printable
from isohub.repos.credentials import Credentials
from isohub.repos.http import HttpClient, read_limited

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

__all__ = ["BuildSystem", "Sdist", "find_sdist", "read_build_system"]

_PAGE_BYTES = 32 << 20
_ARCHIVE_BYTES = 256 << 20
_TOML_BYTES = 256 << 10
_UNPACKED_BYTES = 1 << 30
_ENDINGS = (".tar.gz", ".zip")


@dataclass(frozen=True)
class Sdist:
    """A source distribution on the disk.

    Attributes:
        name: As an index compares it.
        version: As PEP 440 has it.
        path: The archive.
        sha256: Of it.
    """

    name: str
    version: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class BuildSystem:
    """What building takes.

    Attributes:
        requires: Requirements.
        backend: Where its functions are, as PEP 517 writes it. Trust: the source.
        backend_path: Directories of the source's own that hold it.
    """

    requires: tuple[str, ...]
    backend: str
    backend_path: tuple[str, ...]


#: Of a source that says nothing. Source: PEP 517, "Source trees".
_LEGACY = BuildSystem(("setuptools>=40.8", "wheel"), "setuptools.build_meta:__legacy__", ())


@dataclass(frozen=True)
class _Link:
    version: Version
    url: str
    sha256: str


class _Page(html.parser.HTMLParser):
    """Links of a page of an index."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep each link's attributes."""
        if tag == "a":
            self.links.append({name: value or "" for name, value in attrs})


def find_sdist(
    name: str,
    wanted: SpecifierSet,
    python: str,
    indexes: Sequence[str],
    directories: Sequence[str],
    place: Path,
    certificates: str | None = None,
) -> Sdist | None:
    """The newest source distribution of a name; None if there is none.

    Args:
        name: As an index compares it.
        wanted: Versions that are asked for.
        python: The interpreter's version.
        indexes: Their addresses, with credentials if they need them.
        directories: More places, on the disk.
        place: Where to write it.
        certificates: File of authorities, where the environment names none.

    Raises:
        SourceUnavailableError: An index did not answer.
        EnvironmentBuildError: What came is not what its index says.
    """
    for directory in directories:
        local = [
            (version, path)
            for path in (Path(directory).iterdir() if Path(directory).is_dir() else ())
            if (version := _version_of(path.name, name)) is not None and wanted.contains(version) and path.is_file()
        ]
        if local:
            return _copied(*max(local), name, place)
    with HttpClient(Credentials(), certificates=certificates) as client:
        for index in indexes:
            if urlsplit(index).scheme not in ("http", "https"):
                continue
            links = [link for link in _links(client, index, name, python) if wanted.contains(link.version)]
            if links:
                return _brought(client, index, name, max(links, key=lambda link: link.version), place, certificates)
    return None


def _copied(version: Version, path: Path, name: str, place: Path) -> Sdist:
    """A copy with nothing beside it: what builds it reads the directory that it is in."""
    content = path.read_bytes()
    copy = place / path.name
    copy.write_bytes(content)
    return Sdist(name, str(version), copy, hashlib.sha256(content).hexdigest())


def _version_of(file: str, name: str) -> Version | None:
    from packaging.utils import InvalidSdistFilename, parse_sdist_filename

    try:
        found, version = parse_sdist_filename(file)
    except InvalidSdistFilename:
        return None
    return version if found == name else None


def _links(client: HttpClient, index: str, name: str, python: str) -> Iterator[_Link]:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    bare, headers = _apart(f"{index.rstrip('/')}/{name}/")
    page = _Page()
    try:
        page.feed(client.request(bare, lambda response: read_limited(response, _PAGE_BYTES), headers=headers).decode())
    except SourceUnavailableError as error:
        if error.status == 404:
            return
        raise
    except UnicodeDecodeError:
        return
    for link in page.links:
        url = urljoin(bare, link.get("href", ""))
        parts = urlsplit(url)
        version = _version_of(unquote(parts.path.rpartition("/")[2]), name)
        match = re.fullmatch(r"sha256=([0-9a-f]{64})", parts.fragment)
        if version is None or match is None or "data-yanked" in link or not url.endswith(parts.fragment):
            continue
        try:
            fits = SpecifierSet(link.get("data-requires-python", "")).contains(python, prereleases=True)
        except InvalidSpecifier:
            fits = False
        if fits:
            yield _Link(version, urlunsplit(parts._replace(fragment="")), match[1])


def _apart(url: str) -> tuple[str, dict[str, str]]:
    """An address without its credentials, and the header that carries them."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url, {}
    userinfo, _, host = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    token = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {token}"}


def _brought(client: HttpClient, index: str, name: str, link: _Link, place: Path, certificates: str | None) -> Sdist:
    bare, headers = _apart(index)

    def read(asked: HttpClient, more: dict[str, str]) -> bytes:
        return asked.request(link.url, lambda response: read_limited(response, _ARCHIVE_BYTES), headers=more)

    if urlsplit(bare)[:2] == urlsplit(link.url)[:2]:
        content = read(client, headers)
    else:
        # Where a page leads to has none of the user's credentials.
        with HttpClient(Credentials(anonymous=True), certificates=certificates) as stranger:
            content = read(stranger, {})
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != link.sha256:
        raise EnvironmentBuildError(f"the source of {name} {link.version} has sha256 {sha256}, expected {link.sha256}")
    ending = next(ending for ending in _ENDINGS if link.url.endswith(ending))
    path = place / f"{name}-{link.version}{ending}"
    path.write_bytes(content)
    return Sdist(name, str(link.version), path, sha256)


def read_build_system(sdist: Sdist) -> BuildSystem:
    """What a source says that building it takes.

    Raises:
        EnvironmentBuildError: It cannot be read, or asks for what is not installed on a source's word.
    """
    text = _pyproject(sdist.path)
    if text is None:
        return _LEGACY
    try:
        table: Any = msgspec.toml.decode(text, type=dict[str, Any]).get("build-system", {})
        backend, path = table.get("build-backend", _LEGACY.backend), table.get("backend-path", [])
        requires = [
            check_requirement(each, "build-system.requires") for each in table.get("requires", _LEGACY.requires)
        ]
        if not isinstance(backend, str) or not all(isinstance(each, str) for each in path):
            raise ValueError("its build-backend is no name")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        shown = printable(str(error), limit_chars=300, newlines=False)
        raise EnvironmentBuildError(
            f"pyproject.toml of {sdist.name} {sdist.version} cannot be used: {shown}"
        ) from error
    legacy = () if "build-backend" in table else _LEGACY.requires
    return BuildSystem(tuple(dict.fromkeys((*requires, *legacy))), backend, tuple(path))


def _pyproject(path: Path) -> bytes | None:
    """The ``pyproject.toml`` at the top of an archive, or None."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist()[:20_000]:
                    if re.fullmatch(r"[^/]+/pyproject\.toml", info.filename):
                        return _limited(archive.open(info).read(_TOML_BYTES + 1))
            return None
        with gzip.open(path) as stream, tarfile.open(fileobj=_Bounded(stream), mode="r|") as tar:
            for member in tar:
                if re.fullmatch(r"(?:\./)?[^/]+/pyproject\.toml", member.name) and member.isreg():
                    file = tar.extractfile(member) or io.BytesIO()
                    return _limited(file.read(_TOML_BYTES + 1))
    except (OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        shown = printable(str(error), limit_chars=200, newlines=False)
        raise EnvironmentBuildError(f"the source {path.name} cannot be read: {shown}") from error
    return None


class _Bounded(io.RawIOBase):
    """A stream that ends in an error where an archive is one that only exhausts who reads it."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        super().__init__()
        self._stream = stream
        self._left = _UNPACKED_BYTES

    def read(self, size: int = -1) -> bytes:
        """Read on."""
        self._left -= size
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {_UNPACKED_BYTES} bytes")
        return self._stream.read(size)


def _limited(content: bytes) -> bytes:
    if len(content) > _TOML_BYTES or max((line.count(b".") for line in content.splitlines()), default=0) > 1_000:
        raise ValueError("its pyproject.toml is larger than any needs to be")
    return content
