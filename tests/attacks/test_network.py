"""C20, C21: what a worker reaches by sockets: nobody but itself, and by the caller's proxy whom the policy names."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

import isohub
from isohub import errors
from tests.attacks import acts
from tests.attacks.acts import DONE
from tests.conftest import eventually
from tests.servers.files import FileServer

HUBS = Path(__file__).parents[1] / "hubs"
#: Every address family of Linux 6.18: AF_MAX is 46.
FAMILIES = range(1, 47)
KINDS = {"stream": 1, "datagram": 2, "raw": 3, "seqpacket": 5, "packet": 10}


class Listener:
    """What comes to one port of loopback by TCP and UDP, and to Unix sockets beside each other."""

    def __init__(self, directory: Path) -> None:
        self.heard: list[bytes] = []
        self._ends = contextlib.ExitStack()
        self._stop = threading.Event()
        stream = self._ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = stream.getsockname()[1]
        datagram = self._ends.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagram.bind(("127.0.0.1", self.port))
        self.path, self.datagram_path = str(directory / "stream"), str(directory / "datagram")
        self.name, self.datagram_name = f"\0isohub-{os.getpid()}-s", f"\0isohub-{os.getpid()}-d"
        ends = [stream, datagram]
        for address, kind in (
            (self.path, socket.SOCK_STREAM),
            (self.name, socket.SOCK_STREAM),
            (self.datagram_path, socket.SOCK_DGRAM),
            (self.datagram_name, socket.SOCK_DGRAM),
        ):
            end = self._ends.enter_context(socket.socket(socket.AF_UNIX, kind))
            end.bind(address)
            if kind == socket.SOCK_STREAM:
                end.listen(16)
            ends.append(end)
        self._threads = [threading.Thread(target=self._hear, args=[end], daemon=True) for end in ends]
        for thread in self._threads:
            thread.start()

    def _hear(self, end: socket.socket) -> None:
        end.settimeout(0.05)
        while not self._stop.is_set():
            try:
                if end.type == socket.SOCK_DGRAM:
                    self.heard.append(end.recv(1000))
                else:
                    connection, _ = end.accept()
                    with connection:
                        connection.settimeout(1)
                        self.heard.append(connection.recv(1000))
            except OSError:
                pass

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._ends.close()


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    made = Listener(tmp_path_factory.mktemp("sockets"))
    yield made
    made.close()


@pytest.fixture
def heard(listener):
    listener.heard.clear()
    return listener.heard


WAYS = {
    "tcp": (acts.tcp, "port"),
    "tcp by number": (acts.connect_by_number, "port"),
    "mptcp": (acts.mptcp, "port"),
    "udp": (acts.udp, "port"),
    "a question to a name server": (acts.ask_a_name_server, "port"),
    "a path": (acts.connect_to_a_path, "path"),
    "an abstract name": (acts.connect_to_a_path, "name"),
    "a datagram to a path": (acts.send_to_a_path, "datagram_path"),
    "a datagram to an abstract name": (acts.send_to_a_path, "datagram_name"),
    "from a pair to a path": (acts.send_to_a_path_from_a_pair, "datagram_path"),
    "from a pair to an abstract name": (acts.send_to_a_path_from_a_pair, "datagram_name"),
    "a pair that connects to a path": (acts.connect_a_pair_to_a_path, "datagram_path"),
    "a pair that connects to an abstract name": (acts.connect_a_pair_to_a_path, "datagram_name"),
}


@pytest.mark.parametrize("way", WAYS)
def test_c20_no_word_reaches_a_socket_of_the_callers(jail, listener, heard, way):
    act, target = WAYS[way]
    assert jail.attempt(act, getattr(listener, target)) != DONE
    assert heard == []
    # The control.
    outcome = acts.attempt(None, act, getattr(listener, target))
    if act is acts.mptcp and outcome in ("EPROTONOSUPPORT", "ENOPROTOOPT"):
        pytest.skip("this kernel has no MPTCP")
    assert outcome == DONE
    assert eventually(lambda: len(heard) == 1)


def test_c20_no_family_of_sockets_but_its_own(jail):
    """Netlink, packet, vsock, kernel crypto and all others; Unix ones within what is its own."""
    allowed = [(socket.AF_UNIX, kind) for kind in (1, 2, 3, 5)] if jail.namespaced else []
    every = [(family, kind) for family in FAMILIES for kind in KINDS.values()]

    def done(outcomes):
        return [which for which, outcome in zip(every, outcomes, strict=True) if outcome == DONE]

    assert done(jail.attempts(acts.make_socket, every)) == allowed
    here = {family for family, _ in done(acts.attempts(None, acts.make_socket, every))}
    assert {socket.AF_UNIX, socket.AF_INET, socket.AF_NETLINK} <= here  # the control
    if os.geteuid() == 0:
        assert acts.attempt(None, acts.make_socket, socket.AF_INET, socket.SOCK_RAW, 1) == DONE


def test_c20_no_protocol_of_the_internet(jail):
    every = [
        (family | high, kind | high, protocol)
        for family in (socket.AF_INET, socket.AF_INET6)
        for kind in KINDS.values()
        for protocol in (0, 1, 6, 17, 58, 132, 136, 255, 262)
        for high in (0, 1 << 32)  # which the kernel does not look at
    ]
    assert set(jail.attempts(acts.make_socket, every)) == {"EPERM"}
    assert DONE in acts.attempts(None, acts.make_socket, every)  # the control


def test_c20_no_io_uring(jail):
    assert jail.attempt(acts.io_uring) == "EPERM"
    outcome = acts.attempt(None, acts.io_uring)
    if outcome != DONE:
        pytest.skip(f"nor has anybody else here: {outcome}")


def test_c20_nor_to_what_clouds_tell_their_machines(jail):
    for host in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200"):
        assert jail.attempt(acts.tcp, 80, host) != DONE
    # The control is `tcp` above: there is no such server here.


def test_c20_no_names_are_looked_up(jail):
    def look(module):
        import socket as remote_socket

        try:
            return remote_socket.getaddrinfo("example.org", 443) != []
        except OSError:
            return False

    assert jail.handle.run(look) is False
    # The control is the question to a name server above: where tests run there may be none.


def test_c20_a_hubconf_tells_nobody_as_it_is_imported(jail, free, listener, heard, tmp_path):
    repo = tmp_path / "opens_socket"
    shutil.copytree(HUBS / "opens_socket", repo)
    (repo / "port").write_text(str(listener.port))
    assert jail.session.load(repo, "told") == []
    assert heard == []
    assert free.session.load(repo, "told", trust_repo=True) == ["tcp", "udp"]  # the control
    assert eventually(lambda: len(heard) == 2)


def test_c20_a_workers_own_pairs_and_pipes_work(jail):
    def talk(module):
        import socket as remote_socket

        one, other = remote_socket.socketpair()
        one.sendall(b"x")
        return other.recv(1)

    assert jail.handle.run(talk) == b"x"


def test_c20_a_trusted_repo_may_have_the_callers_network(tmp_path, listener, heard, hub):
    wanted = isohub.Sandbox(network="open")
    with isohub.Session(tmp_path, timeout_s=60, sandbox=wanted) as own:
        with pytest.raises(errors.UntrustedRepoError):
            own.load(hub("good"), "mlp")
        with own.load(hub("good"), "mlp", trust_repo=True) as handle:
            assert handle.run(acts.attempt, acts.tcp, listener.port) == DONE
            assert eventually(lambda: len(heard) == 1)
            # And no more than that.
            assert handle.run(acts.attempt, acts.make_socket, socket.AF_NETLINK, 3) == "EPERM"
            assert handle.run(acts.attempt, acts.make_socket, socket.AF_INET, 3, 1) == "EPERM"
            assert handle.run(acts.attempt, acts.read, str(Path.home() / ".bashrc")) != DONE
            if "namespaces" in handle.confinement.active:
                assert handle.run(acts.attempt, acts.connect_to_a_path, listener.path) != DONE
                assert handle.run(acts.attempt, acts.connect_to_a_path, listener.name) != DONE


# C21: hosts by name.


def _fetch(module, url):
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return str(error)


def test_c21_only_the_named_host_and_port_are_reached(whole, hub, listener, heard):
    with FileServer() as named, FileServer() as other:
        for server in (named, other):
            server.add("/x", b"here")
        wanted = isohub.Sandbox(network=[named.host])
        with whole.load(hub("good"), "mlp", sandbox=wanted) as handle:
            assert handle.run(_fetch, f"{named.url}/x") == b"here"  # the control
            assert len(named.requests) == 1
            for url in (
                f"{other.url}/x",
                f"http://127.0.0.2:{named.host.split(':')[1]}/x",
                f"http://localhost:{named.host.split(':')[1]}/x",
                f"http://user@{other.host}/x",
                f"http://{named.host}@{other.host}/x",
                "http://169.254.169.254/latest/meta-data/",
            ):
                assert handle.run(_fetch, url) != b"here", url
            # Past the proxy there is nothing: its loopback is not the caller's.
            port = int(named.host.split(":")[1])
            for act in (acts.tcp, acts.connect_by_number):
                assert handle.run(acts.attempt, act, port) in ("EACCES", "ECONNREFUSED")
                assert acts.attempt(None, act, port) == DONE
            for act in (acts.udp, acts.mptcp, acts.ask_a_name_server):
                assert handle.run(acts.attempt, act, listener.port) == "EPERM"
            for way in ("path", "name"):
                assert handle.run(acts.attempt, acts.connect_to_a_path, getattr(listener, way)) != DONE
        assert other.requests == []
        assert heard == []


def test_c21_another_workers_proxy_is_out_of_reach(whole, hub):
    """Each has a network namespace of its own."""
    with FileServer() as server:
        server.add("/x", b"here")
        wanted = isohub.Sandbox(network=[server.host])
        with whole.load(hub("good"), "mlp", sandbox=wanted) as one, whole.load(hub("edits_sys_path"), "model") as two:
            port = one.run(lambda module: int(os.environ["HTTP_PROXY"].rsplit(":", 1)[1].strip("/")))
            assert one.run(acts.attempt, acts.tcp, port) == DONE  # the control
            assert two.run(acts.attempt, acts.tcp, port) != DONE
            assert "HTTP_PROXY" not in two.run(lambda module: dict(os.environ))
            assert acts.attempt(None, acts.tcp, port) != DONE


def test_c21_without_a_network_namespace_there_is_no_proxy(jail, hub, listener):
    wanted = isohub.Sandbox(network=[f"127.0.0.1:{listener.port}"])
    if jail.namespaced:
        with jail.session.load(hub("good"), "mlp", sandbox=wanted) as handle:
            assert handle.confinement.active  # the control
        return
    for trust_repo in (False, True):
        with pytest.raises(errors.ConfinementError, match="needs namespaces"):
            jail.session.load(hub("edits_sys_path"), "model", sandbox=wanted, trust_repo=trust_repo)
