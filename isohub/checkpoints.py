"""torch.hub's two download functions: `download_url_to_file` and `load_state_dict_from_url`.

Parameters and documented behaviour are torch.hub 2.13's. What it does not do: time out, try again, resume,
notice a short answer, keep two files of one name apart, check a hash in the cache, or load weights alone
unless told otherwise.

Runs in the caller, on URLs that the caller names, with the caller's credentials. Executes nothing that was
downloaded, unless the caller says ``weights_only=False``. torch is imported by what reads a checkpoint.

Source: torch.hub 2.13 (signatures and documentation), torch.load 2.13; PKWARE's APPNOTE.TXT 4.3.16.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from isohub.errors import IntegrityError, InvalidReferenceError, OfflineError, SourceUnavailableError, printable
from isohub.repos.blobs import copy_into, hash_file, open_regular
from isohub.repos.catalog import is_offline
from isohub.repos.checkpoint_fault import fault_of
from isohub.repos.credentials import Credentials
from isohub.repos.disk import make_root
from isohub.repos.download import download
from isohub.repos.http import HttpClient
from isohub.repos.layout import get_dir
from isohub.repos.legacy_zip import is_legacy_zip, unzip_legacy
from isohub.repos.placing import Origin, directory_lock, origin_of, place, reject, workspace
from isohub.repos.weights import WEIGHTS_LIMIT_BYTES, Weights
from isohub.repos.weights_entry import CALLER
from isohub.repos.weights_url import Hashes, hash_in_name, is_single_name, parse_weights_url, url_hints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["download_url_to_file", "load_state_dict_from_url"]

_log = logging.getLogger("isohub.checkpoints")
# What torch.load 2.13 says of a checkpoint of a device that this machine has not.
_NO_DEVICE = "Attempting to deserialize object on"


def download_url_to_file(
    url: str, dst: str | os.PathLike[str], hash_prefix: str | None = None, progress: bool = True
) -> None:
    """Download a URL to a file, whole or not at all.

    Args:
        url: http, https or file. Trust: the caller.
        dst: The file; its directory must be there. ``~`` is the user's home. What is there is replaced.
        hash_prefix: First hex digits that the file's SHA-256 must have; empty for none.
        progress: Draw a bar on stderr, if that is a terminal.

    Raises:
        InvalidReferenceError: The URL or the hash is none.
        IntegrityError: The file has another hash. `dst` is as it was.
        SourceUnavailableError: It could not be brought. `dst` is as it was.
        OfflineError: ``ISOHUB_OFFLINE`` is set, and it is no file URL.
        OSError: `dst` cannot be written.
    """
    source, target = _source_of(url), _path(dst)
    hashes = Hashes.of(sha256=None, hash_prefix=hash_prefix)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    with _finished(source, target, hashes, progress=progress) as (file, _):
        file.replace(target)


def load_state_dict_from_url(
    url: str,
    model_dir: str | os.PathLike[str] | None = None,
    map_location: Any = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
    weights_only: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint from a URL, downloading it unless it is here.

    Args:
        url: http, https or file. Trust: the caller names it; the file's author made the bytes.
        model_dir: Where the file is kept, under `file_name`, and looked for. None: isohub's own store, or
            ``checkpoints`` in `get_dir()` if `file_name` says how the file there is called.
        map_location: As in `torch.load`.
        progress: Draw a bar on stderr, if that is a terminal.
        check_hash: The URL's file name, or `file_name`, ends in ``-<8 or more hex digits>.ext``, the first
            digits of the file's SHA-256. They are checked, in the cache as well.
        file_name: Name of the file in `model_dir`; the URL's own unless given.
        weights_only: Load tensors and plain values alone. False unpickles, which lets the file's author run
            code in this process.

    Returns:
        What the file holds: commonly a dict of tensors, on the devices that `map_location` says.

    Raises:
        InvalidReferenceError: The URL or the name is none, or `check_hash` has nothing to check.
        IntegrityError: The file has another hash, is no checkpoint, or holds more than `weights_only` allows. What
            is no checkpoint is not used again: the next call asks the URL anew.
        SourceUnavailableError: It could not be brought or stored.
        OfflineError: It is not here, and ``ISOHUB_OFFLINE`` is set.
        OSError: `model_dir` cannot be used.
    """
    source = _source_of(url)
    if file_name is not None and not is_single_name(file_name):
        got = printable(repr(file_name), limit_chars=200, newlines=False)
        raise InvalidReferenceError(f"file_name is the name of a file in model_dir: got {got}", part="file_name")
    hashes = _hashes_in(source.name, file_name) if check_hash else Hashes()
    if model_dir is None and file_name is not None:
        root = Path(get_dir())
        make_root(root)
        model_dir = root / "checkpoints"  # where torch.hub says that it is to be found
    held: AbstractContextManager[_Found]
    with ExitStack() as stack:
        if model_dir is not None:
            held = _file_in(_path(model_dir), file_name or source.name, source, hashes, progress=progress)
        elif source.path is not None:
            _check_file(source.path, hashes)
            held = nullcontext(_Found(source.path, None))
        else:
            held = _file_in_store(source, hashes, progress=progress)
        found = stack.enter_context(held)
        if not is_legacy_zip(found.path):
            return _torch_load(str(found.path), found, source, map_location, weights_only=weights_only)
        stream = stack.enter_context(_unzipped(found, source))
        warnings.warn(
            "this checkpoint is a zip file around one that torch before 1.6 saved, a form that torch.hub will stop "
            "reading; load it and torch.save it again",
            category=FutureWarning,
            stacklevel=2,
        )
        return _torch_load(stream, found, source, map_location, weights_only=weights_only)


@dataclass(frozen=True)
class _Found:
    """The file of a URL. `forget` has the next call ask the URL again; None where another answer cannot come."""

    path: Path
    forget: Callable[[], bool] | None

    def reject(self, hint: str | None) -> str | None:
        """Do not use the file again; the hint, with that added."""
        try:
            forgotten = self.forget is not None and self.forget()
        except (SourceUnavailableError, OSError) as error:  # a store that is only read
            _log.debug("%s is no checkpoint, which could not be written down: %s", self.path, error)
            forgotten = False
        if not forgotten:
            return hint
        return "; ".join(filter(None, (hint, "it is not used again: the next call asks the URL anew")))


@dataclass(frozen=True)
class _Source:
    """A checked URL. `path` is the file of a file URL, None for what is asked of a server."""

    text: str
    key: str
    shown: str
    name: str
    path: Path | None


def _source_of(url: str) -> _Source:
    # An error in a URL must not repeat it: it may hold a password. `parse_weights_url` knows.
    if url[:5].lower() != "file:":
        parsed = parse_weights_url(url)
        return _Source(parsed.text, parsed.key, parsed.shown, parsed.hub_name, None)
    shown = printable(url, limit_chars=500, newlines=False)
    parts = urlsplit(url)
    path = Path(url2pathname(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute() or "\0" in parts.path or "%00" in parts.path:
        raise InvalidReferenceError(
            "the file URL names no file of this machine: expected file:///directory/name", part="path"
        )
    return _Source(url, hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest(), shown, path.name, path)


@contextmanager
def _file_in_store(source: _Source, hashes: Hashes, *, progress: bool) -> Iterator[_Found]:
    """The file of a URL in isohub's store, which nobody removes meanwhile."""
    weights = Weights(Path(get_dir()), offline=is_offline(None))
    with weights.held(CALLER):
        file = weights.fetch(
            source.text, CALLER, credentials=Credentials(), hash_prefix=hashes.prefix, progress=progress
        )

        def forget() -> bool:
            weights.forget(source.text, CALLER, sha256=file.sha256)
            return True

        yield _Found(file.path, forget if hashes.prefix is None and not weights.offline else None)


@contextmanager
def _file_in(directory: Path, name: str, source: _Source, hashes: Hashes, *, progress: bool) -> Iterator[_Found]:
    """The file of that name in a directory, which nobody replaces meanwhile.

    torch.hub's contract: a file that is there is used; but not if it was placed there for another URL.
    """
    if not is_single_name(name):
        raise InvalidReferenceError(
            f"{source.shown} ends in no file name", hint="say which to use: file_name='model.pth'", part="file_name"
        )
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / name
    askable = hashes.prefix is None and not (source.path is None and is_offline(None))
    found = _Found(target, partial(reject, target) if askable else None)
    while True:
        with directory_lock(directory, exclusive=False):
            if _is_usable(target, source, hashes):
                yield found
                return
        with directory_lock(directory, exclusive=True):
            # Whoever had the lock before may have placed it; then many can read it at once.
            if _is_usable(target, source, hashes):
                continue
            _say_whose(target, source)
            with _finished(source, target, hashes, progress=progress) as (file, sha256):
                place(file, target, Origin(source.key, source.shown, sha256))
            yield found
            return


def _is_usable(target: Path, source: _Source, hashes: Hashes) -> bool:
    if not target.exists():
        return False
    origin = origin_of(target)
    if origin is None:  # the user's own: never replaced
        _check_file(target, hashes)
        return True
    return origin.key == source.key and not origin.rejected and hashes.fit(origin.sha256)


def _say_whose(target: Path, source: _Source) -> None:
    """Say that another URL's file is replaced. Of a query, which may be a signature, only that it is another."""
    origin = origin_of(target) if target.exists() else None
    if origin is not None and origin.key != source.key:
        of = source.shown if origin.url != source.shown else "this query"
        _log.warning("%s is of %s, not of %s: it is downloaded again", target, origin.url, of)


def _check_file(path: Path, hashes: Hashes) -> None:
    """Refuse a file of the user's that cannot be read, or is not the one that is meant."""
    with _read_errors(path):
        if hashes.prefix is None:
            os.close(open_regular(path.resolve()))
            return
        digest, _ = hash_file(path.resolve())
    hashes.check(digest, printable(str(path), newlines=False))


@contextmanager
def _finished(source: _Source, target: Path, hashes: Hashes, *, progress: bool) -> Iterator[tuple[Path, str]]:
    """The file of a URL, whole and beside its target, with the mode that the umask gives; and its SHA-256."""
    if source.path is None and is_offline(None):
        raise OfflineError(
            f"{source.shown} is not at {target}, and the network may not be used",
            hint="unset ISOHUB_OFFLINE, or put the file there",
            url=source.shown,
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target.parent))
    with workspace(target.parent) as directory:
        part = directory / "part"
        with _write_errors(target):
            if source.path is not None:
                _copy_local(source.path, part)
                sha256, _ = hash_file(part)
                hashes.check(sha256, source.shown)
            else:
                with HttpClient(Credentials()) as client, url_hints():
                    sha256 = download(
                        client,
                        source.text,
                        part,
                        name=target.name,
                        limit_bytes=WEIGHTS_LIMIT_BYTES,
                        progress=progress,
                        hash_prefix=hashes.prefix,
                    ).sha256
            with part.open("rb") as stream, (directory / "mode").open("x") as ordinary:
                os.fchmod(stream.fileno(), os.fstat(ordinary.fileno()).st_mode & 0o777)
                os.fsync(stream.fileno())
        yield part, sha256


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Name the file where the kernel does not: of a full disk it says the number alone."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def _copy_local(path: Path, target: Path) -> None:
    with _read_errors(path):
        descriptor = open_regular(path.resolve())
    try:
        copy_into(descriptor, target, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceUnavailableError(
            f"{printable(str(path), newlines=False)} cannot be read: {error.strerror or error}", url=path.as_uri()
        ) from error


def _hashes_in(own_name: str, file_name: str | None) -> Hashes:
    """What the names say of the content. torch.hub checks nothing, and says nothing, if they say nothing."""
    found = [digits for digits in map(hash_in_name, (own_name, file_name or "")) if digits is not None]
    longest = max(found, key=len, default="")
    if not longest:
        names = " and ".join(
            repr(printable(name, limit_chars=200, newlines=False)) for name in (own_name, file_name) if name
        )
        raise InvalidReferenceError(
            f"check_hash has nothing to check: {names or 'the URL'} carries no hash; expected a name such as "
            "model-<8 or more hex digits of the SHA-256>.pth",
            hint="leave check_hash out, or compare with download_url_to_file(url, dst, hash_prefix=...)",
            part="check_hash",
        )
    if not all(longest.startswith(digits) for digits in found):
        raise InvalidReferenceError(
            f"the URL's name and file_name carry different hashes: {' and '.join(found)}", part="check_hash"
        )
    return Hashes(prefix=longest)


def _path(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(os.fspath(path))).absolute()  # noqa: PTH111 - leaves "~nobody" as torch.hub does


@contextmanager
def _unzipped(found: _Found, source: _Source) -> Iterator[IO[bytes]]:
    """The one file of a legacy zip, in a temporary file without a name."""
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(tempfile.TemporaryFile())
            unzip_legacy(found.path, stream, origin=source.shown, limit_bytes=WEIGHTS_LIMIT_BYTES)
        except IntegrityError as error:
            error.hint = found.reject(error.hint)
            raise
        except OSError as error:
            raise SourceUnavailableError(
                f"{source.shown} cannot be unpacked in {tempfile.gettempdir()}: {error.strerror or error}",
                hint="make room there, or set TMPDIR to a directory that has some",
                url=source.shown,
            ) from error
        yield stream


def _torch_load(
    file: str | IO[bytes], found: _Found, source: _Source, map_location: Any, *, weights_only: bool
) -> dict[str, Any]:
    import torch  # noqa: PLC0415 - what only downloads needs no torch

    try:
        # The one place in the caller. A worker's answers are never loaded, and neither is what a repo names.
        loaded: dict[str, Any] = torch.load(  # noqa: TID251 - the caller asks for this file; weights_only unless he says otherwise
            file, map_location=map_location, weights_only=weights_only
        )
    except OSError:
        raise
    except Exception as error:
        with Path(file).open("rb") if isinstance(file, str) else nullcontext(file) as stream:
            fault = fault_of(error, stream, weights_only=weights_only)
        if fault is None:
            if map_location is None and _NO_DEVICE in str(error):
                error.args = (f"{error}\nhint: map_location='cpu' brings it to this machine's memory",)
            raise  # torch's own words on devices and on `map_location`
        raise IntegrityError(
            f"{source.shown} is no checkpoint that can be loaded"
            + (" with weights_only=True" if weights_only else "")
            + f": {fault.reason}",
            hint=found.reject(fault.hint) if fault.damaged else fault.hint,
            url=source.shown,
        ) from error
    return loaded
