"""isohub: torch.hub, with a worker process for each repo and commit.

    import isohub

    v1 = isohub.load("owner/repo:v1", "model")
    v2 = isohub.load("owner/repo:v2", "model")   # same session, other code

``import isohub`` loads neither torch nor any other part; names are looked up on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for typing's, whose import would be most of this one's time

if TYPE_CHECKING:
    from typing import Any

    from isohub import errors as errors
    from isohub.bisection.bisect import bisect as bisect
    from isohub.checkpoints import download_url_to_file as download_url_to_file
    from isohub.checkpoints import load_state_dict_from_url as load_state_dict_from_url
    from isohub.comparison.closeness import assert_close as assert_close
    from isohub.comparison.measure import compare as compare
    from isohub.comparison.result import Comparison as Comparison
    from isohub.environments.environment import Environment as Environment
    from isohub.evaluation.evaluate import evaluate as evaluate
    from isohub.hub import Session as Session
    from isohub.hub import doctor as doctor
    from isohub.hub import fetch as fetch
    from isohub.hub import get_dir as get_dir
    from isohub.hub import help as help  # noqa: A004 - torch.hub's name
    from isohub.hub import inspect as inspect
    from isohub.hub import list as list  # noqa: A004 - torch.hub's name
    from isohub.hub import load as load
    from isohub.hub import set_dir as set_dir
    from isohub.hub import trust as trust
    from isohub.hub import trusted as trusted
    from isohub.hub import untrust as untrust
    from isohub.sandbox.policy import Sandbox as Sandbox
    from isohub.session.handles import RemoteModule as RemoteModule
    from isohub.session.handles import RemoteObject as RemoteObject

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("Session", "doctor", "fetch", "get_dir", "help", "inspect", "list"), "isohub.hub"),
    **dict.fromkeys(("load", "set_dir", "trust", "trusted", "untrust"), "isohub.hub"),
    **dict.fromkeys(("download_url_to_file", "load_state_dict_from_url"), "isohub.checkpoints"),
    "Comparison": "isohub.comparison.result",
    "assert_close": "isohub.comparison.closeness",
    "compare": "isohub.comparison.measure",
    "Environment": "isohub.environments.environment",
    "Sandbox": "isohub.sandbox.policy",
    "bisect": "isohub.bisection.bisect",
    "evaluate": "isohub.evaluation.evaluate",
    **dict.fromkeys(("RemoteModule", "RemoteObject"), "isohub.session.handles"),
}

__all__ = [
    "Comparison",
    "Environment",
    "RemoteModule",
    "RemoteObject",
    "Sandbox",
    "Session",
    "__version__",
    "assert_close",
    "bisect",
    "compare",
    "doctor",
    "download_url_to_file",
    "errors",
    "evaluate",
    "fetch",
    "get_dir",
    "help",
    "inspect",
    "list",
    "load",
    "load_state_dict_from_url",
    "set_dir",
    "trust",
    "trusted",
    "untrust",
]


def __getattr__(name: str) -> Any:
    import importlib  # noqa: PLC0415 - `import isohub` stays light

    if name == "errors":
        return importlib.import_module("isohub.errors")  # noqa: TID251 - a name of ours
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'isohub' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)  # noqa: TID251 - a name of ours
    globals()[name] = value
    return value


def __dir__() -> Any:
    return sorted({*globals(), *__all__})
