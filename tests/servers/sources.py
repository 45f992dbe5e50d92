"""Source distributions whose build does what a test says."""

from __future__ import annotations

import textwrap

from tests.servers.index import PackageIndex

__all__ = ["add_source"]

#: A build backend of forty lines, so that no test needs a real one.
BACKEND = """
import os, zipfile
def build_wheel(directory, config_settings=None, metadata_directory=None):
    import alpha_build
    note = alpha_build.look()
    name = "{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        info = "{name}-{version}.dist-info/"
        wheel.writestr("{name}.py", "__version__ = %r\\nnote = %r\\n" % ("{version}", note))
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n{more}")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""


def add_source(
    index: PackageIndex, name: str, version: str, look: str = "return 'built'", more: str = "", **system
) -> None:
    """A source distribution whose build runs the body of `look`."""
    index.wheel("tinybuild", "1.0", {"tinybuild.py": BACKEND.format(name=name, version=version, more=more)})
    files = {
        "pyproject.toml": '[build-system]\nrequires = ["tinybuild"]\nbuild-backend = "tinybuild"\nbackend-path = ["."]\n',
        "alpha_build.py": "def look():\n" + textwrap.indent(textwrap.dedent(look), "    "),
    }
    index.sdist(name, version, files)
