"""torch.hub's downloads in a worker: the caller brings them.

Three functions of ``torch.hub`` are replaced before any code of the repo's runs: ``download_url_to_file``;
``load_state_dict_from_url``, which rests on it and is also ``torch.utils.model_zoo.load_url``; and the one that
brings a repository for a nested ``torch.hub.load``. Signatures and documented behaviour stay. What comes is a copy
of a file of the store, or a link to it if it is large. The key is the whole URL, there and in this worker's
``checkpoints``, so that two ``model.pth`` never meet.

A fork of a worker (a DataLoader's, say), a thread that outlives its question, and addresses that are not of the
web go the old way, with whatever powers this process has; where there is no network, or the session is offline or bound
by a lockfile, they get an error.

Side: worker. Trust: replies are the caller's. Source: torch 2.13's ``torch/hub.py``; the functions are there, with
the same first parameters, from torch 1.13 on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tarfile
import uuid
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence
from urllib.parse import urlparse

from isohub.worker.caller import Caller

__all__ = ["Downloads"]


class Downloads:
    """The replacements, and what they know.

    Attributes:
        bound: Whether nothing may be downloaded but by the caller: there is no network here, or the session is
            offline or has a lockfile.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._placed: Dict[str, str] = {}  # file to URL
        self._linked: List[int] = []  # descriptors of files that are not copied, open for life
        self.bound = False

    def install(self) -> None:
        """Replace the functions, for the life of this process."""
        import torch.hub
        import torch.utils.model_zoo

        self._fetch = torch.hub.download_url_to_file
        self._load = torch.hub.load_state_dict_from_url
        fetch = _in_place_of(self._fetch, self._download_url_to_file)
        load = _in_place_of(self._load, self._load_state_dict_from_url)
        torch.hub.download_url_to_file = fetch
        torch.hub.load_state_dict_from_url = load
        torch.utils.model_zoo.load_url = load  # type: ignore[attr-defined]  # it is there from 0.2 on
        self._reload = getattr(torch.hub, "_get_cache_or_reload", None)
        if self._reload is not None:
            torch.hub._get_cache_or_reload = _in_place_of(self._reload, self._get_cache_or_reload)

    def _download_url_to_file(
        self, url: str, dst: str, hash_prefix: Optional[str] = None, progress: bool = True
    ) -> None:
        if not _is_of_the_web(url):
            self._fetch(url, dst, hash_prefix, progress)
            return
        place = os.path.abspath(os.path.expanduser(os.fspath(dst)))
        if not self._caller.reachable():
            self._require_unbound(url)
            self._fetch(url, place, hash_prefix, progress)
            return
        if not os.path.isdir(os.path.dirname(place)):
            raise FileNotFoundError(2, "No such file or directory", place)
        if os.path.isdir(place):
            raise IsADirectoryError(21, "Is a directory", place)
        reply, descriptors = self._want("file", url, _checked_hash(hash_prefix), bool(progress))
        beside = f"{place}.{uuid.uuid4().hex}.partial"
        path = None if reply["path"] is None else os.fsdecode(bytes.fromhex(reply["path"]))
        source = _opened(path, reply["file"]) if path is not None and reply["file"] is not None else descriptors[0]
        try:
            if not reply["linked"]:
                with open(beside, "xb") as target:
                    _copy(source, target.fileno())
            elif reply["file"] is None:
                assert path is not None
                os.symlink(path, beside)
            else:
                # Another content may get the path when its URL is asked again; the descriptor stays with this one.
                os.symlink(f"/proc/self/fd/{source}", beside)
                self._linked.append(source)
                source = -1
            os.replace(beside, place)
        except BaseException:
            if os.path.lexists(beside):
                os.unlink(beside)
            raise
        finally:
            if source >= 0:
                os.close(source)
        self._placed[place] = url

    def _load_state_dict_from_url(self, url: str, model_dir: Optional[str] = None, *args: Any, **kwargs: Any) -> Any:
        import torch.hub

        if _is_of_the_web(url):
            # torch.hub takes whatever lies under the URL's last part there.
            if model_dir is None:
                key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                model_dir = os.path.join(torch.hub.get_dir(), "checkpoints", key)
            else:
                name = kwargs.get("file_name") or (args[3] if len(args) > 3 else None)
                place = os.path.abspath(os.path.join(model_dir, name or os.path.basename(urlparse(url).path)))
                if self._placed.get(place, url) != url and os.path.lexists(place):
                    os.unlink(place)
        return self._load(url, model_dir, *args, **kwargs)

    def _get_cache_or_reload(self, github: str, *args: Any, **kwargs: Any) -> str:
        import torch.hub

        if not self._caller.reachable():
            self._require_unbound(github)
            assert self._reload is not None
            found: str = self._reload(github, *args, **kwargs)
            return found
        reply, descriptors = self._want("repo", github, None, True)
        return _unpack(descriptors[0], os.path.join(torch.hub.get_dir(), reply["name"]))

    def _want(self, what: str, address: str, hash_prefix: Optional[str], progress: bool) -> Any:
        if not isinstance(address, str):
            raise TypeError(f"expected a str, got {type(address).__name__}")
        address.encode()  # a lone surrogate is a mistake of the repo's, and its own to hear of
        request = {"what": what, "address": address, "hash_prefix": hash_prefix, "progress": progress}
        reply, descriptors = self._caller.want(request)
        if reply["error"] is not None:
            _fail(address, reply["error"])
        return reply, descriptors

    def _require_unbound(self, address: Any) -> None:
        if self.bound:
            text = (
                "only the caller may download here (the worker has no network, or the session is offline or has a "
                "lockfile), and it waits for nothing from this process now: download before, while hubconf runs"
            )
            _fail(str(address), {"kind": "network", "message": text})


def _in_place_of(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return function


def _is_of_the_web(url: Any) -> bool:
    return isinstance(url, str) and url.lower().startswith(("https://", "http://"))


def _checked_hash(hash_prefix: Any) -> Optional[str]:
    if hash_prefix is not None and not isinstance(hash_prefix, str):
        raise TypeError(f"hash_prefix must be a str or None, got {type(hash_prefix).__name__}")
    return hash_prefix or None


def _opened(path: str, file: Sequence[int]) -> int:
    """The file that the caller means, and no other that got its name since."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    status = os.fstat(descriptor)
    if [status.st_dev, status.st_ino] != list(file):
        os.close(descriptor)
        raise RuntimeError(f"{path} was replaced while it was handed over; load again")
    return descriptor


def _copy(source: int, target: int) -> None:
    """Copy a file, within the file system where it can do that."""
    left = os.fstat(source).st_size
    try:
        while left > 0:
            count = os.copy_file_range(source, target, left)
            if count == 0:
                break
            left -= count
    except OSError:  # another file system, or one that cannot
        os.lseek(source, 0, os.SEEK_SET)
        os.lseek(target, 0, os.SEEK_SET)
        with open(source, "rb", closefd=False) as reader, open(target, "wb", closefd=False) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)


def _unpack(descriptor: int, directory: str) -> str:
    with os.fdopen(descriptor, "rb") as stream:
        if not os.path.isdir(directory):
            beside = f"{directory}.{uuid.uuid4().hex}"
            os.makedirs(beside)
            with tarfile.open(fileobj=stream) as archive:
                # From the caller, whose checkout was judged when it was written. Older Pythons have no filters.
                options = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
                archive.extractall(beside, **options)  # type: ignore[arg-type]  # noqa: S202
            try:
                os.rename(beside, directory)
            except OSError:
                if not os.path.isdir(directory):  # another thread was faster
                    raise
    return directory


def _fail(address: str, error: Dict[str, Any]) -> NoReturn:
    """Raise what torch.hub raises where the same thing goes wrong."""
    from urllib.error import HTTPError, URLError

    if error["kind"] == "http":
        raise HTTPError(address, error["status"], error["message"], None, None)  # type: ignore[arg-type]
    if error["kind"] == "network":
        raise URLError(error["message"])
    raise RuntimeError(error["message"])
