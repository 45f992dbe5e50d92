"""Which hosts a worker may have asked for, as data: what a policy may say, and what it decides.

    host          that name, on ports 80 and 443        download.pytorch.org
    host:port     that name, on that port alone         mirror.example:8443
    host:*        that name, on every port              127.0.0.1:*
    *.host        every name below it, not itself       *.githubusercontent.com
    address       that very address; brackets for a port of IPv6   10.0.0.7, fd00::7, [fd00::7]:8080

Rules:

1. A policy names what is allowed. Nothing is allowed by default, and an empty policy allows nothing.
2. There is one form of a host: lower-case A-labels without a dot at the end, or an address as RFC 5952 writes it.
   What cannot be brought into it in one way only is refused. That form is compared, and that form is dialled.
3. An address is judged besides its name: what no public host has (loopback, private and the like, cloud metadata)
   is refused unless the policy names that very address. A name that leads there is refused even if it is named.

Pure: asks no resolver, opens no connection, reads no clock. Which side: both; it runs on Python 3.8.
Trust: a policy is the caller's; targets and addresses are a worker's and the network's.

Source: RFC 1123, 2.1 (names); RFC 3986, 3.2.2; RFC 5890, 2.3.2.1 (A-labels); RFC 5952; WHATWG URL, "ends in a
number".
"""

from __future__ import annotations

import encodings.idna
import functools
import ipaddress
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Optional, Tuple, Union

from isohub.errors import PolicyError, printable
from isohub.sandbox.addresses import special_kind, unmapped

__all__ = [
    "DEFAULT_PORTS",
    "WEIGHT_HOSTS",
    "Allowed",
    "Decision",
    "HostPolicy",
    "Refused",
    "Target",
    "parse_target",
]

#: What an entry without a port allows: http's and https's.
DEFAULT_PORTS: Tuple[int, ...] = (80, 443)

#: Where hubconfs keep their weights: what a worker may have downloaded where the caller says nothing. Each is there for
#: what is known to use it. On github.com, huggingface.co, zenodo.org and storage.googleapis.com anybody can publish:
#: this list bounds which servers are asked, and not whose bytes come.
WEIGHT_HOSTS: Tuple[str, ...] = (
    "download.pytorch.org",  # torchvision, torchaudio, PyTorch's own tutorials
    "github.com",  # releases: yolov5, MiDaS, timm, open-unmix; they redirect to the next
    "*.githubusercontent.com",  # releases' assets, raw files, LFS
    "codeload.github.com",  # archives of a repo
    "huggingface.co",  # transformers, timm, pyannote; it redirects to the next two
    "*.huggingface.co",  # cdn-lfs
    "*.hf.co",  # cdn-lfs, and Xet's bridges
    "dl.fbaipublicfiles.com",  # DINO, DINOv2, DETR, fairseq, PyTorchVideo, the GAN zoo
    "storage.googleapis.com",  # ViT, Mixer, BiT and other releases of Google's
    "zenodo.org",  # open-unmix, PANNs, and papers' weights in general
    "models.silero.ai",  # silero-models
    "*.ngc.nvidia.com",  # NVIDIA's DeepLearningExamples: api, files, xfiles
    "openaipublic.azureedge.net",  # CLIP, Whisper
    "data.lip6.fr",  # pretrained-models.pytorch
)

# Stands for every port in an entry.
_ANY_PORT = 0
# RFC 1035, 2.3.4: 255 octets on the wire are 253 characters.
_NAME_LIMIT_CHARS = 253
# An underscore is in no host name of RFC 1123, but it is in real names of buckets, and means one thing everywhere.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_IPV4 = re.compile(r"(?:0|[1-9][0-9]{0,2})(?:\.(?:0|[1-9][0-9]{0,2})){3}")
_IPV6 = re.compile(r"[0-9a-fA-F:.]{2,45}")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
# IDNA 2003 and 2008 make different names of these (RFC 5894, 7.2), and nobody sees which was meant.
_DEVIATIONS = frozenset("\u00df\u03c2\u200c\u200d")
# As `isohub.errors.printable` escapes them.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SHOWN_CHARS = 100
_STAR = "a * stands in front of a dot, or for the port, and nowhere else"
_FORMS = "expected host, host:port, host:*, *.host, or an address such as 10.0.0.7, fd00::7 or [fd00::7]:8080"


@dataclass(frozen=True)
class Target:
    """Where a connection would go, in the one form.

    Attributes:
        host: A name in A-labels, or an address without brackets.
        port: 1 to 65535.
    """

    host: str
    port: int

    @property
    def is_address(self) -> bool:
        """Whether it is no name, so that nobody is to be asked for its address."""
        return ":" in self.host or _IPV4.fullmatch(self.host) is not None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Allowed:
    """It may be dialled, under this very host.

    Attributes:
        target: Where to.
        by: The entry that says so.
    """

    target: Target
    by: str


@dataclass(frozen=True)
class Refused:
    """It may not be dialled.

    Attributes:
        reason: Why, safe to show.
        hint: What helps, or None.
    """

    reason: str
    hint: Optional[str] = None


Decision = Union[Allowed, Refused]


@dataclass(frozen=True)
class _Entry:
    text: str
    host: str
    port: Optional[int]
    below: bool

    def names(self, target: Target) -> bool:
        if self.port != _ANY_PORT and target.port not in (DEFAULT_PORTS if self.port is None else (self.port,)):
            return False
        if self.below:
            return not target.is_address and target.host.endswith("." + self.host)
        return target.host == self.host


@dataclass(frozen=True)
class HostPolicy:
    """What may be dialled.

    Args:
        entries: In the forms above; none allows nothing.

    Raises:
        PolicyError: An entry is in none of the forms.
        TypeError: The entries are no tuple of str.
    """

    entries: Tuple[str, ...] = ()
    _parsed: Tuple[_Entry, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: object = self.entries
        if not isinstance(given, tuple) or not all(isinstance(entry, str) for entry in given):
            raise TypeError(f"expected a tuple of str, got {printable(repr(given), limit_chars=_SHOWN_CHARS)}")
        object.__setattr__(self, "_parsed", tuple(_parse_entry(entry) for entry in self.entries))

    def decide(self, target: Target) -> Decision:
        """Whether a target is named. Where a name leads is for `decide_address`."""
        for entry in self._parsed:
            if entry.names(target):
                return Allowed(target, entry.text)
        ports = " and ".join(str(port) for port in DEFAULT_PORTS)
        reason = f"{_shown_target(target)} is not named by the network policy"
        if any(entry.names(Target(target.host, port)) for entry in self._parsed for port in DEFAULT_PORTS):
            reason = f"the network policy names {target.host} for the ports {ports}, not for {target.port}"
        return Refused(reason, _network_hint(target))

    def decide_address(self, target: Target, address: str) -> Decision:
        """Whether a target may be dialled at an address that its name was resolved to.

        Args:
            target: What `decide` allowed.
            address: As getaddrinfo writes it. Trust: the network.
        """
        try:
            parsed = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return Refused(f"{_shown_target(target)} leads to {_quoted(address)}, which is no address")
        plain = unmapped(parsed)
        kind = special_kind(parsed)
        place = Target(str(plain), target.port)
        if kind is None:
            return Allowed(place, str(plain))
        for entry in self._parsed:
            if not entry.below and entry.names(place):
                return Allowed(place, entry.text)
        if target.host == place.host:
            return Refused(f"{place} is not named by the network policy", _network_hint(place))
        return Refused(
            f"{_shown_target(target)} leads to {place.host}, a {kind} address, which only its own number allows",
            f"name the address itself, if that is meant: {_network_text(place)}",
        )


def parse_target(authority: str, default_port: Optional[int] = None) -> Union[Target, Refused]:
    """What a URL or a CONNECT names, if it can be read in one way only.

    Args:
        authority: ``host``, ``host:port`` or ``[address]:port``, all ASCII. Trust: a worker or the network.
        default_port: Where none is written; None asks for one.
    """
    try:
        if not authority.isascii():
            raise PolicyError(f"{_quoted(authority)} is no host: it is not ASCII; expected A-labels (xn--...)")
        host, port = _split(authority, bare_ipv6=False)
        if port is None:
            port = default_port
        if port is None:
            raise PolicyError(f"{_quoted(authority)} has no port; expected host:port")
        return Target(host, port)
    except PolicyError as error:
        return Refused(error.message)


@functools.lru_cache(maxsize=1024)  # each load asks for the well-known hosts
def _parse_entry(text: str) -> _Entry:
    below = text.startswith("*.")
    rest = text[2:] if below else text
    if "*" in (rest[:-2] if rest.endswith(":*") else rest):
        raise _problem(text, _STAR)
    if rest.endswith(":*"):
        host, port = _split(rest[:-2], bare_ipv6=False, written=text)
        if port is not None:
            raise _problem(text, "it has two ports")
        port = _ANY_PORT
    else:
        host, port = _split(rest, bare_ipv6=True, written=text)
    if below and Target(host, 1).is_address:
        raise _problem(text, "an address has no names below it")
    if below and "." not in host:
        raise _problem(text, "it would allow a whole top-level domain")
    return _Entry(text, host, port, below)


def _split(text: str, *, bare_ipv6: bool, written: Optional[str] = None) -> Tuple[str, Optional[int]]:
    """Host in the one form, and port."""
    written = text if written is None else written
    if not text:
        raise _problem(written, "it is empty")
    for char in text:
        if char.isspace() or (unicodedata.category(char) in _HIDDEN_CATEGORIES and char not in _DEVIATIONS):
            raise _problem(written, f"it holds the character {char!a}")
        if char in "/\\?#":
            raise _problem(written, "it is more than a host, which has no scheme and no path")
        if char == "@":
            raise _problem(written, "it holds a user name")
        if char == "%":
            raise _problem(written, "it holds a percent escape or a zone")
        if char == "*":
            raise _problem(written, _STAR)
    if text.startswith("["):
        inner, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise _problem(written, "its brackets are not closed before the port")
        return _ipv6(inner, written), _port(rest[1:], written) if rest else None
    if text.count(":") > 1:
        if not bare_ipv6:
            raise _problem(written, "an IPv6 address stands in brackets")
        return _ipv6(text, written), None
    host, colon, port = text.partition(":")
    return _name(host, written), _port(port, written) if colon else None


def _port(text: str, written: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise _problem(written, f"{_quoted(text)} is no port of 1 to 65535")
    return int(text)


def _ipv6(text: str, written: str) -> str:
    tail = text.rpartition(":")[2]
    if not _IPV6.fullmatch(text) or ("." in text and not _IPV4.fullmatch(tail)):
        raise _problem(written, "it is no IPv6 address")
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise _problem(written, "it is no IPv6 address") from None
    plain = unmapped(address)
    if plain != address:
        raise _problem(written, f"it is {plain} in another form; write that")
    return str(address)


def _name(text: str, written: str) -> str:
    host = (text if text.isascii() else _a_labels(text, written)).lower()
    if not host:
        raise _problem(written, "it has no host")
    if len(host) > _NAME_LIMIT_CHARS:
        raise _problem(written, f"a name has at most {_NAME_LIMIT_CHARS} characters")
    if host.endswith("."):
        raise _problem(written, "it ends with a dot")
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        if not _IPV4.fullmatch(host):
            raise _problem(written, "it ends in a number and is no IPv4 address of four decimal numbers")
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise _problem(written, "it is no IPv4 address") from None
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise _problem(
                written, f"{_quoted(label)} is no part of a name: letters, digits and hyphens within, at most 63"
            )
        if label.startswith("xn--") and not _is_a_label(label):
            raise _problem(written, f"{_quoted(label)} is no encoded label of IDNA")
    return host


def _is_a_label(label: str) -> bool:
    try:
        decoded = label[4:].encode("ascii").decode("punycode")
        again = decoded.encode("punycode").decode("ascii")
    except (UnicodeError, ValueError, OverflowError):
        return False
    hidden = any(unicodedata.category(char) in _HIDDEN_CATEGORIES for char in decoded)
    return not decoded.isascii() and not hidden and again.lower() == label[4:]


def _is_of_a_name(char: str) -> bool:
    # Letters and their marks. IDNA's other full stops, other scripts' digits and symbols are what its versions, or
    # those who implement them, read in different ways.
    return char.isascii() or unicodedata.category(char)[0] in "LM"


def _a_labels(text: str, written: str) -> str:
    problem = _problem(written, "it is no name of IDNA, or one that is read in two ways; write its A-labels (xn--...)")
    composed = unicodedata.normalize("NFC", text)
    if _DEVIATIONS & set(composed) or not all(map(_is_of_a_name, composed)):
        raise problem
    labels = []
    for label in composed.split("."):
        try:
            encoded = encodings.idna.ToASCII(label).decode("ascii").lower()
            decoded = encodings.idna.ToUnicode(encoded)
        except UnicodeError:
            raise problem from None
        # What maps to something that looks like other text (full-width letters and the like) is not taken.
        if unicodedata.normalize("NFC", label.lower()) != decoded:
            raise problem
        labels.append(encoded)
    return ".".join(labels)


def _problem(written: str, what: str) -> PolicyError:
    return PolicyError(f"{_quoted(written)} is no host of a network policy: {what}; {_FORMS}")


def _quoted(text: str) -> str:
    return repr(printable(text, limit_chars=_SHOWN_CHARS, newlines=False))


def _shown_target(target: Target) -> str:
    return target.host if target.port in DEFAULT_PORTS else str(target)


def _network_text(target: Target) -> str:
    return f"isohub.Sandbox(network=[{_shown_target(target)!r}])"


def _network_hint(target: Target) -> str:
    return f"if this repo may have it: {_network_text(target)}"
