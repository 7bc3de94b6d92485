"""Find, read and replace a leaf of any batch, without touching the batch.

A leaf is a tensor; its path is the tuple of keys, indices and attribute names that leads to it. Along the path containers are
copied shallowly and everything else stays the same object: rebuilding the whole tree, as the usual tree utilities do, loses
what they do not know of.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "Path",
    "Selector",
    "describe",
    "find_inputs",
    "find_target",
    "format_path",
    "get",
    "leaves",
    "map_tensors",
    "replace",
]

Path = tuple[Any, ...]
Selector = int | str | Sequence[int | str]


def leaves(batch: Any) -> Iterator[tuple[Path, Tensor]]:
    """Yields every leaf with its path, depth first.

    Example:
        >>> import torch
        >>> [format_path(path) for path, _ in leaves({"x": [torch.zeros(2), torch.ones(2)], "id": "a"})]
        ['x.0', 'x.1']
    """
    yield from _walk(batch, (), ())


def get(batch: Any, path: Path) -> Any:
    """Returns what is at the path."""
    for key in path:
        batch = dict(_children(batch))[key]
    return batch


def replace(batch: Any, path: Path, value: Any) -> Any:
    """Returns a batch with ``value`` at the path, in which all that does not lie on the path is the same object.

    Raises:
        TypeError: A copy of a container on the path shares its content with the original.

    Example:
        >>> batch = {"x": (1, 2), "y": 3}
        >>> replace(batch, ("x", 0), 5), batch
        ({'x': (5, 2), 'y': 3}, {'x': (1, 2), 'y': 3})
    """
    if not path:
        return value
    key, rest = path[0], path[1:]
    return _with(batch, {key: replace(get(batch, (key,)), rest, value)})


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a batch with other tensors, in new containers; what is one object in two places is one again.

    Lists, tuples, dicts and sets are new, and other objects where there is a tensor in them.

    Args:
        batch: The batch.
        change: What makes the new tensor of one.

    Raises:
        TypeError: A copy of a container shares its content with the original.

    Example:
        >>> import torch
        >>> batch = {"x": torch.ones(2), "names": ["a", "b"]}
        >>> new = map_tensors(batch, torch.clone)
        >>> new["names"] == batch["names"], new["names"] is batch["names"]
        (True, False)
    """
    memo: dict[int, tuple[Any, Any]] = {}  # with the originals, whose ids would be given again

    def new(value: Any) -> Any:
        if id(value) not in memo:
            memo[id(value)] = value, value  # objects may point back at their owner
            memo[id(value)] = value, change(value) if isinstance(value, Tensor) else parts_of(value)
        return memo[id(value)][1]

    def parts_of(value: Any) -> Any:
        if type(value) not in (list, tuple, dict, set) and next(leaves(value), None) is None:
            return value
        changed = {key: part for key, child in _children(value) if (part := new(child)) is not child}
        return value if isinstance(value, tuple) and not changed else _with(value, changed)

    return new(batch)


def find_inputs(batch: Any, inputs: Selector | None = None, *, absent: bool = False) -> list[Path]:
    """Returns the paths of the leaves that are the input of the model.

    Args:
        batch: The batch.
        inputs: An index, a key, a dotted path such as ``"0.image"``, where ``*`` is every element, or a list of these. Left
            out: a bare tensor is the input, in a sequence the first element is, and elsewhere the only floating-point leaf.
        absent: A named leaf may be absent: what is ``None`` in its place is left out, such as the part of a loader that has
            ended before the others.

    Raises:
        ValueError: There is no such leaf, or it must be said which one it is; the message lists all leaves.
    """
    if inputs is not None:
        selectors = [inputs] if isinstance(inputs, int | str) else inputs
        paths = [path for selector in selectors for path in _find(batch, selector, absent)]
        if not paths and not absent:
            raise ValueError(f"inputs={inputs!r} selects nothing; {_listing(batch)}")
        return list(dict.fromkeys(paths))
    if isinstance(batch, Tensor):
        return [()]
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return _find(batch, 0)
    floating = [path for path, leaf in leaves(batch) if leaf.is_floating_point()]
    if len(floating) != 1:
        raise ValueError(f"which leaf is the input? Say inputs=…; {_listing(batch)}")
    return floating


def find_target(batch: Any, target: int | str | None = None) -> Path:
    """Returns the path of the leaf that is the target; left out, it is the second element of a sequence.

    Raises:
        ValueError: There is no such leaf, or more than one, or it must be said which one it is; the message lists all leaves.
    """
    if target is None and not (isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[1], Tensor)):
        raise ValueError(f"which leaf is the target? Say target=…; {_listing(batch)}")
    paths = _find(batch, 1 if target is None else target)
    if len(paths) > 1:
        raise ValueError(f"one leaf must be the target, but {target!r} means {', '.join(map(format_path, paths))}")
    return paths[0]


def format_path(path: Path) -> str:
    """Returns the path as it is written by a user, the batch itself as an empty string."""
    return ".".join(map(str, path))


def describe(value: Any) -> str:
    """Returns dtype and shape of a tensor, and the type of anything else, for messages.

    Example:
        >>> import torch
        >>> describe(torch.zeros(4, 3)), describe("a")
        ('float32 (4, 3)', 'str')
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _walk(value: Any, path: Path, ancestors: tuple[int, ...]) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif id(value) not in ancestors:  # objects may point back at their owner
        for key, child in _children(value):
            yield from _walk(child, (*path, key), (*ancestors, id(value)))


def _with(batch: Any, changed: dict[Any, Any]) -> Any:
    """Returns a copy in which these children are others."""
    if _is_namedtuple(batch):
        return batch._replace(**changed)
    if isinstance(batch, tuple):
        return type(batch)([changed.get(index, child) for index, child in enumerate(batch)])
    result, before = copy.copy(batch), dict(_children(batch))
    for key, value in changed.items():
        _set(result, key, value)
    after = dict(_children(batch))
    if any(after[key] is value for key, value in changed.items()):
        for key in changed:
            _set(batch, key, before[key])
        raise TypeError(f"a copy of {type(batch).__name__} shares its content with the original; let it define __copy__")
    return result


def _set(batch: Any, key: Any, value: Any) -> None:
    if isinstance(batch, list | Mapping):
        batch[key] = value  # type: ignore[index]
    elif _is_stored(batch, key):
        object.__setattr__(batch, key, value)  # it may be frozen
    else:
        setattr(batch, key, value)


def _find(batch: Any, selector: int | str, absent: bool = False) -> list[Path]:
    found: list[tuple[Path, Any]] = [((), batch)]
    for part in str(selector).split("."):
        found = [((*path, key), child) for path, value in found for key, child in _matching(value, part)]
        if absent and found:
            found = [(path, value) for path, value in found if value is not None]
            if not found:
                return []
    if not found or not all(isinstance(value, Tensor) for _, value in found):
        # a key may have dots in it
        found = [(path, leaf) for path, leaf in leaves(batch) if format_path(path) == str(selector)]
    if not found:
        raise ValueError(f"no leaf {selector!r} in the batch; {_listing(batch)}")
    return [path for path, _ in found]


def _matching(value: Any, part: str) -> list[tuple[Any, Any]]:
    children = _children(value)
    if part == "*":
        return children
    if _is_namedtuple(value) and part.isdigit():
        return children[int(part) : int(part) + 1]
    return [(key, child) for key, child in children if str(key) == part]


def _listing(batch: Any) -> str:
    found = ", ".join(f"{format_path(path)!r} {describe(leaf)}" for path, leaf in leaves(batch))
    return f"leaves are: {found}." if found else f"there is no tensor in it, it is of type {describe(batch)}."


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in value.keys()]  # noqa: SIM118 (a TensorDict iterates over its rows)
    if _is_namedtuple(value):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if value is None or isinstance(value, Tensor | str | bytes | int | float | complex | type) or _is_no_container(value):
        return []
    return [(name, getattr(value, name)) for name in _attributes(value) if hasattr(value, name)]


def _is_no_container(value: Any) -> bool:
    """Arrays, data frames, functions and modules, the last of which would lead into all of the program."""
    return hasattr(type(value), "__array__") or inspect.isroutine(value) or inspect.ismodule(value)


def _attributes(value: Any) -> list[str]:
    """The names of what a graph or a tensorclass lists as its keys, of the fields of a dataclass, or of all that is stored."""
    keys = list(value.keys()) if callable(getattr(value, "keys", None)) else []
    if keys and all(isinstance(key, str) and hasattr(value, key) for key in keys):
        return keys
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return [*_slots(type(value)), *getattr(value, "__dict__", ())]


def _slots(kind: type) -> list[str]:
    slots = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
    return [name for names in slots for name in ((names,) if isinstance(names, str) else names)]


def _is_stored(value: Any, name: str) -> bool:
    """Whether the object itself holds the attribute, in a slot or its ``__dict__``, and does not compute it."""
    return name in getattr(value, "__dict__", ()) or name in _slots(type(value))


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
