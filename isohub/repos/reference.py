"""What the user wrote, parsed: the grammar of references and nothing else.

    owner/repo[:ref]                                  GitHub, torch.hub's form
    https://host/path[.git][:ref | @ref]              a GitHub server, or any git host
    git+https://host/path[.git][@ref][#subdirectory=dir]   pip's form; always the git protocol
    git+file:///path/to/clone[@ref], ./clone:ref      a local clone at a ref
    ./directory, ~/directory, /directory, a PathLike  a local directory as it stands
    git+ssh://, ssh://, user@host:path[@ref]          by ssh; the last is below the home there, as git has it

A ref is a branch, a tag, ``refs/...``, ``pull/N`` or a SHA; none means the remote's HEAD.
Parsing opens no connection. It looks at the disk for local forms only: the longest prefix
that is a directory is the directory, so that a name with a colon works. Credentials in a
URL are refused and never repeated. Runs in the caller.

Source: git-check-ref-format(1), gitrevisions(7), RFC 3986, pip's VCS support page.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn
from urllib.parse import quote, unquote, urlsplit

from isohub.errors import InvalidReferenceError, printable
from isohub.repos.naming import (
    COMPONENT_LIMIT_BYTES,
    has_hidden,
    host_of,
    near_names,
    ref_problem,
    without_credentials,
)

__all__ = ["Reference", "SourceName", "github_api", "github_server", "parse"]

SourceName = Literal["github", "git", "local"]
_SOURCES: tuple[SourceName, ...] = ("github", "git", "local")

_DEFAULT_SERVER = "https://github.com"
_GRAMMAR = "owner/repo[:ref], https://host/path[:ref], git+https://host/path[@ref] or a path such as ./directory"
# GitHub shows no longer names; a bound keeps directory names within NAME_MAX after encoding.
_NAME_LIMIT_CHARS = 100
_TEXT_LIMIT_CHARS = 8192  # RFC 9110, section 4.1, asks for 8000 octets of URL
_GITHUB_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_SCP = re.compile(r"(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*):(?P<path>[^:]+)")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<netloc>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.DOTALL)
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d+)?")


@dataclass(frozen=True)
class Reference:
    """What the user wrote, parsed; nothing was asked of any server.

    Attributes:
        text: What was written. Not compared: two spellings of one thing are equal.
        source: Which kind of place it is.
        host: ``github.com``, ``127.0.0.1:8123``; ``ssh:git@host`` by ssh, where the user decides
            what a path means; ``local`` for directories and clones.
        owner: May hold slashes for git hosts with groups, and be empty for hosts without. By ssh
            it begins with ``~`` if the path does so. For local ones a hash of the parent
            directory, so that two `models` never meet.
        repo: Last component without ``.git``, or the directory's name.
        location: Clone URL, or absolute path with symlinks resolved.
        ref: None for the remote's HEAD; for a local directory, the tree as it stands.
        subdirectory: Where in the tree the repo starts, with ``/`` between components.
    """

    text: str = field(compare=False)
    source: SourceName
    host: str
    owner: str
    repo: str
    location: str
    ref: str | None = None
    subdirectory: str | None = None

    def __str__(self) -> str:
        """Canonical text, which parses to an equal Reference under the same environment."""
        fragment = f"#subdirectory={quote(self.subdirectory, safe='/')}" if self.subdirectory else ""
        at = f"@{quote(self.ref, safe='/')}" if self.ref else ""
        if self.source == "local":
            if self.ref is None:
                return self.location
            return f"git+file://{quote(self.location, safe='/')}{at}{fragment}"
        if self.source == "git":
            if "://" not in self.location:  # user@host:path
                return self.location + (f"@{self.ref}" if self.ref else "") + fragment
            return f"git+{self.location}{at}{fragment}"
        if self.location != f"{_server_or_default()}/{self.owner}/{self.repo}" or "#" in (self.ref or ""):
            return f"{self.location}{at}{fragment}"
        return f"{self.owner}/{self.repo}" + (f":{self.ref}" if self.ref else "") + fragment


@dataclass(frozen=True)
class _Text:
    """The text on its way through the parser, and how to refuse it."""

    written: str
    shown: str

    def error(self, part: str, problem: str, expected: str, hint: str | None = None) -> InvalidReferenceError:
        return InvalidReferenceError(
            f"{self.shown!r} is no reference: {part} {problem}; expected {expected}",
            hint=hint,
            reference=self.shown,
            part=part,
        )

    def refuse(self, part: str, problem: str, expected: str, hint: str | None = None) -> NoReturn:
        raise self.error(part, problem, expected, hint)


def parse(text: str | os.PathLike[str], source: SourceName | None = None) -> Reference:
    """Parse a reference.

    Args:
        text: One of the forms above. Trust: the caller, who may have copied it from anywhere.
        source: Forces the kind; None means that the form decides.

    Raises:
        InvalidReferenceError: It is none of the forms. `part` names what is at fault.
    """
    raw: object = os.fspath(text) if isinstance(text, os.PathLike) else text
    if not isinstance(raw, str):
        shown = printable(repr(raw), limit_chars=200)
        _Text("", shown).refuse("text", f"is a {type(raw).__name__}", "a str or a path of str")
    shown = printable(without_credentials(raw), limit_chars=500, newlines=False)
    given = _Text(raw, shown)
    if source is not None and source not in _SOURCES:
        given.refuse("source", f"is {source!r}", f"one of {', '.join(_SOURCES)}")
    if not raw:
        given.refuse("text", "is empty", _GRAMMAR)
    if len(raw) > _TEXT_LIMIT_CHARS:
        given.refuse("text", f"has {len(raw)} characters", f"at most {_TEXT_LIMIT_CHARS}")
    for char in raw:
        # Invisible characters stay allowed in names of directories, where they are the user's own.
        if unicodedata.category(char) in ("Cc", "Cs"):
            given.refuse("text", f"holds the character {char!a}", "no control characters and valid UTF-8")

    path_like = isinstance(text, os.PathLike) or raw in (".", "..", "~") or raw.startswith(("./", "../", "/", "~"))
    lowered = raw[:16].lower()
    if lowered.startswith("git+file:"):
        if source == "github":
            given.refuse("source", "is 'github' and the text is a file URL", "source='local' or 'git'")
        return _parse_file_url(given)
    if source == "local" or path_like:
        if source == "github":
            given.refuse("source", "is 'github' and the text is a path", "source='local', or owner/repo[:ref]")
        return _parse_path(given, default_ref="HEAD" if source == "git" else None)
    if "://" in raw:
        return _parse_url(given, source)
    body, hash_mark, fragment = raw.partition("#subdirectory=")
    if scp := _SCP.fullmatch(body):
        path, at, ref = scp["path"].partition("@")
        absolute = path.startswith("/")
        url = f"ssh://{scp['user']}@{scp['host']}/{quote(path.removeprefix('/'), safe='/')}{at}{quote(ref, safe='/')}"
        found = _parse_url(_Text(f"{url}{hash_mark}{fragment}", shown), source)
        if absolute:
            return found
        # As a URL the path begins at the root; git takes this form's to begin at the user's home.
        location = f"{scp['user']}@{scp['host'].lower()}:{path.removesuffix('/')}"
        return replace(found, owner="/".join(filter(None, ("~", found.owner))), location=location)
    return _parse_short(given, source)


def github_server() -> str:
    """Origin of the GitHub server that ``owner/repo`` means: ``GITHUB_SERVER_URL``, or github.com's.

    Source: GitHub's documentation of default environment variables.
    """
    value = os.environ.get("GITHUB_SERVER_URL", "").strip() or _DEFAULT_SERVER
    try:
        parts = urlsplit(value)
        origin = f"{parts.scheme}://{host_of(parts.scheme, parts.netloc)}"
        usable = parts.scheme in ("https", "http") and not parts.query and not parts.fragment
        usable = usable and parts.path in ("", "/")
    except ValueError:
        usable = False
    if not usable:
        shown = printable(without_credentials(value), limit_chars=200, newlines=False)
        raise InvalidReferenceError(
            f"GITHUB_SERVER_URL is {shown!r}; expected an address such as {_DEFAULT_SERVER}",
            hint="unset GITHUB_SERVER_URL, or set it to scheme://host[:port] alone",
            part="GITHUB_SERVER_URL",
        )
    return origin


def github_api(server: str) -> str:
    """Address of a GitHub server's REST API: ``GITHUB_API_URL`` for the configured server, else as GitHub lays it out.

    Source: GitHub's documentation of default environment variables and of Enterprise Server's API.
    """
    configured = os.environ.get("GITHUB_API_URL", "").strip().rstrip("/")
    if configured and server == github_server():
        return configured
    return "https://api.github.com" if server == _DEFAULT_SERVER else f"{server}/api/v3"


def _checked_ref(given: _Text, ref: str) -> str:
    problem = ref_problem(ref)
    if problem is not None:
        hint = "leave the colon out for the default branch" if not ref else None
        if re.search(r"[~^]|@\{", ref):
            hint = "a revision's suffixes are not taken; in a clone, `git rev-parse HEAD~1` gives the SHA to write"
        given.refuse("ref", problem, "a branch, a tag, refs/..., pull/N or a SHA", hint)
    return ref


def _checked_github_name(given: _Text, part: str, name: str) -> str:
    allowed = "letters, digits, '-', '_' and '.'"
    if not _GITHUB_NAME.fullmatch(name):
        before, at, ref = name.partition("@")
        is_ref = part == "repo" and at and before and ref and "@" in given.shown
        hint = f"a ref follows a colon: {given.shown.replace('@', ':', 1)}" if is_ref else None
        given.refuse(part, f"is {name!r}" if name else "is empty", allowed, hint)
    if name in (".", "..") or (part == "owner" and name.startswith("-")) or name.lower().endswith(".git"):
        given.refuse(part, f"is {name!r}, which GitHub does not allow", allowed)
    if len(name) > _NAME_LIMIT_CHARS:
        given.refuse(part, f"has {len(name)} characters", f"at most {_NAME_LIMIT_CHARS}")
    return name


def _parse_short(given: _Text, source: SourceName | None) -> Reference:
    body, subdirectory = given.written, None
    if (at := body.find("#subdirectory=")) >= 0:
        subdirectory = _checked_subdirectory(given, body[at:])
        body = body[:at]
    name, colon, ref_text = body.partition(":")
    parts = name.split("/")
    if len(parts) != 2:
        hint = None
        if Path(name).is_dir():
            hint = f"for the directory, write ./{name} or pass source='local'"
        elif not colon and re.fullmatch(r"[\w.-]+/[\w.-]+@.+", name):
            hint = f"a ref follows a colon: {given.shown.replace('@', ':', 1)}"
        elif len(parts) > 2 and "." in parts[0]:
            hint = f"for another host, write https://{name}"
        elif re.fullmatch(r"[\w.-]+@[\w.-]+:[^:]+:[^:]+", body):
            hint = f"over ssh a ref follows an at sign: {body.rpartition(':')[0]}@{ref_text.rpartition(':')[2]}"
        elif "@" in parts[0]:
            hint = "for a clone over ssh, write user@host:owner/repo"
        problem = f"is {name!r}, which has {len(parts) - 1} slashes" if name else "is empty"
        given.refuse("repository", problem, f"owner/repo with one slash, or {_GRAMMAR}", hint)
    owner = _checked_github_name(given, "owner", parts[0])
    repo = _checked_github_name(given, "repo", parts[1].removesuffix(".git"))
    ref = _checked_ref(given, ref_text) if colon else None
    server = github_server()
    return Reference(
        text=given.shown,
        source="git" if source == "git" else "github",
        host=server.partition("://")[2],
        owner=owner,
        repo=repo,
        location=f"{server}/{owner}/{repo}",
        ref=ref,
        subdirectory=subdirectory,
    )


def _parse_url(given: _Text, source: SourceName | None) -> Reference:
    match = _URL.fullmatch(given.written)
    if match is None:
        given.refuse("scheme", "is missing or malformed", _GRAMMAR)
    scheme = match["scheme"].lower()
    pip_form = scheme.startswith("git+")
    scheme = scheme.removeprefix("git+")
    if scheme not in ("https", "http", "ssh"):
        hint = f"for a local clone, write git+file://{match['path']}" if scheme == "file" else None
        given.refuse("scheme", f"is {scheme!r}", "https, git+https, git+file or ssh", hint)
    user, at, netloc = match["netloc"].rpartition("@")
    if at and not (scheme == "ssh" and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", user)):
        given.refuse(
            "user",
            "holds a credential, which would end in logs and files" if scheme != "ssh" else "is malformed",
            "no user or password in the URL" if scheme != "ssh" else "a plain user name without a password",
            "keep the password in ~/.netrc or with git's credential helper; for GitHub, GITHUB_TOKEN does as well",
        )
    try:
        host = host_of(scheme, netloc)
    except ValueError:
        given.refuse("host", "is malformed", "a host name with an optional port; IDNs as xn--...")

    subdirectory = _checked_subdirectory(given, match["rest"]) if match["rest"] else None
    path, ref = match["path"], None
    # The first colon, or the first at sign that does not begin a component, ends the path. A
    # component or ref that holds one is written with %40.
    if separator := re.search(r":|(?<!/)@", path):
        ref = _checked_ref(given, _unquoted(given, "ref", path[separator.end() :]))
        path = path[: separator.start()]
    origin = f"{scheme}://{host}"
    github_host = origin in (github_server(), _DEFAULT_SERVER)
    kind: SourceName = source or ("github" if github_host and not pip_form else "git")
    if kind == "github" and not github_host:
        given.refuse("host", f"is {host}", f"the GitHub server {github_server()}", "pass source='git' for another host")
    if scheme == "http" and not github_host and not _LOOPBACK.fullmatch(host):
        hint = f"write {given.shown.replace('http://', 'https://', 1)}"
        given.refuse("scheme", "is http, on which anyone on the way can change the code", "https", hint)

    components = [_unquoted(given, "path", c) for c in path.removeprefix("/").removesuffix("/").split("/")]
    if kind == "github":
        return _github_from_url(given, origin, host, components, ref, subdirectory)
    for component in components:
        if component in ("", ".", "..") or re.search(r"[/\\]", component) or component.startswith("-"):
            given.refuse("path", f"has the component {component!r}", "components that are plain names")
        if has_hidden(component):
            given.refuse("path", f"has the component {component!a}", "no invisible characters")
        if len(component.encode("utf-8")) > COMPONENT_LIMIT_BYTES:
            given.refuse("path", "has an overlong component", f"at most {COMPONENT_LIMIT_BYTES} bytes in each")
    repo = components[-1].removesuffix(".git")
    if repo in ("", ".", "..") or repo.endswith(".git"):
        given.refuse("repo", f"is {components[-1]!r}", "a name")
    location = (
        f"{scheme}://{user + at if scheme == 'ssh' else ''}{host}/{'/'.join(quote(c, safe='') for c in components)}"
    )
    return Reference(
        text=given.shown,
        source="git",
        host=f"ssh:{user + at}{host}" if scheme == "ssh" else host,
        owner="/".join(components[:-1]),
        repo=repo,
        location=location,
        ref=ref,
        subdirectory=subdirectory,
    )


def _github_from_url(
    given: _Text, origin: str, host: str, components: list[str], ref: str | None, subdirectory: str | None
) -> Reference:
    if len(components) != 2:
        hint = None
        if len(components) > 3 and components[2] in ("tree", "blob", "commit", "commits", "pull"):
            found = components[3] if components[2] == "blob" else "/".join(components[3:])
            ref_text = f"pull/{components[3]}" if components[2] == "pull" else found
            hint = f"this is a page's address; write {components[0]}/{components[1]}:{ref_text}"
        given.refuse("path", f"has {len(components)} components", "owner/repo", hint)
    owner = _checked_github_name(given, "owner", components[0])
    repo = _checked_github_name(given, "repo", components[1].removesuffix(".git"))
    return Reference(
        text=given.shown,
        source="github",
        host=host,
        owner=owner,
        repo=repo,
        location=f"{origin}/{owner}/{repo}",
        ref=ref,
        subdirectory=subdirectory,
    )


def _parse_file_url(given: _Text) -> Reference:
    match = _URL.fullmatch(given.written)
    if match is None or match["netloc"].lower() not in ("", "localhost") or not match["path"].startswith("/"):
        given.refuse("path", "is not absolute", "git+file:///absolute/path[@ref]")
    subdirectory = _checked_subdirectory(given, match["rest"]) if match["rest"] else None
    raw = match["path"]
    # pip splits at the last at sign. A directory that holds one may be written as it is, when
    # the part before it is no directory.
    for end in [*(m.start() for m in reversed(list(re.finditer("@", raw)))), len(raw)]:
        path = _unquoted(given, "path", raw[:end])
        if "\0" not in path and Path(path).is_dir():
            ref = _unquoted(given, "ref", raw[end + 1 :]) if end < len(raw) else "HEAD"
            return _local(given, path, _checked_ref(given, ref), subdirectory)
    raise _no_directory(given, _unquoted(given, "path", raw.rpartition("@")[0] or raw))


def _parse_path(given: _Text, default_ref: str | None) -> Reference:
    text = given.written
    for end in [len(text), *(m.start() for m in reversed(list(re.finditer(":", text))))]:
        path = Path(text[:end] or ".").expanduser() if _home_known(text) else Path(text[:end] or ".")
        try:
            found = bool(text[:end]) and path.is_dir()
        except OSError:  # a name longer than the file system takes
            found = False
        if found:
            ref = default_ref if end == len(text) else _checked_ref(given, text[end + 1 :])
            return _local(given, str(path), ref, None)
    raise _no_directory(given, text)


def _home_known(text: str) -> bool:
    if not text.startswith("~"):
        return False
    try:
        Path(text).expanduser()
    except RuntimeError:  # no such user, or no home directory at all
        return False
    return True


def _local(given: _Text, path: str, ref: str | None, subdirectory: str | None) -> Reference:
    try:
        location = Path(path).resolve(strict=True)
        location_bytes = str(location).encode("utf-8")
    except (OSError, UnicodeEncodeError) as error:
        given.refuse("path", f"cannot be resolved ({type(error).__name__})", "a directory whose name is valid UTF-8")
    if not location.name:
        given.refuse("path", "is the root directory", "a directory of its own")
    if any(unicodedata.category(c) == "Cc" for c in str(location)):
        given.refuse("path", "leads to a name with control characters", "plain names")
    return Reference(
        text=given.shown,
        source="local",
        host="local",
        # Of the whole path's parent: `a/models` and `b/models` differ, and stay put when renamed apart.
        owner=hashlib.sha256(location_bytes.rpartition(b"/")[0]).hexdigest()[:16],
        repo=location.name,
        location=str(location),
        ref=ref,
        subdirectory=subdirectory,
    )


def _no_directory(given: _Text, text: str) -> InvalidReferenceError:
    path = Path(text)
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        names = []
    near = [] if path.is_file() else near_names(path.name.partition(":")[0], names)
    hint = f"near names there: {', '.join(printable(n, newlines=False) for n in near)}" if near else None
    directory, at, ref = text.rpartition("@")
    if at and Path(directory).is_dir():
        hint = printable(f"for a clone at a ref, write {directory}:{ref}", newlines=False)
    if "://" in text or (text.count("/") == 1 and not text.startswith((".", "/", "~"))):
        hint = hint or "leave source='local' out for a repository on a server"
    problem = "is a file" if path.is_file() else "is no directory"
    return given.error("path", problem, "a directory that exists, or a clone followed by :ref", hint)


def _checked_subdirectory(given: _Text, rest: str) -> str | None:
    # pip's lines carry egg=name, which says nothing of where the code is.
    parts = [part for part in rest.removeprefix("#").split("&") if not re.fullmatch(r"egg=[A-Za-z0-9._\-\[\],]+", part)]
    if rest.startswith("#") and not parts:
        return None
    key, _, value = "&".join(parts).partition("=")
    if not rest.startswith("#") or key != "subdirectory" or "&" in value:
        shown = printable(rest, limit_chars=100, newlines=False)
        given.refuse("fragment", f"is {shown!r}", "#subdirectory=path/in/the/tree and no query")
    value = _unquoted(given, "subdirectory", value).removesuffix("/")
    if has_hidden(value) or "\\" in value or any(c in ("", ".", "..", ".git") for c in value.split("/")):
        given.refuse("subdirectory", f"is {value!r}", "a relative path without '.', '..' and '//'")
    return value


def _unquoted(given: _Text, part: str, text: str) -> str:
    try:
        plain = unquote(text, errors="strict")
    except UnicodeDecodeError:
        given.refuse(part, "is not UTF-8 once its %XX are decoded", "UTF-8")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in plain):
        given.refuse(part, "holds a control character", "plain names")
    return plain


def _server_or_default() -> str:
    try:
        return github_server()
    except InvalidReferenceError:
        return _DEFAULT_SERVER
