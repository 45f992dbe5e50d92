"""torch.hub's downloads in a worker: the caller brings them.

Three functions of ``torch.hub`` are replaced before any code of the repo's runs: ``download_url_to_file``;
``load_state_dict_from_url``, which rests on it and is also ``torch.utils.model_zoo.load_url``; and the one that
brings a repository for a nested ``torch.hub.load``. Signatures and documented behaviour stay. What comes is a link
to a read-only file of the store. The key is the whole URL, there and in this worker's ``checkpoints``, so that two
``model.pth`` never meet.

A fork of a worker (a DataLoader's, say) and addresses that are not of the web go the old way, with whatever
powers this process has.

Side: worker. Trust: replies are the caller's. Source: torch 2.13's ``torch/hub.py``; both functions are there, with
the same first parameters, from torch 1.13 on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tarfile
import uuid
from typing import Any, Dict, List, NoReturn, Optional

from isohub.worker.caller import Caller

__all__ = ["install"]


def install(caller: Caller) -> None:
    """Replace them, for the life of this process."""
    _replace_file_download(caller)
    _replace_state_dict_download()
    _replace_repo_download(caller)


def _replace_file_download(caller: Caller) -> None:
    import torch.hub

    fetch = torch.hub.download_url_to_file

    @functools.wraps(fetch)
    def download_url_to_file(url: str, dst: str, hash_prefix: Optional[str] = None, progress: bool = True) -> None:
        if not _is_of_the_web(url) or not caller.reachable():
            fetch(url, dst, hash_prefix, progress)
            return
        place = os.path.abspath(os.path.expanduser(os.fspath(dst)))
        if not os.path.isdir(os.path.dirname(place)):
            raise FileNotFoundError(2, "No such file or directory", place)
        request = {"what": "file", "address": url, "hash_prefix": hash_prefix, "progress": bool(progress)}
        reply, _ = caller.want(request)
        if reply["error"] is not None:
            _fail(url, reply["error"])
        beside = f"{place}.{uuid.uuid4().hex}.partial"
        os.symlink(reply["path"], beside)
        os.replace(beside, place)

    torch.hub.download_url_to_file = download_url_to_file


def _replace_state_dict_download() -> None:
    import torch.hub
    import torch.utils.model_zoo

    load = torch.hub.load_state_dict_from_url

    @functools.wraps(load)
    def load_state_dict_from_url(url: str, model_dir: Optional[str] = None, *args: Any, **kwargs: Any) -> Any:
        if model_dir is None and _is_of_the_web(url):
            # torch.hub takes whatever lies under the URL's last part there.
            key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            model_dir = os.path.join(torch.hub.get_dir(), "checkpoints", key)
        return load(url, model_dir, *args, **kwargs)

    torch.hub.load_state_dict_from_url = load_state_dict_from_url
    torch.utils.model_zoo.load_url = load_state_dict_from_url  # type: ignore[attr-defined]  # it is there from 0.2 on


def _replace_repo_download(caller: Caller) -> None:
    import torch.hub

    reload = getattr(torch.hub, "_get_cache_or_reload", None)
    if reload is None:
        return

    @functools.wraps(reload)
    def _get_cache_or_reload(github: str, *args: Any, **kwargs: Any) -> str:
        if not caller.reachable():
            found: str = reload(github, *args, **kwargs)
            return found
        request = {"what": "repo", "address": github, "hash_prefix": None, "progress": True}
        reply, descriptors = caller.want(request)
        if reply["error"] is not None:
            _fail(github, reply["error"])
        return _unpack(descriptors, os.path.join(torch.hub.get_dir(), reply["path"]))

    torch.hub._get_cache_or_reload = _get_cache_or_reload


def _is_of_the_web(url: Any) -> bool:
    return isinstance(url, str) and url.lower().startswith(("https://", "http://"))


def _unpack(descriptors: List[int], directory: str) -> str:
    with os.fdopen(descriptors[0], "rb") as stream:
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
