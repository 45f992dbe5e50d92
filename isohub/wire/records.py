"""What remote named tuples, model outputs and members of enumerations become: plain values that know a class's name.

No class is made from what a worker says. A remote ``ModelOutput(logits=…)`` arrives as a
`MappingRecord` whose `class_name` is the text ``"ModelOutput"``; keys, attributes and positions
work as they did there.

Side: the caller builds these; a worker gets them when a caller passes one back.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, Sequence, Tuple

from isohub.errors import printable

__all__ = ["EnumRecord", "MappingRecord", "TupleRecord"]


class EnumRecord:
    """A member of a remote enumeration: its name and its value.

    Two are equal if class name, name and value are; one that is passed back is the member again.

    Attributes:
        class_name: The remote class's name, as text.
        name: The member's.
        value: The member's.
    """

    __slots__ = ("class_name", "name", "value")

    class_name: str
    name: str
    value: Any

    def __init__(self, class_name: str, name: str, value: Any) -> None:
        for slot, what in zip(self.__slots__, (class_name, name, value)):
            object.__setattr__(self, slot, what)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a member of an enumeration cannot be changed")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EnumRecord):
            return NotImplemented
        mine, theirs = (self.class_name, self.name), (other.class_name, other.name)
        return mine == theirs and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash((self.class_name, self.name))

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.class_name, self.name, self.value)

    def __repr__(self) -> str:
        return f"<{self.class_name}.{self.name}: {self.value!r}>"

    def __str__(self) -> str:
        return f"{self.class_name}.{self.name}"


class TupleRecord(Tuple[Any, ...]):
    """A named tuple's values, by position and by name.

    Attributes:
        class_name: The remote class's name, as text.
        _fields: Names of the values, as ``collections.namedtuple`` has it.
    """

    class_name: str
    _fields: Tuple[str, ...]

    def __new__(cls, class_name: str, fields: Sequence[str], values: Iterable[Any]) -> TupleRecord:
        """A record of as many values as there are fields."""
        record = super().__new__(cls, values)
        record.__dict__.update(class_name=class_name, _fields=tuple(fields))
        return record

    def __getattribute__(self, name: str) -> Any:
        # Before a tuple's own `count` and `index`: a named tuple's fields win there too.
        if not name.startswith("_") and name != "class_name":
            fields = super().__getattribute__("_fields")
            if name in fields:
                return tuple.__getitem__(self, fields.index(name))
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__dict__.get('class_name')!r} has no field {name!r}; it has {list(self._fields)}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("the fields of a named tuple cannot be set")

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.class_name, self._fields, tuple(self))

    def __repr__(self) -> str:
        return f"{self.class_name}({', '.join(f'{name}={value!r}' for name, value in zip(self._fields, self))})"

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._fields]

    def _asdict(self) -> Dict[str, Any]:
        return dict(zip(self._fields, self))


class MappingRecord(Dict[str, Any]):
    """A model output's values, by key, by attribute and by position.

    ``record["logits"]``, ``record.logits`` and ``record[0]`` are the same object, as in the model
    outputs of the transformers library. Iteration gives the keys.

    Attributes:
        class_name: The remote class's name, as text.
        absent: Fields that were None there: attributes, and no keys.
    """

    __slots__ = ("absent", "class_name")

    class_name: str
    absent: Tuple[str, ...]

    def __init__(self, class_name: str, items: Iterable[Tuple[str, Any]] = (), absent: Iterable[str] = ()) -> None:
        super().__init__(items)
        object.__setattr__(self, "class_name", class_name)
        object.__setattr__(self, "absent", tuple(absent))

    def __getattr__(self, name: str) -> Any:
        name = self._known(name)
        if name in self:
            return super().__getitem__(name)
        if name in self.absent:
            return None
        raise AttributeError(f"{self.class_name!r} has no {name!r}; it has {list(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return self.to_tuple()[key]
        return super().__getitem__(self._known(key))

    def _known(self, name: Any) -> Any:
        """The key that a name of transformers 4 means in an output of transformers 5 (utils/generic.py)."""
        old = name in ("past_key_values", "cache_params") and name not in self
        return "cache" if old and ("cache" in self or "cache" in self.absent) else name

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.class_name, list(self.items()), self.absent)

    def __repr__(self) -> str:
        return f"{self.class_name}({', '.join(f'{_shown(name)}={value!r}' for name, value in self.items())})"

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *map(_shown, self), *self.absent]

    def to_tuple(self) -> Tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


def _shown(name: str) -> str:
    """A key as text: it is the repo's."""
    return printable(name, newlines=False)
