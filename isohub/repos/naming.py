"""Names: which are well formed, which are near a wrong one, how one becomes a directory's name.

Pure functions, used by every stage of `isohub.repos`. Runs in the caller.

Source: git-check-ref-format(1), RFC 3986, RFC 1035.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from typing import TYPE_CHECKING

from isohub.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "COMPONENT_LIMIT_BYTES",
    "encode_component",
    "has_hidden",
    "host_of",
    "near_names",
    "ref_problem",
    "shown",
    "without_credentials",
]

#: NAME_MAX of Linux's file systems, which a branch is a file on at the server.
COMPONENT_LIMIT_BYTES = 255
_REF_LIMIT_CHARS = 1000
# The categories that isohub.errors.printable escapes, for the same reasons.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_HOST = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])")
# What stands for a port and is none may be a password, whose sign is in the part that is cut off.
_NO_PORT = re.compile(r"(://[^/\[\]:]*):(?![0-9]*(?:/|$)).*", re.DOTALL)
_DEFAULT_PORTS = {"https": "443", "http": "80", "ssh": "22"}


# Lower-case letters, digits and these stay as they are; so do capitals, since the disks we
# write to keep case. RFC 3986's unreserved set without "~", which shells expand.
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
_NEAR_COUNT = 5
# SequenceMatcher is quadratic: repositories with tens of thousands of branches exist.
_NEAR_CANDIDATES = 5_000


def near_names(wanted: str, names: Iterable[str]) -> list[str]:
    """The names nearest to the wanted one, best first, at most five.

    Args:
        wanted: What the user wrote.
        names: What there is. Trust: the repo or the network.
    """
    unique = list(dict.fromkeys(names))
    folded = wanted.casefold()
    if len(unique) > _NEAR_CANDIDATES:
        prefix = folded[:2]
        unique = [name for name in unique if name.casefold().startswith(prefix)][:_NEAR_CANDIDATES]
    by_folded: dict[str, list[str]] = {}
    for name in unique:
        by_folded.setdefault(name.casefold(), []).append(name)
    ranked = difflib.get_close_matches(folded, list(by_folded), n=_NEAR_COUNT, cutoff=0.6)
    inside = [key for key in by_folded if len(folded) >= 3 and folded in key and key not in ranked]
    return [name for key in [*ranked, *sorted(inside, key=len)] for name in by_folded[key]][:_NEAR_COUNT]


def encode_component(text: str) -> str:
    """Any text as one component of a path; different texts give different components.

    Args:
        text: Host, owner or repo. Trust: the caller.

    Returns:
        ASCII, never empty, ``.``, ``..`` or starting with a dot, case kept.
    """
    if not text:
        return "%"  # no encoding of anything else: a percent sign is always followed by two digits
    encoded = "".join(
        chr(byte) if chr(byte) in _PLAIN and not (byte == ord(".") and index == 0) else f"%{byte:02X}"
        for index, byte in enumerate(text.encode("utf-8", "surrogatepass"))
    )
    if len(encoded) <= 200:
        return encoded
    # NAME_MAX is 255. A hash of the whole, behind a mark that no encoding holds.
    return f"{encoded[:100].rstrip('%')}%={hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def has_hidden(text: str) -> bool:
    """Whether the text holds a control, an invisible or a surrogate character."""
    return any(unicodedata.category(c) in _HIDDEN for c in text)


def ref_problem(ref: str) -> str | None:
    """What is wrong with a ref's name, or None.

    Args:
        ref: Branch, tag, full ref name or SHA. Trust: the caller.

    Source: git-check-ref-format(1), rules 1 to 10; a leading dash is refused as ``git branch`` does.
    """
    if not ref:
        return "is empty"
    if len(ref) > _REF_LIMIT_CHARS:
        return f"has {len(ref)} characters, more than {_REF_LIMIT_CHARS}"
    for char in ref:
        if char.isspace() or unicodedata.category(char) in _HIDDEN:
            return f"holds the character {char!a}"
        if char in "~^:?*[\\":
            return f"holds {char!r}, which no git ref can"
    if ref.startswith("-"):
        return "starts with a dash"
    if ref == "@" or "@{" in ref:
        return "is git's reflog notation, which names no ref of a remote"
    if ".." in ref:
        return "holds '..'"
    if ref.endswith("."):
        return "ends with a dot"
    for component in ref.split("/"):
        if not component:
            return "holds an empty component: a slash at an end or two in a row"
        if component.startswith("."):
            return f"has the component {component!r}, which starts with a dot"
        if component.endswith(".lock"):
            return f"has the component {component!r}, which ends in .lock"
        if len(component.encode("utf-8")) > COMPONENT_LIMIT_BYTES:
            return f"has a component of more than {COMPONENT_LIMIT_BYTES} bytes"
    return None


def host_of(scheme: str, netloc: str) -> str:
    """Host in lower case with its port unless it is the scheme's; ValueError if it is none."""
    lowered = netloc.lower()
    name, colon, port = lowered.rpartition(":") if re.search(r":[^\]]*$", lowered) else (lowered, "", "")
    if not _HOST.fullmatch(name) or ".." in name or len(name) > 253:  # RFC 1035, section 2.3.4
        raise ValueError(netloc)
    if not colon:
        return name
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(netloc)
    return name if port.lstrip("0") == _DEFAULT_PORTS.get(scheme) else f"{name}:{int(port)}"


def without_credentials(text: str) -> str:
    """The text with ``user:password@`` after ``://`` blanked; errs on the side of blanking."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    netloc, slash, path = rest.partition("/")
    port = netloc.rpartition(":")[2]
    if "@" in netloc:
        if scheme.endswith("ssh") and ":" not in netloc.rpartition("@")[0]:
            return text
        return f"{scheme}://***@{netloc.rpartition('@')[2]}{slash}{path}"
    # A password that holds a slash: what looks like a port is no number.
    if ":" in netloc and not port.isdigit() and not netloc.startswith("[") and "@" in path:
        return f"{scheme}://***@{path.rpartition('@')[2]}"
    return text


def shown(url: str) -> str:
    """A URL as messages have it: without a password, and without a query, whose signatures are credentials."""
    bare = without_credentials(url.partition("#")[0].partition("?")[0])
    return printable(_NO_PORT.sub(r"\1:***", bare), limit_chars=500, newlines=False)
