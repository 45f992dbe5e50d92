"""Whose word a request carries: tokens and passwords, each for the server that it belongs to.

Nothing here is put into a message, a log, a command line, a URL or a worker's environment. Runs in the caller.

Source: GitHub's documentation of ``GITHUB_TOKEN``, RFC 7617 (Basic), RFC 6750 (Bearer).
"""

from __future__ import annotations

import base64
import os
from urllib.parse import urlsplit

from isohub.repos.reference import github_api, github_server

__all__ = ["Credentials"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Credentials:
    """The user's own, looked up anew for every operation.

    Args:
        anonymous: Have none at all: for what is fetched on a worker's word.
    """

    def __init__(self, *, anonymous: bool = False) -> None:
        self.anonymous = anonymous

    def tokens(self) -> dict[str, str]:
        """Authorization headers by the address they belong to, from ``GITHUB_TOKEN`` or ``GH_TOKEN``.

        The tokens belong to the server of ``GITHUB_SERVER_URL`` and its API, and go nowhere else;
        nor over a connection that others can read.
        """
        token = (os.environ.get("GITHUB_TOKEN") or os.environ.get("GH_TOKEN") or "").strip()
        if self.anonymous or not token or not token.isascii() or not token.isprintable():
            return {}
        server = github_server()
        # git's endpoints take Basic with this user name for every kind of token; the API takes Bearer.
        basic = base64.b64encode(f"x-access-token:{token}".encode("ascii")).decode("ascii")
        values = {server: f"Basic {basic}", github_api(server): f"Bearer {token}"}
        return {
            address: value
            for address, value in values.items()
            if urlsplit(address).scheme == "https" or urlsplit(address).hostname in _LOOPBACK
        }
