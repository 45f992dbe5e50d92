"""What an IP address is: a public host's, or one of the kinds that no public host has.

The tables are written down here, for what `ipaddress` calls private or global differs between Pythons. What an
IPv6 address leads on to (mapped, NAT64, 6to4, Teredo, ISATAP) counts as if it were dialled itself.

Pure. Which side: both; it runs on Python 3.8. Trust: addresses are the network's.

Source: the IANA registries of special-purpose addresses (RFC 6890); RFC 4291, 2.5.5.2 (mapped), 6052 (NAT64),
3056 (6to4), 4380 (Teredo), 5214 (ISATAP); the clouds' own documentation of their metadata services.
"""

from __future__ import annotations

import ipaddress
from typing import Iterator, Optional, Union

__all__ = ["Address", "special_kind", "unmapped"]

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

# Not all are link-local or private: Azure's is a public address.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23",  # AWS, and most others
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure
        "192.0.0.192",  # Oracle
        "fd20:ce::254",  # Google
    )
)  # fmt: skip
_IPV4_KINDS = tuple(
    (ipaddress.IPv4Network(network), kind)
    for network, kind in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "reserved"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_IPV6_KINDS = tuple(
    (ipaddress.IPv6Network(network), kind)
    for network, kind in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "private"),
        ("ff00::/8", "multicast"),
        ("2001::/23", "reserved"),
        ("2001:db8::/32", "documentation"),
        ("3fff::/20", "documentation"),
    )
)
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4 = ipaddress.IPv6Network("2002::/16")
_TEREDO = ipaddress.IPv6Network("2001::/32")
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})
_LOW_32 = 0xFFFFFFFF


def special_kind(address: Address) -> Optional[str]:
    """What keeps an address from being a public host's, in a word; None for a public one.

    Args:
        address: Trust: the network.
    """
    if address in _METADATA:
        return "cloud metadata"
    if isinstance(address, ipaddress.IPv4Address):
        return next((kind for network, kind in _IPV4_KINDS if address in network), None)
    embedded = [kind for kind in map(special_kind, _embedded(address)) if kind is not None]
    if embedded:
        return embedded[0]
    if address in _MAPPED or address in _NAT64 or address in _TEREDO:
        return None  # as public as what is in it
    kind = next((kind for network, kind in _IPV6_KINDS if address in network), None)
    return kind or (None if address in _GLOBAL_IPV6 else "reserved")


def unmapped(address: Address) -> Address:
    """The address that the kernel dials: of ``::ffff:10.0.0.1`` it is 10.0.0.1."""
    if isinstance(address, ipaddress.IPv6Address) and address in _MAPPED:
        return ipaddress.IPv4Address(int(address) & _LOW_32)
    return address


def _embedded(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 one leads on to."""
    number = int(address)
    if address in _MAPPED or address in _NAT64:
        yield ipaddress.IPv4Address(number & _LOW_32)
    elif address in _6TO4:
        yield ipaddress.IPv4Address(number >> 80 & _LOW_32)
    elif address in _TEREDO:
        yield ipaddress.IPv4Address(number >> 64 & _LOW_32)
        yield ipaddress.IPv4Address(number & _LOW_32 ^ _LOW_32)
    if number >> 32 & _LOW_32 in _ISATAP:
        yield ipaddress.IPv4Address(number & _LOW_32)
