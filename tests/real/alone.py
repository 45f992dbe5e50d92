"""The oracle: what torch.hub gives for one checkout, in a process that has loaded nothing else.

    python -I alone.py CHECKOUT ENTRYPOINT KWARGS SEED OUT [--inputs INPUTS] [--after OTHER_CHECKOUT]

KWARGS is a JSON object. INPUTS is a JSON list; each item gives one tensor: ``{"shape": [...]}`` is
standard normal float32, ``{"shape": [...], "below": n}`` is int64 in [0, n). OUT receives a file with
``params``, ``state_dict`` (as it is after the calls), ``outputs``, ``second_outputs`` (a second call,
with the inputs of seed + 1) and ``type``; or ``error``.

With ``--after`` another checkout is loaded first in the same process, as a session with torch.hub
would: that is what shows the fault which isohub is for.

It imports torch and the standard library, nothing of isohub. ``-I`` keeps this folder and the
environment off ``sys.path``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys

__all__ = ["load", "make_tensors", "seed_all"]


def seed_all(seed):
    """Seeds torch, numpy (if it is there) and Python, as isohub's ``seed=`` does."""
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed)


def make_tensors(specs, seed):
    """Inputs from their specification, the same in every process. Leaves global random state alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(0, spec["below"], spec["shape"], generator=generator)
        if "below" in spec
        else torch.randn(spec["shape"], generator=generator)
        for spec in specs
    )


def load(checkout, entrypoint, kwargs, seed):
    import torch

    seed_all(seed)
    return torch.hub.load(checkout, entrypoint, source="local", **kwargs)


def answer(options):
    import torch

    kwargs = json.loads(options.kwargs)
    if options.after is not None:
        try:
            load(options.after, options.entrypoint, kwargs, options.seed)
        except Exception as error:
            print(f"the first checkout failed: {type(error).__name__}: {error}", file=sys.stderr)
    try:
        model = load(options.checkout, options.entrypoint, kwargs, options.seed).eval()
        specs = json.loads(options.inputs)
        with torch.no_grad():
            outputs = model(*make_tensors(specs, options.seed))
            second_outputs = model(*make_tensors(specs, options.seed + 1))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "state_dict": dict(model.state_dict()),
        "outputs": outputs,
        "second_outputs": second_outputs,
        "type": f"{type(model).__module__}.{type(model).__qualname__}",
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout")
    parser.add_argument("entrypoint")
    parser.add_argument("kwargs")
    parser.add_argument("seed", type=int)
    parser.add_argument("out")
    parser.add_argument("--inputs", default='[{"shape": [1, 3, 64, 64]}]')
    parser.add_argument("--after")
    options = parser.parse_args()
    result = answer(options)
    # Some repos replace torch.save or print options; what is saved was computed above.
    import torch

    torch.save(result, options.out)


if __name__ == "__main__":
    main()
