"""What can be seen of a model from outside, as plain values: the same code asks a local model and a handle.

    python -I observed.py CHECKOUT MODEL OUT

loads with torch.hub in a process that has loaded nothing else. MODEL is a JSON object: ``entrypoint``, ``kwargs``,
``seed``, ``inputs`` (expressions over ``torch`` and ``g``, a seeded generator), ``expressions`` (over ``m``, the model,
``r``, all that the entrypoint gave, ``x``, the inputs, and ``torch``), and ``site``, a folder of installed packages or
null. OUT receives the dict that `observe` gives.

It imports torch and the standard library, nothing of isohub.
"""

from __future__ import annotations

import inspect
import json
import random
import site
import sys

__all__ = ["CASTS", "OF_A_PART", "observe", "plain"]

CASTS = ("half", "bfloat16", "double", "float")
#: In the place of strides: a view of less than half of its memory, which crosses to a caller as a contiguous tensor.
OF_A_PART = "strides of a part"


def plain(value):
    """A value as tensors, text and numbers, with the kind of what held them."""
    import numpy as np
    import torch

    if isinstance(value, torch.nn.Module):
        return ["module", repr(value)]
    if isinstance(value, torch.Tensor):
        whole = value.numel() * value.element_size() * 2 >= value.untyped_storage().nbytes()
        strides = list(value.stride()) if whole else OF_A_PART
        return ["tensor", value.detach().clone(), value.requires_grad, strides, str(value.device)]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), value.tolist()]
    if isinstance(value, (torch.dtype, torch.device, torch.Size, slice)):
        return [type(value).__name__, str(value)]
    if any(has(value, name) for name in ("_fields", "__dataclass_fields__")) or (
        has(value, "keys") and type(value) is not dict
    ):
        return record(value)
    if isinstance(value, dict):
        return ["dict", [[plain(key), plain(item)] for key, item in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [plain(item) for item in value]]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted(map(repr, value))]
    return "an object"


def has(value, name):
    """`hasattr`, also where a class raises something else for what it has not."""
    try:
        getattr(value, name)
    except Exception:
        return False
    return True


def record(value):
    """A named tuple, a dataclass or a mapping with a class: what each way of reading it gives."""
    names = list(
        getattr(value, "_fields", ()) or (value.keys() if hasattr(value, "keys") else value.__dataclass_fields__)
    )
    seen = ["record", [[str(name), plain(getattr(value, name, "no attribute"))] for name in names]]
    for read in (lambda name, place: value[name], lambda name, place: value[place]):
        try:
            seen.append([plain(read(name, place)) for place, name in enumerate(names)])
        except (KeyError, TypeError, IndexError, AttributeError):
            seen.append("no such way")
    return [*seen, len(value) if hasattr(value, "__len__") else None]


def outcome(act):
    """What this gives, or the builtin classes of what it raises, with the text."""
    try:
        return ["gave", plain(act())]
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        return ["raised", kinds, getattr(error, "remote_message", None) or str(error)]


def tensors_of(value):
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "values") and callable(value.values):
        value = list(value.values())
    return [part for item in value for part in tensors_of(item)] if isinstance(value, (list, tuple)) else []


def total(outputs):
    """A loss that every output which has a gradient enters with a weight of its own."""
    import torch

    parts = [part for part in tensors_of(outputs) if part.requires_grad]
    return sum(((place + 1) * part.abs().pow(2).sum() for place, part in enumerate(parts)), torch.zeros(()))


def module_of(built):
    import torch

    return (
        built
        if isinstance(built, torch.nn.Module)
        else next(part for part in built if isinstance(part, torch.nn.Module))
    )


def seed_where_it_lives(model, seed):
    """Draws in the model are the same on both sides; and one thread each, since both sides run at once."""
    import torch

    def seeded(_):
        torch.set_num_threads(1)
        torch.manual_seed(seed)

    return model.run(seeded) if hasattr(type(model), "run") else seeded(model)


def made(expressions, seed):
    """Inputs from their expressions, the same in every process."""
    import torch

    g = torch.Generator().manual_seed(seed)
    return tuple(eval(text, {"torch": torch, "g": g}) for text in expressions)


def named(pairs):
    return [[name, plain(value)] for name, value in pairs]


def kept(model):
    """Its state as it is now; a local model's own would change with it."""
    state = model.state_dict()
    copy = type(state)((name, value.clone()) for name, value in state.items())
    copy._metadata = state._metadata
    return copy


def plain_metadata(state):
    return [[name, sorted(map(str, row.items()))] for name, row in getattr(state, "_metadata", {}).items()]


def described(built, model):
    """Names, text, order."""
    state = model.state_dict()
    return {
        "repr": repr(model),
        "str": str(model),
        "class": [model._get_name(), type(model).__name__, model.__class__.__name__],
        "dir": sorted(dir(model)),
        "training": model.training,
        "children": [[name, repr(child)] for name, child in model.named_children()],
        "modules": [[name, child._get_name()] for name, child in model.named_modules()],
        "old modules": [[name, repr(child)] for name, child in model._modules.items()],
        "buffers": named(model.named_buffers()),
        "parameters": [
            [name, parameter.requires_grad, parameter.is_leaf, str(parameter.dtype)]
            for name, parameter in model.named_parameters()
        ],
        "shared parameters": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "state": named(state.items()),
        "metadata": plain_metadata(state),
        "signature": [
            [p.name, p.kind.name, p.default is p.empty] for p in inspect.signature(model.forward).parameters.values()
        ],
        "signature of the class": list(inspect.signature(type(model).forward).parameters),
        "documentation": inspect.getdoc(model.forward),
        "itself": [
            model.eval() is model,
            model.train() is model,
            model == model,
            model in [model],
            callable(model),
            bool(model),
        ],
        "built": plain(built),
    }


def outputs(model, inputs):
    """What it answers in each of the caller's modes."""
    import torch

    with torch.no_grad():
        yield "training", outcome(lambda: model.train()(*inputs))
        yield "evaluated", outcome(lambda: model.eval()(*inputs))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield "autocast", outcome(lambda: model(*inputs))
        yield "in a sequence", outcome(lambda: torch.nn.Sequential(model)(*inputs[:1]))
    with torch.inference_mode():
        yield "inference", outcome(lambda: model(*inputs))
    whole = torch.nn.ModuleDict({"inner": model, "after": torch.nn.Linear(1, 1, bias=False)})
    yield "held", [list(whole.state_dict())[:-1], [name for name, _ in whole.named_modules()], repr(whole)]


def gradients(model, inputs, seed):
    """Hooks of all sorts and a backward pass, in training mode."""
    import torch

    leaves = tuple(
        tensor.clone().requires_grad_() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor
        for tensor in inputs
    )
    seen = []
    hooks = [
        model.register_forward_pre_hook(lambda _, args: seen.append(["pre", plain(args)])),
        model.register_forward_hook(
            lambda _, args, kwargs, out: seen.append(["after", plain(args), plain(kwargs), plain(out)]),
            with_kwargs=True,
        ),
        model.register_full_backward_hook(lambda _, ins, outs: seen.append(["backward", plain(ins), plain(outs)])),
    ]

    def passed():
        loss = total(model(*leaves))
        loss.backward()
        return loss

    model.train()
    model.zero_grad()
    seed_where_it_lives(model, seed)
    yield "loss", outcome(passed)
    for hook in hooks:
        hook.remove()
    yield "hooks", seen
    yield "of inputs", [plain(leaf.grad) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    yield "of parameters", [[name, plain(parameter.grad)] for name, parameter in model.named_parameters()]
    model.zero_grad()
    yield "cleared", [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    yield (
        "frozen",
        [
            model.requires_grad_(False) is model,
            [p.requires_grad for p in model.parameters()],
            outcome(lambda: model(*inputs)),
        ],
    )
    model.requires_grad_(True)
    yield "state after", named(model.state_dict().items())


def states(model):
    """What load_state_dict takes and says."""
    import torch

    state = kept(model)
    first = next(iter(state))
    less = {name: value for name, value in state.items() if name != first}
    wrong = {**state, first: torch.zeros(1, 2, 3, 5, 7)}
    yield "missing", outcome(lambda: model.load_state_dict(less))
    yield "unexpected", outcome(lambda: model.load_state_dict({**state, "nobody.knows": torch.zeros(2)}))
    yield "of another shape", outcome(lambda: model.load_state_dict(wrong))
    yield (
        "not strict",
        outcome(lambda: list(model.load_state_dict({**less, "nobody.knows": torch.zeros(2)}, strict=False))),
    )
    yield "no dict", outcome(lambda: model.load_state_dict([1, 2]))
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    yield "loads", [str(model.load_state_dict(changed)), named(model.state_dict().items())]
    yield "loads back", [str(model.load_state_dict(state, assign=True)), named(model.state_dict().items())]


def casts(model, inputs):
    """Other dtypes, and back."""
    import torch

    state = kept(model.eval())
    for cast in CASTS:
        dtype = getattr(torch, cast)
        given = tuple(
            tensor.to(dtype) if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor
            for tensor in inputs
        )
        with torch.no_grad():
            yield (
                cast,
                [
                    getattr(model, cast)() is model,
                    str(next(model.parameters()).dtype),
                    outcome(lambda given=given: model(*given)),
                ],
            )
    yield "to", [model.to(torch.float64) is model, model.to("cpu") is model, [str(p.dtype) for p in model.parameters()]]
    model.float().load_state_dict(state)


def errors(model):
    """What a wrong use says."""
    import torch

    yield "no argument", outcome(lambda: model())
    yield "a text", outcome(lambda: model("text"))
    yield "a keyword", outcome(lambda: model(nobody_knows=1))
    yield "a wrong shape", outcome(lambda: model(torch.zeros(1, 1, 1, 1, 1, 1, 1)))
    yield "an attribute", outcome(lambda: model.nobody_knows)
    yield "a submodule", outcome(lambda: model.get_submodule("nobody.knows"))
    yield "a parameter", outcome(lambda: model.get_parameter("nobody_knows"))
    yield "a parameter further in", outcome(lambda: model.get_parameter("nobody.knows"))
    yield "a buffer", outcome(lambda: model.get_buffer("nobody_knows"))
    yield "a method", outcome(lambda: model.nobody_knows(1))
    yield "a deletion", outcome(lambda: delattr(model, "nobody_knows"))
    yield "a dtype", outcome(lambda: model.to(torch.int64))
    yield "a device", outcome(lambda: model.to("nowhere"))
    yield "an item", outcome(lambda: model["nobody_knows"])
    yield "a length", outcome(lambda: len(model))
    yield "an iteration", outcome(lambda: [repr(part) for part in model])


def changes(model, inputs):
    """What can be set, added and applied."""
    import torch

    def halved(module):
        for parameter in module.parameters(recurse=False):
            parameter.data.mul_(0.5)

    model.eval()
    model.noted = {"by": "the caller", "at": [1, 2]}
    yield "attribute", plain(model.noted)
    del model.noted
    yield "deleted", hasattr(model, "noted")
    model.register_buffer("marked", torch.ones(2), persistent=False)
    yield "buffer", [plain(model.marked), "marked" in dict(model.named_buffers()), "marked" in model.state_dict()]
    model.added = torch.nn.Linear(2, 1)
    yield (
        "module",
        [
            repr(model.added),
            list(dict(model.named_children())),
            [name for name in model.state_dict() if name.startswith("added")],
        ],
    )
    del model.added
    del model.marked
    yield "applied", [model.apply(halved) is model, named(model.state_dict().items())]
    with torch.no_grad():
        yield "then", outcome(lambda: model(*inputs))
    yield "vector", plain(torch.nn.utils.parameters_to_vector(model.parameters()))


def observe(built, options):
    """All that is listed above, by name.

    Args:
        built: What an entrypoint gave: a module, or a tuple with one.
        options: See the module's docstring.
    """
    import torch

    model = module_of(built)
    inputs = made(options["inputs"], options["seed"])
    seed_where_it_lives(model, options["seed"])
    seen = {f"described: {name}": value for name, value in described(built, model).items()}

    def note(group, rows):
        seen.update((f"{group}: {name}", value) for name, value in rows)

    note("outputs", outputs(model, inputs))
    model.eval()
    names = {"m": model, "r": built, "x": inputs, "torch": torch}
    for text in options["expressions"]:
        seed_where_it_lives(model, options["seed"])
        with torch.no_grad():
            seen[f"expression: {text}"] = outcome(lambda text=text: eval(text, dict(names)))
    note("gradients", gradients(model, inputs, options["seed"]))
    note("states", states(model))
    note("casts", casts(model, inputs))
    note("errors", errors(model))
    note("changes", changes(model, inputs))
    return seen


def main():
    checkout, text, out = sys.argv[1:]
    options = json.loads(text)
    if options["site"] is not None:
        site.addsitedir(options["site"])
    import torch

    torch.manual_seed(options["seed"])
    random.seed(options["seed"])
    try:
        import numpy as np

        np.random.seed(options["seed"])
    except ImportError:
        pass
    built = torch.hub.load(checkout, options["entrypoint"], source="local", **options["kwargs"])
    torch.save(observe(built, options), out)


if __name__ == "__main__":
    main()
