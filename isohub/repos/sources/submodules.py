r"""``.gitmodules``: what it says, and where a submodule's URL leads. Pure: no I/O, nothing executed.

The file is the repository's, so it is read by git's grammar with bounds, and what git itself
refuses is refused: names with ``..``, names, paths and URLs that begin with a dash. A URL leads to
https, to ssh where the parent came by ssh, and to unencrypted loopback where the parent did;
never to a file: a repository must not bring this machine's files into its worker's reach.
Runs in the caller.

Source: gitmodules(5), git-config(1) (Syntax), git's submodule-config.c and remote.c (relative_url);
CVE-2018-11235 (names), CVE-2018-17456 (dashes), CVE-2022-39253 (files), CVE-2023-29007 (long lines).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from isohub.errors import InvalidReferenceError, SourceUnavailableError, printable
from isohub.repos.naming import has_hidden
from isohub.repos.reference import parse
from isohub.repos.sources.ssh import is_ssh, parse_ssh

__all__ = ["GITMODULES_LIMIT_BYTES", "Submodule", "locate", "owner_of", "parse_gitmodules"]

#: PyTorch's has 5 KiB, Boost's with 170 submodules 20.
GITMODULES_LIMIT_BYTES = 1 << 20
# A path and a URL are at most 4,096 and 8,192 bytes; git's own limits have overflowed at 1,024.
_LINE_LIMIT_CHARS = 16 << 10
_SECTION = re.compile(r'\[\s*(?P<section>[A-Za-z0-9.-]+)(?:\s+"(?P<name>(?:[^"\\\n]|\\[^\n])*)")?\s*\]')
_KEY = re.compile(r"(?P<key>[A-Za-z][A-Za-z0-9-]*)[ \t]*(?P<equals>=?)[ \t]*")
_BLANK = re.compile(r"\s*(?:[#;][^\n]*\n?\s*)*")
_ESCAPES = {"n": "\n", "t": "\t", "b": "\b", '"': '"', "\\": "\\"}


@dataclass(frozen=True)
class Submodule:
    """A section of ``.gitmodules``.

    Attributes:
        name: Where git keeps its clone: ``.git/modules/<name>``. No ``..`` in it.
        path: In the tree.
        url: As it is written, or None.
    """

    name: str
    path: str
    url: str | None


def parse_gitmodules(data: bytes) -> dict[str, Submodule]:
    """Read the file.

    Args:
        data: Trust: the repo.

    Returns:
        Path to submodule. As in git's configuration, what comes later wins.

    Raises:
        ValueError: It does not follow the grammar, or holds what git refuses.
    """
    if len(data) > GITMODULES_LIMIT_BYTES:
        raise ValueError(f"it has {len(data)} bytes; at most {GITMODULES_LIMIT_BYTES} are read")
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    if any(len(line) > _LINE_LIMIT_CHARS for line in text.split("\n")):
        raise ValueError(f"it has a line of more than {_LINE_LIMIT_CHARS} characters")
    sections: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    at = _after(_BLANK, text, 0)
    while at < len(text):
        if header := _SECTION.match(text, at):
            at = header.end()
            current = {}  # of some other section: read and forgotten
            if header["section"].lower() == "submodule" and header["name"] is not None:
                current = sections.setdefault(re.sub(r"\\(.)", r"\1", header["name"]), {})
        elif key := _KEY.match(text, at):
            value, at = _value(text, key.end()) if key["equals"] else ("true", key.end())
            current[key["key"].lower()] = value
        else:
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"line {line} is no section and no key")
        at = _after(_BLANK, text, at)
    found: dict[str, Submodule] = {}
    for name, keys in sections.items():
        if "path" not in keys:
            continue
        _judge(name, keys)
        path = keys["path"].rstrip("/")
        found[path] = Submodule(name, path, keys.get("url"))
    return found


def locate(url: str, base: str | None) -> str:
    """Where a submodule is to be fetched from.

    Args:
        url: As ``.gitmodules`` writes it. Trust: the repo.
        base: Address of the parent, for relative URLs; None if it has none but a path.

    Raises:
        ValueError: It leads to what is not fetched; the rest of the sentence says why.
    """
    parent_by_ssh = base is not None and is_ssh(base)
    if url.startswith(("./", "../")):
        if base is None:
            raise ValueError("is relative to its parent, which came from no server")
        url = _joined(base, url)
    if is_ssh(url):
        if not parent_by_ssh:
            raise ValueError("is reached by ssh with your keys, while its parent was not")
        try:
            parse_ssh(url)
        except SourceUnavailableError as error:
            raise ValueError(f"is refused: {error.message}") from error
        return url
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("https", "http"):
        what = f"has the scheme {printable(scheme, limit_chars=40)!r}" if separator else "is a path"
        raise ValueError(f"{what}; a repository's submodules are fetched over https alone")
    if "?" in rest:
        raise ValueError("has a query, which no repository's address has")
    host, slash, path = rest.partition("/")
    try:
        # The rules for what a user may write hold here as well: no credentials, plain components.
        location = parse(f"git+{scheme}://{host}{slash}{quote(path, safe='/%')}", source="git").location
    except InvalidReferenceError as error:
        raise ValueError(f"is refused: {error.message}") from error
    if scheme == "http" and not (base or "").startswith("http://"):
        raise ValueError("is not encrypted, while its parent's address is")
    return location


def owner_of(location: str) -> tuple[str, str]:
    """Server and owner of a repository's address: what decides whether credentials are sent on."""
    if is_ssh(location):
        address = parse_ssh(location)
        return f"ssh://{address.destination}:{address.port}", address.path.strip("/").rpartition("/")[0]
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc}".lower(), parts.path.strip("/").rpartition("/")[0]


def _judge(name: str, keys: dict[str, str]) -> None:
    for what, text in (("name", name), ("path", keys["path"]), ("URL", keys.get("url", ""))):
        shown = printable(text, limit_chars=200, newlines=False)
        if text.startswith("-"):
            raise ValueError(f"the {what} {shown!r} begins with a dash")
        if has_hidden(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")):
            raise ValueError(f"the {what} {shown!r} holds a control or invisible character")
    if any(part in ("", ".", "..") for part in re.split(r"[/\\]", name)):
        raise ValueError(f"the name {printable(name, limit_chars=200, newlines=False)!r} leads elsewhere")


def _value(text: str, at: int) -> tuple[str, int]:
    """A value and where it ends: quotes, escapes, comments and continued lines are git's."""
    parts: list[str] = []
    quoted = False
    kept = 0  # parts up to the last that is not a space outside quotes
    while at < len(text) and (char := text[at]) != "\n":
        at += 1
        if char == "\\":
            escape = text[at : at + 1]
            at += 1
            if escape == "\n":
                continue
            if escape not in _ESCAPES:
                raise ValueError(f"a value holds the escape {chr(92) + escape!r}")
            parts.append(_ESCAPES[escape])
        elif char == '"':
            quoted = not quoted
        elif char in "#;" and not quoted:
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            break
        else:
            parts.append(char)
            if char in " \t" and not quoted:
                continue
        kept = len(parts)
    if quoted:
        raise ValueError("a value has a quote without its end")
    return "".join(parts[:kept]), at


def _joined(base: str, relative: str) -> str:
    """Join as git does: each leading ``../`` takes a component off the parent's address; never its host."""
    head, separator, path = base.rstrip("/").partition("://")
    if separator:
        host, _, path = path.partition("/")
        head = f"{head}://{host}/"
    else:
        head, _, path = base.rstrip("/").partition(":")
        head += ":"
    components = path.split("/")
    while relative.startswith(("./", "../")):
        if relative.startswith("../"):
            if not components:
                raise ValueError("leads above the server's root")
            components.pop()
        relative = relative.partition("/")[2].lstrip("/")
    return head + "/".join([*components, relative])


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()
