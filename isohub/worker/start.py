"""The first file that a zygote runs: ``python -I [-S] start.py zygote <control> <directory> <when> <surroundings>``.

``when`` is ``ahead`` for torch before the fork, ``late`` for torch in each worker. Of surroundings, ``plain`` wants no
namespaces, ``outer`` has to make them, and a descriptor is the zygote's within them. The other one, ``python -I
start.py doctor <directory>``, prints what this machine can give a worker; and ``start.py build
<directory> <answer>`` builds a wheel from source.

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
    if sys.version_info < (3, 8):  # noqa: UP036 - whoever names an interpreter may name an older one
        sys.exit(f"this is Python {sys.version.split()[0]}; isohub's workers run on 3.8 or newer")
    _package()
    if sys.argv[1] == "doctor":
        from isohub.worker.doctor import examine

        examine(sys.argv[2])
    elif sys.argv[1] == "build":
        from isohub.worker.build import build

        build(sys.argv[2], int(sys.argv[3]))
    else:
        control, directory, when, surroundings = int(sys.argv[2]), *sys.argv[3:6]
        no_namespaces = None
        if surroundings == "outer":
            from isohub.worker.keeper import surround

            flags = ["-I", "-S"] if sys.flags.no_site else ["-I"]
            no_namespaces = surround([*flags, *sys.argv[:5]], control, directory)
        from isohub.worker.zygote import main

        main(control, directory, when, surroundings, no_namespaces)
