"""The first file that a zygote runs: ``python -I start.py <control descriptor>``.

The environment that it starts in may hold no isohub, so the package is made here from this file's own
place: its modules can be imported, and neither ``isohub/__init__.py`` nor the directory that holds isohub
takes part.
"""

import os
import sys
import types


def _package() -> None:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    package = types.ModuleType("isohub")
    package.__path__ = [root]
    package.__package__ = "isohub"
    sys.modules["isohub"] = package


if __name__ == "__main__":
    _package()
    from isohub.worker.zygote import main

    main(int(sys.argv[1]))
