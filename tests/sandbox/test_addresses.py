"""What an address is, held against the registry and against what the standard library says of it."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isohub.sandbox.addresses import special_kind, unmapped


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("0.0.0.0/8", "unspecified"), ("10.0.0.0/8", "private"), ("100.64.0.0/10", "shared"), ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"), ("172.16.0.0/12", "private"), ("192.0.2.0/24", "documentation"),
        ("192.168.0.0/16", "private"), ("198.18.0.0/15", "benchmarking"), ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"), ("fc00::/7", "private"), ("fe80::/10", "link-local"), ("ff00::/8", "multicast"),
        ("2001:db8::/32", "documentation"), ("64:ff9b:1::/48", "reserved"), ("100::/64", "reserved"), ("5f00::/16", "reserved"),
    ],
)  # fmt: skip
def test_a_network_from_its_first_address_to_its_last(network, kind):
    parsed = ipaddress.ip_network(network)
    assert special_kind(parsed[0]) == special_kind(parsed[-1]) == kind
    for outside in (int(parsed[0]) - 1, int(parsed[-1]) + 1):
        if parsed.version == 4 and 0 < outside < 1 << 32:
            address = ipaddress.IPv4Address(outside)
            assert (special_kind(address) is None) == (address.is_global and not address.is_multicast)


@given(st.ip_addresses())
def test_what_the_standard_library_calls_global_may_be_refused_and_never_the_other_way(address):
    plain = unmapped(address)
    if special_kind(address) is None:
        assert not (
            plain.is_loopback or plain.is_link_local or plain.is_multicast or plain.is_unspecified or plain.is_private
        )


@given(st.ip_addresses(v=4))
def test_what_is_embedded_counts_as_what_it_is(address):
    number = int(address)
    for high in (0xFFFF << 32, 0x0064_FF9B << 96):
        assert special_kind(ipaddress.IPv6Address(high | number)) == special_kind(address)
    if (kind := special_kind(address)) is not None:
        assert special_kind(ipaddress.IPv6Address(0x2002 << 112 | number << 80)) == kind
        assert special_kind(ipaddress.IPv6Address(0x20010000 << 96 | number << 64)) == kind
        assert special_kind(ipaddress.IPv6Address(0x20010000 << 96 | 0x08080808 << 64 | number ^ 0xFFFFFFFF)) == kind


def test_a_mapped_address_is_the_one_that_is_dialled():
    assert unmapped(ipaddress.ip_address("::ffff:10.0.0.1")) == ipaddress.ip_address("10.0.0.1")
    assert unmapped(ipaddress.ip_address("::1")) == ipaddress.ip_address("::1")
