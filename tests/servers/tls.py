"""A certificate authority of the test's own, made by the openssl program."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

__all__ = ["authority"]

_SETTINGS = """\
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
subjectAltName = IP:127.0.0.1, DNS:localhost
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


def authority(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A new authority's certificate file, and a server's context for 127.0.0.1 and localhost that it vouches for."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "settings").write_text(_SETTINGS)
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for line in (
        f"req -x509 -config settings -extensions authority -subj /CN=authority -days 2 {key} -keyout ca.key -out ca.pem",
        f"req -new -config settings -subj /CN=server {key} -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -set_serial 2 -days 2 -out server.pem -extfile settings -extensions server",
    ):
        subprocess.run(["openssl", *line.split()], cwd=directory, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    return directory / "ca.pem", context
