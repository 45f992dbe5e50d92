"""What a policy may say, and what it decides. The parser is held against forms that others read in other ways."""

from __future__ import annotations

import dataclasses
import ipaddress
import pickle
import socket
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isohub.errors import PolicyError
from isohub.sandbox.hosts import WEIGHT_HOSTS, Allowed, HostPolicy, Refused, Target, parse_target

LABELS = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=20).filter(
    lambda text: not text[0].isdigit()
)
NAMES = st.lists(LABELS, min_size=2, max_size=4).map(".".join)
PORTS = st.integers(1, 65535)


def allowed(policy: HostPolicy, authority: str, default_port: int | None = 443) -> bool:
    target = parse_target(authority, default_port)
    assert isinstance(target, Target), target
    return isinstance(policy.decide(target), Allowed)


@pytest.mark.parametrize(
    ("entry", "yes", "no"),
    [
        ("a.example", ["a.example", "A.EXAMPLE", "a.example:80", "a.example:443"], ["b.a.example", "xa.example", "a.example:8080", "example"]),
        ("a.example:8080", ["a.example:8080"], ["a.example", "a.example:80", "b.a.example:8080"]),
        ("A.Example", ["a.example"], ["b.example"]),
        ("*.a.example", ["b.a.example", "c.b.a.example:80"], ["a.example", "xa.example", "a.example.b", "b.a.example:81"]),
        ("*.a.example:81", ["b.a.example:81"], ["b.a.example", "a.example:81"]),
        ("10.0.0.7", ["10.0.0.7", "10.0.0.7:80"], ["10.0.0.8", "10.0.0.7:81"]),
        ("10.0.0.7:81", ["10.0.0.7:81"], ["10.0.0.7"]),
        ("fd00::7", ["[fd00::7]", "[FD00:0:0::7]:80"], ["[fd00::8]", "[fd00::7]:81"]),
        ("[fd00::7]", ["[fd00::7]"], ["[fd00::8]"]),
        ("[fd00:0::7]:81", ["[fd00::7]:81"], ["[fd00::7]"]),
        ("b\u00fccher.example", ["xn--bcher-kva.example"], ["bcher.example", "bucher.example"]),
        ("B\u00dcCHER.example", ["xn--bcher-kva.example"], ["bucher.example"]),
        ("xn--bcher-kva.example", ["XN--BCHER-KVA.example"], ["bucher.example"]),
        ("my_bucket.example", ["my_bucket.example"], ["mybucket.example"]),
        ("localhost", ["localhost:80"], ["localhost:8080"]),
    ],
)  # fmt: skip
def test_an_entry_names_what_it_says_and_nothing_else(entry, yes, no):
    policy = HostPolicy((entry,))
    assert all(allowed(policy, authority) for authority in yes)
    assert not any(allowed(policy, authority) for authority in no)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("", "empty"),
        ("*", "\\*"),
        ("*.", "empty"),
        ("**.a.example", "\\*"),
        ("a.*.example", "\\*"),
        ("*a.example", "\\*"),
        ("*.*.example", "\\*"),
        ("a.example:*", "\\*"),
        ("*.com", "top-level"),
        ("*.10.0.0.7", "address"),
        ("*.[fd00::7]", "address"),
        ("*.fd00::7", "address"),
        ("https://a.example", "scheme"),
        ("//a.example", "scheme"),
        ("a.example/path", "path"),
        ("a.example\\b", "path"),
        ("a.example?", "path"),
        ("a.example#", "path"),
        ("user@a.example", "user name"),
        ("user:pass@a.example", "user name"),
        (" a.example", "character"),
        ("a.example ", "character"),
        ("a.example\n", "character"),
        ("a\0.example", "character"),
        ("a\x7f.example", "character"),
        ("a\u202e.example", "character"),
        ("a\u00ad.example", "character"),
        ("a\u3000.example", "character"),
        ("a\ud800.example", "character"),
        ("a.example.", "dot"),
        ("a.example.:80", "dot"),
        (".a.example", "part of a name"),
        ("a..example", "part of a name"),
        (".", "dot"),
        ("-a.example", "part of a name"),
        ("a-.example", "part of a name"),
        ("a,b.example", "part of a name"),
        ("a.example:", "port"),
        (":80", "no host"),
        ("a.example:0", "port"),
        ("a.example:080", "port"),
        ("a.example:65536", "port"),
        ("a.example:+80", "port"),
        ("a.example:8_0", "port"),
        ("a.example:\u0668\u0660", "port"),
        ("x" * 64 + ".example", "part of a name"),
        ("a." * 126 + "ab", "253"),
        ("0x7f.1", "ends in a number"),
        ("0x7f000001", "ends in a number"),
        ("2130706433", "ends in a number"),
        ("127.1", "ends in a number"),
        ("127.0.1", "ends in a number"),
        ("0177.0.0.1", "ends in a number"),
        ("127.0.0.01", "ends in a number"),
        ("127.0.0.0x1", "ends in a number"),
        ("1.2.3.4.5", "ends in a number"),
        ("256.0.0.1", "IPv4"),
        ("127.0.0.1.", "dot"),
        ("a.0x", "ends in a number"),
        ("%61.example", "percent"),
        ("fe80::1%eth0", "percent"),
        ("[fe80::1%25eth0]", "percent"),
        ("[fd00::7", "brackets"),
        ("[fd00::7]x", "brackets"),
        ("[fd00::7]:", "port"),
        ("[10.0.0.7]", "IPv6"),
        ("[a.example]", "IPv6"),
        ("[]", "IPv6"),
        ("fd00::7::", "IPv6"),
        ("fd00:::7", "IPv6"),
        ("::ffff:10.0.0.7", "10.0.0.7 in another form"),
        ("::ffff:a00:7", "10.0.0.7 in another form"),
        ("64:ff9b::10.0.0.07", "IPv6"),
        ("1:2:3", "IPv6"),
        ("a.example:80:81", "IPv6"),
        ("stra\u00dfe.example", "IDNA"),
        ("\u03c2.example", "IDNA"),
        ("a\u200d.example", "IDNA"),
        ("\uff41.example", "IDNA"),
        ("a\u3002example", "IDNA"),
        ("\u2460.example", "IDNA"),
        ("\u0661.example", "IDNA"),
        ("127.0.0.\u0661", "IDNA"),
        ("xn--.example", "part of a name"),
        ("xn--a.example", "IDNA"),
        ("xn--bcher-.example", "part of a name"),
        ("xn--99999999.example", "IDNA"),
    ],
)  # fmt: skip
def test_everything_else_is_an_error_that_says_why(entry, why):
    with pytest.raises(PolicyError, match=why) as caught:
        HostPolicy(("a.example", entry))
    assert "expected host" in str(caught.value)
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


@pytest.mark.parametrize("entries", ["a.example", ["a.example"], (b"a.example",), None, ("a.example", 1)])
def test_a_policy_is_a_tuple_of_str(entries):
    with pytest.raises(TypeError, match="tuple of str"):
        HostPolicy(entries)


def test_an_empty_policy_allows_nothing():
    for authority in ("a.example", "127.0.0.1", "[::1]", "github.com"):
        assert not allowed(HostPolicy(()), authority)
    assert allowed(HostPolicy(("a.example",)), "a.example")  # the control


def test_a_policy_is_a_value():
    policy = HostPolicy(("a.example", "*.b.example"))
    assert policy == HostPolicy(("a.example", "*.b.example"))
    assert hash(policy) == hash(HostPolicy(("a.example", "*.b.example")))
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.entries = ()


def test_a_refusal_says_what_would_help():
    refused = HostPolicy(("a.example",)).decide(Target("b.example", 443))
    assert isinstance(refused, Refused)
    assert "b.example is not named" in refused.reason
    assert "isohub.Sandbox(network=['b.example'])" in (refused.hint or "")
    port = HostPolicy(("a.example",)).decide(Target("a.example", 8080))
    assert isinstance(port, Refused)
    assert "80 and 443, not for 8080" in port.reason
    assert "isohub.Sandbox(network=['a.example:8080'])" in (port.hint or "")
    assert allowed(HostPolicy(("a.example:8080",)), "a.example:8080")  # the control: what the hint says


@pytest.mark.parametrize(
    "authority",
    [
        "", ":443", "a.example:", "a.example.", "a.example:0", "a.example:99999", "a.example:443:443", "user@a.example",
        "a.example@127.0.0.1", "a.example#@127.0.0.1", "a.example\\@127.0.0.1", "a.example/", " a.example", "a.example\t",
        "a.example\r\nHost: b", "a.example\0.b.example", "*.example", "0x7f.1", "2130706433", "127.1", "0177.0.0.1", "fd00::7",
        "[::ffff:127.0.0.1]", "[::1%25lo]", "[::1", "::1]", "b\u00fccher.example", "a\uff0eexample", "%6c%6fcalhost", "a..b",
    ],
)  # fmt: skip
def test_a_target_that_reads_in_two_ways_is_refused(authority):
    assert isinstance(parse_target(authority, 443), Refused)


def test_a_target_needs_a_port_where_none_is_the_default():
    assert parse_target("a.example:443") == Target("a.example", 443)
    assert isinstance(parse_target("a.example"), Refused)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"), ("127.255.255.254", "loopback"), ("::1", "loopback"),
        ("0.0.0.0", "unspecified"), ("0.1.2.3", "unspecified"), ("::", "unspecified"),
        ("10.0.0.1", "private"), ("172.16.0.1", "private"), ("172.31.255.255", "private"), ("192.168.1.1", "private"),
        ("fd00::1", "private"), ("fc00::1", "private"), ("fec0::1", "private"),
        ("100.64.0.1", "shared"), ("100.127.255.255", "shared"),
        ("169.254.1.1", "link-local"), ("fe80::1", "link-local"), ("fe80::1%lo", "link-local"),
        ("169.254.169.254", "cloud metadata"), ("fd00:ec2::254", "cloud metadata"), ("168.63.129.16", "cloud metadata"),
        ("100.100.100.200", "cloud metadata"), ("192.0.0.192", "cloud metadata"), ("fd20:ce::254", "cloud metadata"),
        ("224.0.0.1", "multicast"), ("239.255.255.255", "multicast"), ("ff02::1", "multicast"),
        ("240.0.0.1", "reserved"), ("255.255.255.255", "reserved"), ("192.0.0.8", "reserved"), ("::2", "reserved"),
        ("4000::1", "reserved"), ("100::1", "reserved"), ("64:ff9b:1::1", "reserved"), ("2001:10::1", "reserved"),
        ("::127.0.0.1", "reserved"),
        ("192.0.2.1", "documentation"), ("198.51.100.1", "documentation"), ("203.0.113.1", "documentation"),
        ("2001:db8::1", "documentation"), ("3fff::1", "documentation"), ("198.18.0.1", "benchmarking"),
        ("::ffff:127.0.0.1", "loopback"), ("::ffff:10.0.0.1", "private"), ("::ffff:169.254.169.254", "cloud metadata"),
        ("64:ff9b::127.0.0.1", "loopback"), ("64:ff9b::10.0.0.1", "private"), ("64:ff9b::a9fe:a9fe", "cloud metadata"),
        ("2002:7f00:1::", "loopback"), ("2002:a00:1::1", "private"), ("2002:a9fe:a9fe::", "cloud metadata"),
        ("2001:0:7f00:1::", "loopback"), ("2001:0:808:808:0:0:80ff:fffe", "loopback"),
        ("2600::5efe:127.0.0.1", "loopback"), ("2600::200:5efe:10.0.0.1", "private"),
    ],
)  # fmt: skip
def test_what_no_public_host_has_is_refused_unless_it_is_named_itself(address, kind):
    target = Target("a.example", 443)
    refused = HostPolicy(("a.example",)).decide_address(target, address)
    assert isinstance(refused, Refused)
    assert f"a {kind} address" in refused.reason
    plain = address.partition("%")[0]
    if plain.startswith("::ffff:"):
        plain = plain.removeprefix("::ffff:")
    assert plain.partition(":")[0] in (refused.hint or "") or "::" in plain
    # The control: its own number allows it, and that is what is dialled.
    named = HostPolicy(("a.example", plain)).decide_address(target, address)
    assert isinstance(named, Allowed)
    assert named.target == Target(str(ipaddress.ip_address(plain)), 443)
    other = HostPolicy(("a.example", f"[{plain}]:81" if ":" in plain else f"{plain}:81"))
    assert isinstance(other.decide_address(target, address), Refused)  # for another port


@pytest.mark.parametrize(
    "address",
    ["140.82.121.3", "8.8.8.8", "172.32.0.1", "100.128.0.1", "192.0.1.1", "2606:50c0:8000::154", "64:ff9b::8.8.8.8", "2002:808:808::1",
     "::ffff:8.8.8.8", "2001:0:808:808:0:0:f7f7:f7f7", "2600::5efe:8.8.8.8"],
)  # fmt: skip
def test_public_addresses_are_allowed(address):
    decided = HostPolicy(("a.example",)).decide_address(Target("a.example", 443), address)
    assert isinstance(decided, Allowed)
    assert decided.target.port == 443


def test_a_name_that_leads_home_is_refused_even_if_it_is_named():
    policy = HostPolicy(("localhost", "a.example"))
    assert allowed(policy, "localhost")
    refused = policy.decide_address(Target("localhost", 80), "127.0.0.1")
    assert isinstance(refused, Refused)
    assert "isohub.Sandbox(network=['127.0.0.1'])" in (refused.hint or "")
    both = HostPolicy(("localhost", "127.0.0.1"))
    assert isinstance(both.decide_address(Target("localhost", 80), "127.0.0.1"), Allowed)


@pytest.mark.parametrize("address", ["", "localhost", "127.1", "1.2.3.4.5", "\x1b[2J"])
def test_what_is_no_address_is_refused(address):
    refused = HostPolicy(("a.example",)).decide_address(Target("a.example", 443), address)
    assert isinstance(refused, Refused)
    assert refused.reason.isprintable()


def test_the_list_of_weight_hosts_is_a_policy():
    policy = HostPolicy(WEIGHT_HOSTS)
    for host in (
        "download.pytorch.org",
        "github.com",
        "release-assets.githubusercontent.com",
        "cdn-lfs.hf.co",
        "huggingface.co",
    ):
        assert allowed(policy, host)
    for host in (
        "githubusercontent.com",
        "github.com.example.org",
        "evilhuggingface.co",
        "localhost",
        "127.0.0.1",
        "169.254.169.254",
    ):
        assert not allowed(policy, host)


@given(st.text(max_size=40))
@example("127.0.0.1")
@example("[::1]:1")
@example("\u212a.example")
def test_a_text_is_an_entry_in_the_one_form_or_an_error(text):
    try:
        HostPolicy((text,))
    except PolicyError as error:
        assert error.message.isprintable()
    else:
        assert text
        assert not any(char.isspace() or char in "/@%?#\\" for char in text)


@given(st.text(st.sampled_from("0123456789abcdefx.:[]*-%@/ "), max_size=30), st.sampled_from([None, 80]))
def test_a_target_is_in_the_one_form(text, default_port):
    """Whatever the parser takes, it writes so that it and others read it again as the same."""
    target = parse_target(text, default_port)
    if isinstance(target, Refused):
        assert target.reason.isprintable()
        return
    assert parse_target(str(target)) == target
    assert target.host == target.host.lower()
    assert target.host.isascii()
    assert 1 <= target.port <= 65535
    try:
        socket.inet_aton(target.host)  # which takes the octal, hexadecimal and short forms that resolvers take
    except OSError:
        pass
    else:
        assert target.is_address
    if target.is_address:
        assert str(ipaddress.ip_address(target.host)) == target.host
        assert allowed(HostPolicy((str(target),)), str(target))


@given(NAMES, NAMES, PORTS)
def test_a_name_allows_itself_alone(one, other, port):
    policy = HostPolicy((f"{one}:{port}",))
    assert allowed(policy, f"{one}:{port}")
    assert allowed(policy, f"{other}:{port}") == (one == other)


@given(NAMES, LABELS, PORTS)
def test_a_wildcard_allows_what_is_below_alone(name, label, port):
    policy = HostPolicy((f"*.{name}:{port}",))
    assert allowed(policy, f"{label}.{name}:{port}")
    assert not allowed(policy, f"{name}:{port}")
    assert not allowed(policy, f"{label}{name}:{port}")


@given(st.ip_addresses(), PORTS)
def test_every_address_is_public_or_needs_its_own_number(address, port):
    target = Target("a.example", port)
    policy = HostPolicy((f"a.example:{port}",))
    decided = policy.decide_address(target, str(address))
    plain = getattr(address, "ipv4_mapped", None) or address
    if isinstance(decided, Allowed):
        assert decided.target == Target(str(plain), port)
        assert not (plain.is_loopback or plain.is_link_local or plain.is_multicast or plain.is_unspecified)
    else:
        entry = f"[{plain}]:{port}" if plain.version == 6 else f"{plain}:{port}"
        assert isinstance(HostPolicy((f"a.example:{port}", entry)).decide_address(target, str(address)), Allowed)
