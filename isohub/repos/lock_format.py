"""The text of isohub.lock, and what an entry may be.

    version = 1

    [[repo]]
    reference = "owner/repo:v1"
    extras = [
        "lfs",
    ]
    commit = "<40 or 64 hex digits, or tree- and 40 for a directory>"
    ref = "refs/tags/v1"
    validated = true
    tree = "<git's tree id in the SHA-256 object format>"

    [[repo.weights]]
    url = "https://host/model.pth"
    key = "<40 hex digits, only where the URL has a query, which may be a signature and is left out>"
    sha256 = "<64 hex digits>"
    bytes = 1234

    [[repo.environment]]
    name = "auto"
    python = "3.11"
    platform = "linux-x86_64"

    [[repo.environment.package]]
    name = "timm"
    version = "0.6.13"
    sha256 = [
        "<64 hex digits: of each file that fits>",
    ]

It is TOML, of which only the lines that isohub writes are read: what a reviewer sees is what counts, so
nothing is invisible, nothing is there twice, and no line means what another seems to. Does no I/O. Runs in
the caller. Trust: the file may come with somebody's project.

Source: TOML 1.0; a key of 20,000 dotted parts in one line keeps a TOML parser busy for six seconds
(measured with tomli 2.5), which is why lines are looked at before they are parsed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import tomli_w

from isohub.errors import InvalidReferenceError, printable
from isohub.repos.naming import has_hidden, ref_problem, without_credentials
from isohub.repos.weights_url import WeightsUrl, parse_weights_url

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "LIMIT_BYTES",
    "Entries",
    "Key",
    "LockedEnvironment",
    "LockedPackage",
    "LockedRepo",
    "LockedWeights",
    "decode_lock",
    "encode_lock",
]

_VERSION = 1
#: Some 10,000 entries; a person reviews them.
LIMIT_BYTES = 4 << 20
_EXTRAS = ((), ("lfs",), ("submodules",), ("lfs", "submodules"))
_HEADER = (
    "# Which commits and weights were loaded. Written by isohub; commit it, and review its changes as code.\n"
    f"version = {_VERSION}\n"
)
_LINE = re.compile(
    r"(?:#.*|version = \d+|\[\[repo(?:\.weights|\.environment(?:\.package)?)?\]\]"
    r'|[a-z0-9]+ = (?:"[^"\\]*(?:\\.[^"\\]*)*"|\d{1,18}|true|false|\[)|    "[a-z0-9]+",|\])?'
)

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]
_Commit = Annotated[str, msgspec.Meta(pattern=r"^(?:[0-9a-f]{40}|[0-9a-f]{64}|tree-[0-9a-f]{40})\Z")]
_Tree = Annotated[str, msgspec.Meta(pattern=r"^(?:[0-9a-f]{40}|[0-9a-f]{64})\Z")]
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_UrlKey = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}\Z")]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,198}[a-z0-9])?\Z")]
_Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-z][0-9a-z.!+_-]{0,98}\Z")]
_Python = Annotated[str, msgspec.Meta(pattern=r"^3\.[0-9]{1,2}\Z")]
_Platform = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,98}\Z")]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class LockedWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file.

    Attributes:
        url: As the repo names it, without query and fragment.
        sha256: Of its content.
        bytes: Its size.
        key: What tells its query from others, as `WeightsUrl.key`; None if it has none.
    """

    url: _Text
    sha256: _Sha256
    bytes: _Bytes
    key: _UrlKey | None = None

    @property
    def which(self) -> tuple[str, str]:
        """What it is found and sorted by."""
        return self.url, self.key or ""

    @classmethod
    def of(cls, address: WeightsUrl, sha256: str, size_bytes: int) -> LockedWeights:
        """A file at an address."""
        return cls(address.address, sha256, size_bytes, None if address.text == address.address else address.key)


class LockedPackage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One package of an environment.

    Attributes:
        name: As an index compares it (PEP 503).
        version: As PEP 440 has it.
        sha256: Of each of its files that fits the interpreter; one of them is installed. Sorted.
    """

    name: _Name
    version: _Version
    sha256: tuple[_Sha256, ...]


class LockedEnvironment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one environment of a reference consists of, beside its interpreter; for "auto", over the host's packages.

    Attributes:
        name: As `Environment.name`.
        python: The interpreter's version, two numbers.
        platform: As ``sysconfig.get_platform`` has it.
        package: Its packages, by name.
    """

    name: _Text
    python: _Python
    platform: _Platform
    package: tuple[LockedPackage, ...] = ()


class LockedRepo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One reference, with one set of extras.

    Attributes:
        reference: Canonical text; relative to the lockfile for what lies below its directory.
        extras: As in `Pin.extras`.
        commit: As in `Pin.commit`.
        ref: As in `Pin.ref_name`.
        validated: As in `Pin.validated`.
        tree: As in `Checkout.tree`.
        weights: What was downloaded for it, by URL.
        environment: What it ran on, where that was built for it.
    """

    reference: _Text
    commit: _Commit
    validated: bool
    tree: _Tree
    extras: tuple[str, ...] = ()
    ref: _Text | None = None
    weights: tuple[LockedWeights, ...] = ()
    environment: tuple[LockedEnvironment, ...] = ()

    def environment_of(self, name: str) -> LockedEnvironment | None:
        """What is locked for an environment, by its name."""
        return next((each for each in self.environment if each.name == name), None)

    def weights_of(self, address: WeightsUrl) -> LockedWeights | None:
        """What is locked for an address."""
        which = LockedWeights.of(address, "", 0).which
        return next((each for each in self.weights if each.which == which), None)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    repo: tuple[LockedRepo, ...] = ()


#: Which entry: canonical text of a reference, and sorted extras.
Key = tuple[str, tuple[str, ...]]
Entries = dict[Key, LockedRepo]


def decode_lock(content: bytes) -> Entries:
    """Read a lockfile.

    Raises:
        ValueError: It cannot be relied on; the message says why, control characters escaped.
    """
    if len(content) > LIMIT_BYTES:
        raise ValueError(f"it is larger than {LIMIT_BYTES} bytes")
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    version = re.search(r"^version = (\d{1,9})$", text, re.MULTILINE)
    if version is None:
        raise ValueError("it has no line such as 'version = 1'")
    if int(version[1]) != _VERSION:
        raise ValueError(f"it is of format version {int(version[1])}, expected {_VERSION}")
    for number, line in enumerate(text.split("\n"), 1):
        if not _LINE.fullmatch(line) or has_hidden(line):
            shown = printable(without_credentials(line), limit_chars=100, newlines=False)
            raise ValueError(f"line {number} is none that isohub writes: {shown}")
    try:
        document = msgspec.convert(msgspec.toml.decode(text), _File)
    except (ValueError, RecursionError) as error:  # msgspec's and the TOML parsers' errors are ValueErrors
        raise ValueError(printable(str(error), limit_chars=300, newlines=False)) from error
    entries: Entries = {}
    for entry in document.repo:
        _check(entry)
        key = (entry.reference, entry.extras)
        if key in entries:
            raise ValueError(f"the entry of {_shown(entry)} is there twice")
        # A merge by hand may leave them in any order.
        weights = tuple(sorted(entry.weights, key=lambda each: each.which))
        environments = tuple(sorted(entry.environment, key=lambda each: each.name))
        entries[key] = msgspec.structs.replace(entry, weights=weights, environment=environments)
    return entries


def encode_lock(entries: Mapping[Key, LockedRepo]) -> bytes:
    """A lockfile's content, sorted, which `decode_lock` reads again.

    Raises:
        ValueError: An entry may not be, or it would be too large.
    """
    for entry in entries.values():
        _check(entry)
    content = "\n".join([_HEADER, *(_text(entries[key]) for key in sorted(entries))]).encode("utf-8", "surrogatepass")
    if decode_lock(content) != entries:
        raise ValueError("it would not be read as it was meant")
    return content


def _check(entry: LockedRepo) -> None:
    """Refuse what no entry may be, beyond its types."""
    problem = _problem(entry)
    if problem is not None:
        raise ValueError(f"the entry of {_shown(entry)} {problem}")


def _problem(entry: LockedRepo) -> str | None:
    """What no entry may be, beyond its types."""
    texts = [entry.reference, entry.ref or "", *(weights.url for weights in entry.weights)]
    texts += [environment.name for environment in entry.environment]
    if any(has_hidden(text) for text in texts):
        return "holds control or invisible characters"
    if without_credentials(entry.reference) != entry.reference:
        return "holds a credential"
    if entry.ref is not None and (problem := ref_problem(entry.ref)) is not None:
        return f"has a ref that {problem}"
    if entry.extras not in _EXTRAS:
        return f"has the extras {', '.join(entry.extras)}; expected lfs, submodules or both, in this order"
    if len({weights.which for weights in entry.weights}) != len(entry.weights):
        return "has weights twice"
    if len({environment.name for environment in entry.environment}) != len(entry.environment):
        return "has an environment twice"
    for environment in entry.environment:
        if len({package.name for package in environment.package}) != len(environment.package):
            return "has a package twice in one environment"
        if not all(package.sha256 for package in environment.package):
            return "has a package without a hash"
    for weights in entry.weights:
        try:
            plain = parse_weights_url(weights.url).address == weights.url
        except InvalidReferenceError:
            plain = False
        if not plain:
            return "has weights at an address that holds a query or a credential, or is none"
    return None


def _text(entry: LockedRepo) -> str:
    """An entry as TOML, in the order in which one reads it."""
    fields: dict[str, Any] = {"reference": entry.reference}
    if entry.extras:
        fields["extras"] = list(entry.extras)
    fields["commit"] = entry.commit
    if entry.ref is not None:
        fields["ref"] = entry.ref
    fields |= {"validated": entry.validated, "tree": entry.tree}
    tables = [f"[[repo]]\n{tomli_w.dumps(fields)}"]
    for weights in entry.weights:
        key = {} if weights.key is None else {"key": weights.key}
        file = {"url": weights.url, **key, "sha256": weights.sha256, "bytes": weights.bytes}
        tables.append(f"[[repo.weights]]\n{tomli_w.dumps(file)}")
    for environment in entry.environment:
        known = {"name": environment.name, "python": environment.python, "platform": environment.platform}
        tables.append(f"[[repo.environment]]\n{tomli_w.dumps(known)}")
        tables += [f"[[repo.environment.package]]\n{tomli_w.dumps(_plain(package))}" for package in environment.package]
    return "\n".join(tables)


def _plain(package: LockedPackage) -> dict[str, Any]:
    return {"name": package.name, "version": package.version, "sha256": [*package.sha256]}


def _shown(entry: LockedRepo) -> str:
    return printable(without_credentials(entry.reference), limit_chars=200, newlines=False)
