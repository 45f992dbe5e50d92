"""git's protocol over the system's ssh: the user's keys and settings stay with ssh, which asks nothing.

The program is ``ssh``, or what ``GIT_SSH_COMMAND`` or ``GIT_SSH`` of the environment say, as
for git; ``core.sshCommand`` of a repository is never read, since a repository must not choose
what runs here. An address is taken apart and judged first, because it may come from a
repository's ``.gitmodules``: no part of it can be read as an option or by a shell, on either
side. The program runs in a session of its own, so that it has no terminal to ask on, and it is
ended whatever happens. Reads only. Runs in the caller.

Source: gitprotocol-pack(5) (ssh transport), git(1) (``GIT_SSH_COMMAND``), ssh(1), git-clone(1)
(GIT URLS), git's quote.c; CVE-2017-1000117 (a host that begins with a dash), CVE-2023-51385
(a host or user that a ProxyCommand's shell expands).
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import signal
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote

from isohub.errors import SourceUnavailableError, printable
from isohub.repos.naming import without_credentials
from isohub.repos.sources.pkt import PackRequest, PktStream, read_refs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SshAddress", "SshRemote", "is_ssh", "lfs_authenticate", "parse_ssh"]

CONNECT_TIMEOUT_S = 10
#: Between two packets; git's servers say something every 5 s (uploadpack.keepAlive).
IDLE_LIMIT_S = 60.0
#: How long a program may take to end once it has nothing left to do.
END_LIMIT_S = 2.0
_STDERR_KEPT_BYTES = 4096
_LINES_SHOWN = 8
_CHUNK_BYTES = 1 << 16
_ANSWER_LIMIT_BYTES = 1 << 16
_URL = re.compile(r"ssh://(?:(?P<user>[^@/]*)@)?(?P<host>\[[^]/]*\]|[^:/]*)(?::(?P<port>[^/]*))?(?P<path>/.*)")
# As git: with a slash before the first colon it is a path.
_SCP = re.compile(r"(?:(?P<user>[^@/:]*)@)?(?P<host>\[[^]/]*\]|[^@:/\[]+):(?P<path>[^/:].*|/[^/].*)")
# Narrower than what ssh takes: nothing that an option, a ProxyCommand's shell or a URL could mean.
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]{2,45}\]")
_PORT = re.compile(r"[0-9]{1,5}")
# ssh(1) ends with 255 for its own errors, else with the exit code of what it ran.
_OWN_ERROR = 255
_PASSING = re.compile(
    "Connection (?:refused|timed out|reset)|Operation timed out|Could not resolve|No route to host|"
    "Network is (?:unreachable|down)|Broken pipe"
)
_LASTING = re.compile("Permission denied|Host key verification failed|IDENTIFICATION HAS CHANGED")
# No agent, no forwarding, no terminal, no questions: the server gets a command and nothing of ours.
_OPTIONS = (
    *("-a", "-x", "-T"),
    *("-o", "BatchMode=yes"),
    *("-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}"),
    *("-o", "ClearAllForwardings=yes"),
    *("-o", "PermitLocalCommand=no"),
)


@dataclass(frozen=True)
class SshAddress:
    """An address, taken apart and judged.

    Attributes:
        user: Or None for ssh's own choice.
        host: A name or an address, without brackets.
        port: Or None for ssh's own choice.
        path: As the server's git gets it.
    """

    user: str | None
    host: str
    port: int | None
    path: str

    @property
    def destination(self) -> str:
        """``user@host``, as ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host


def is_ssh(location: str) -> bool:
    """Whether an address is reached by ssh."""
    return location.startswith("ssh://") or ("://" not in location and _SCP.fullmatch(location) is not None)


def parse_ssh(location: str) -> SshAddress:
    """Take an address apart.

    Args:
        location: ``ssh://[user@]host[:port]/path`` with ``%XX`` as in URLs, or ``[user@]host:path``.
            Trust: the caller, or a repository.

    Raises:
        SourceUnavailableError: A part of it is not what it may be.
    """
    match = _URL.fullmatch(location) or _SCP.fullmatch(location)
    shown = printable(without_credentials(location), limit_chars=300, newlines=False)
    if match is None:
        raise SourceUnavailableError(f"{shown!r} is no ssh address: expected ssh://user@host/path", url=shown)
    user, host, path = match["user"], match["host"], match["path"]
    port = match.groupdict().get("port")
    if location.startswith("ssh://"):
        path = unquote(path)
        # As git: a path below a home directory is written /~user/path.
        path = path[1:] if path.startswith("/~") else path
    wrong = None
    if user is not None and not _USER.fullmatch(user):
        wrong = f"the user {user!a}" if ":" not in user else "the user, with a password,"
    elif not _HOST.fullmatch(host):
        wrong = f"the host {host!a}"
    elif port and not (_PORT.fullmatch(port) and 0 < int(port) < 65536):
        wrong = f"the port {port!a}"
    elif path.startswith("-") or not path.isprintable() or "\ufffd" in path or len(path) > 4096:
        wrong = f"the path {printable(path, limit_chars=100)!a}"
    if wrong is not None:
        raise SourceUnavailableError(
            f"{shown!r} is no ssh address that is used here: {wrong} is not plain",
            hint="names of letters, digits, '.', '_' and '-' that begin with a letter or a digit; no password",
            url=shown,
        )
    return SshAddress(user, host.strip("[]"), int(port) if port else None, path)


class SshRemote:
    """A repository behind ssh, as `isohub.repos.sources.pkt.Remote`; a context manager.

    Args:
        location: See `parse_ssh`. It is asked at once.

    Raises:
        SourceUnavailableError: It cannot be reached, or is no repository for us.
    """

    def __init__(self, location: str) -> None:
        address = parse_ssh(location)
        self._program = _Program(address, f"git-upload-pack {_quoted(address.path)}", location)
        try:
            self._stream = PktStream(self._program.chunks())
            with self._program.explained():
                self.advertisement = read_refs(self._stream, location)
        except BaseException:
            self._program.end()
            raise
        self._asked = False

    def receive(self, request: PackRequest, into: IO[bytes]) -> None:
        """Ask for a pack; see `Remote.receive`."""
        self._asked = True
        with self._program.explained():
            self._program.send(request.body)
            request.read(self._stream, into)

    def __enter__(self) -> SshRemote:
        return self

    def __exit__(self, *_: object) -> None:
        # A flush says that nothing is wanted; without it the server's log holds an error.
        self._program.end(b"" if self._asked else b"0000")


def lfs_authenticate(location: str) -> tuple[str, dict[str, str]]:
    """Ask a server behind ssh where its Git LFS server is, and for the headers to ask that with.

    Args:
        location: See `parse_ssh`.

    Returns:
        Its address, and headers, which are secrets. Trust: the network; nothing is judged here.

    Raises:
        SourceUnavailableError: It cannot be reached, or has no Git LFS.

    Source: git-lfs' docs/api/server-discovery.md (SSH) and docs/api/authentication.md.
    """
    address = parse_ssh(location)
    program = _Program(address, f"git-lfs-authenticate {_quoted(address.path)} download", location)
    try:
        with program.explained():
            answer = b""
            for chunk in program.chunks():
                answer += chunk
                if len(answer) > _ANSWER_LIMIT_BYTES:
                    raise ValueError("it answers more than is read")
            value = json.loads(answer)
            href, header = value["href"], value.get("header") or {}
            if not isinstance(href, str) or not isinstance(header, dict):
                raise ValueError("its answer lacks an address")
            return href, {str(name): str(content) for name, content in header.items()}
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SourceUnavailableError(
            f"{location}: git-lfs-authenticate answers what its specification does not allow", url=location
        ) from error
    finally:
        program.end()


class _Program:
    """A running ssh: its output with a limit on silence, its complaints, its end."""

    def __init__(self, address: SshAddress, asked: str, location: str) -> None:
        command = _command(address, asked)
        self._address = address
        self._location = location
        self._complaints = b""
        # A version that the user's ssh passes on would change the answer.
        environment = {name: value for name, value in os.environ.items() if name != "GIT_PROTOCOL"}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            shown = printable(command[0], limit_chars=200, newlines=False)
            raise SourceUnavailableError(
                f"{location} needs ssh, and {shown!r} cannot be run: {error.strerror or error}",
                hint="install openssh-client, or name the program in GIT_SSH_COMMAND; "
                "or `git clone` it elsewhere and name the clone: ./clone:ref",
                url=location,
            ) from error
        self._stdin, self._stdout, self._stderr = _all_of(self._process)
        for pipe in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(pipe.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stderr, selectors.EVENT_READ)

    def chunks(self) -> Iterator[bytes]:
        """What it writes, as it comes."""
        while True:
            self._wait_for(self._stdout, selectors.EVENT_READ)
            if not (data := os.read(self._stdout.fileno(), _CHUNK_BYTES)):
                return
            yield data

    def send(self, data: bytes) -> None:
        """Write to it."""
        rest = memoryview(data)
        while rest:
            self._wait_for(self._stdin, selectors.EVENT_WRITE)
            try:
                rest = rest[os.write(self._stdin.fileno(), rest[:_CHUNK_BYTES]) :]
            except BrokenPipeError:
                raise _BrokenError("the connection broke") from None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A context in which a broken conversation becomes the error that ssh has given the reason for."""
        try:
            yield
        except _BrokenError as error:
            raise self._failure(str(error), passing=True) from error
        except ValueError as error:
            raise self._failure(f"what came is not git's: {error}") from error

    def _failure(self, what: str, *, passing: bool = False) -> SourceUnavailableError:
        """The error for a conversation that ended: what ssh said, and a hint that fits it."""
        by_itself = self._finish(END_LIMIT_S)
        self._drain()
        complaints = self._complaints.decode("utf-8", "replace").strip()
        said = printable("\n".join(complaints.splitlines()[-_LINES_SHOWN:]), limit_chars=1000)
        code = self._process.returncode
        if by_itself and code != 0:
            what = f"ssh ended with exit code {code}"
            passing = code == _OWN_ERROR and _PASSING.search(complaints) is not None
        if _LASTING.search(complaints):
            passing = False
        text = f"{self._location}: {what}" + (f"; ssh says: {said}" if said else "")
        return SourceUnavailableError(text, hint=_hint(complaints, self._address), url=self._location, passing=passing)

    def end(self, farewell: bytes = b"") -> None:
        """End it: kindly for a moment, then by force, with all that it started."""
        try:
            if farewell:
                os.write(self._stdin.fileno(), farewell)
        except OSError:
            pass  # it ended by itself
        for pipe in (self._stdin, self._stdout):
            pipe.close()
        self._finish(END_LIMIT_S)
        self._stderr.close()
        self._selector.close()

    def _wait_for(self, pipe: IO[bytes], event: int) -> None:
        """Wait until a pipe is ready; complaints are read meanwhile, so that they block nobody."""
        deadline = time.monotonic() + IDLE_LIMIT_S
        self._selector.register(pipe, event)
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                ready = {key.fileobj for key, _ in self._selector.select(left_s)}
                if self._stderr in ready:
                    self._drain()
                if pipe in ready:
                    return
        finally:
            self._selector.unregister(pipe)
        raise _BrokenError(f"nothing came for {IDLE_LIMIT_S:g} s")

    def _drain(self) -> None:
        try:
            while data := os.read(self._stderr.fileno(), _CHUNK_BYTES):
                self._complaints = (self._complaints + data)[-_STDERR_KEPT_BYTES:]
        except BlockingIOError:
            return
        if self._stderr in self._selector.get_map():
            self._selector.unregister(self._stderr)

    def _finish(self, within_s: float) -> bool:
        """Wait for its end, or bring it about; its number is not given back before its group has ended.

        Returns:
            Whether it ended by itself.
        """
        if self._process.returncode is not None:
            return True
        by_itself, deadline = True, time.monotonic() + within_s
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                by_itself = False
                break
            time.sleep(0.005)
            self._drain()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        return by_itself


class _BrokenError(Exception):
    """The program ended, or said nothing for too long."""


def _all_of(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("all three are pipes")
    return process.stdin, process.stdout, process.stderr


def _command(address: SshAddress, asked: str) -> list[str]:
    override = os.environ.get("GIT_SSH_COMMAND", "")
    try:
        program = shlex.split(override) or [os.environ.get("GIT_SSH") or "ssh"]
    except ValueError as error:
        raise SourceUnavailableError(
            f"GIT_SSH_COMMAND cannot be split into words: {error}", hint="quote it as in a shell"
        ) from error
    port = ["-p", str(address.port)] if address.port is not None else []
    return [*program, *_OPTIONS, *port, "--", address.destination, asked]


def _quoted(path: str) -> str:
    """A word for the server's shell, as git quotes it: csh would expand an exclamation mark."""
    return "'" + path.replace("'", "'\\''").replace("!", "'\\!'") + "'"


def _hint(said: str, address: SshAddress) -> str:
    by_hand = f"ssh {f'-p {address.port} ' if address.port else ''}-T {address.destination}"
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        known = f"[{address.host}]:{address.port}" if address.port not in (None, 22) else address.host
        return (
            f"{address.host} has another key than before, which an attacker on the way would cause: ask who runs it, "
            f"and only then `ssh-keygen -R '{known}'`"
        )
    if "Host key verification failed" in said:
        return f"run `{by_hand}` once and compare the fingerprint with the one that the host publishes"
    if "Permission denied" in said:
        return f"`{by_hand} -v` shows which keys are tried; a key with a passphrase has to be in the agent: `ssh-add`"
    if "Could not resolve" in said or "Connection" in said or "timed out" in said or not said:
        return f"check the network and the address; `{by_hand}` shows more"
    return "check the address, and that your key may read the repository"
