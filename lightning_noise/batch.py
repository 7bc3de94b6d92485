"""Batches of any type: their leaves, the selection of leaves, and changed copies.

A leaf is a tensor. Its path is the tuple of keys, indices and attribute names that leads to the leaf. A changed copy shares all
objects with the original, except the containers on the paths of the changed leaves. Tree utilities that rebuild the whole batch
lose what they do not know.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
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
    "modify",
    "select",
    "select_one",
]

Path = tuple[Any, ...]
Selector = int | str | Sequence[int | str]

_TARGETS = ("label", "labels", "target", "targets", "y")


def leaves(batch: Any) -> Iterator[tuple[Path, Tensor]]:
    """Yields every leaf with its path, depth first.

    Example:
        >>> import torch
        >>> [format_path(path) for path, _ in leaves({"x": [torch.zeros(2), torch.ones(2)], "id": "a"})]
        ['x.0', 'x.1']
    """
    yield from _walk(batch, (), ())


def select(batch: Any, selector: Selector, *, absent: bool = False) -> dict[Path, Tensor]:
    """Returns the selected leaves by their paths.

    A selector that selects nothing is a ValueError, whose message lists all leaves.

    Args:
        batch: A batch of any type.
        selector: An index, a key, a dotted path such as ``"0.image"``, in which ``*`` is every element, or a list of these.
        absent: Whether to skip a leaf that ``None`` replaces, such as the part of a loader that ended before the others.

    Example:
        >>> import torch
        >>> list(select({"x": [torch.zeros(2), torch.ones(2)], "y": torch.ones(1)}, ["x.*", "y"]))
        [('x', 0), ('x', 1), ('y',)]
    """
    selectors = [selector] if isinstance(selector, int | str) else selector
    return {path: leaf for part in selectors for path, leaf in _select(batch, part, absent)}


def select_one(batch: Any, selector: int | str, kind: str) -> Tensor:
    """Returns the only leaf that a selector selects; ``kind`` names the leaf in messages, such as ``"mask"``."""
    return get(batch, _only(select(batch, selector), selector, kind))


def modify(batch: Any, paths: Iterable[Path], function: Callable[[Tensor, Path], Tensor]) -> Any:
    """Returns a copy of the batch with the leaves ``function(leaf, path)``; everything off the paths is the same object.

    A container whose copy shares its content with the original is a TypeError.

    Example:
        >>> import torch
        >>> batch = {"x": (torch.zeros(2), torch.ones(2)), "y": torch.ones(1)}
        >>> new = modify(batch, [("x", 0)], lambda leaf, path: leaf + 5)
        >>> new["x"][0], new["x"][1] is batch["x"][1], batch["x"][0]
        (tensor([5., 5.]), True, tensor([0., 0.]))
    """
    return _modify(batch, (), list(paths), function)


def get(batch: Any, path: Path) -> Any:
    """Returns what is at a path."""
    for key in path:
        batch = dict(_children(batch))[key]
    return batch


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of the batch with changed tensors and new containers.

    An object in two places is one object in the copy, too. Lists, tuples, dicts and sets are new, and so are other objects that
    hold a tensor. A container whose copy shares its content with the original is a TypeError.

    Example:
        >>> import torch
        >>> batch = {"x": torch.ones(2), "names": ["a", "b"]}
        >>> new = map_tensors(batch, torch.clone)
        >>> new["names"] == batch["names"], new["names"] is batch["names"]
        (True, False)
    """
    memo: dict[int, tuple[Any, Any]] = {}  # with the originals, so that Python does not give their ids again

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
    """Returns the paths of the inputs of the model, as :func:`select` does.

    Default: a bare tensor, the first element of a sequence, or else the only floating-point leaf. If there are several, the
    default is a ValueError, whose message lists all leaves.
    """
    if inputs is not None:
        paths = list(select(batch, inputs, absent=absent))
        if not paths and not absent:
            raise ValueError(f"inputs={inputs!r} selects nothing; {_list_leaves(batch)}")
        return paths
    if isinstance(batch, Tensor):
        return [()]
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        return [_children(batch)[0][:1]]
    floating = [path for path, leaf in leaves(batch) if leaf.is_floating_point()]
    if len(floating) != 1:
        raise ValueError(f"which leaf is the input? {_suggest(batch, 'inputs', floating)}")
    return floating


def find_target(batch: Any, target: int | str | None = None) -> Path:
    """Returns the path of the target, a single leaf.

    Default: the second element of a sequence; elsewhere the only leaf named label(s), target(s) or y, or else the only leaf of
    integers. If there are several, the default is a ValueError, whose message lists all leaves.
    """
    if target is not None:
        return _only(select(batch, target), target, "target")
    if isinstance(batch, list | tuple):
        candidates = [_children(batch)[1][:1]] if len(batch) > 1 and isinstance(batch[1], Tensor) else []
    else:
        named = [path for path, _ in leaves(batch) if path and path[-1] in _TARGETS]
        candidates = named or [path for path, leaf in leaves(batch) if path and _is_integer(leaf)]
    if len(candidates) != 1:
        raise ValueError(f"which leaf is the target? {_suggest(batch, 'target', candidates)}")
    return candidates[0]


def format_path(path: Path) -> str:
    """Returns a path as a user writes it; the path of the batch itself is an empty string."""
    return ".".join(map(str, path))


def describe(value: Any) -> str:
    """Returns dtype and shape of a tensor, or the type of another value, for messages.

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


def _modify(value: Any, path: Path, rests: list[Path], function: Callable[[Tensor, Path], Tensor]) -> Any:
    """Returns the value with changed leaves below it; ``rests`` are their paths, seen from the value."""
    if () in rests:
        return function(value, path)
    children, changed = dict(_children(value)) if rests else {}, {}
    for key in dict.fromkeys(rest[0] for rest in rests):
        below = [rest[1:] for rest in rests if rest[0] == key]
        new = _modify(children[key], (*path, key), below, function)
        if new is not children[key]:
            changed[key] = new
    return _with(value, changed) if changed else value


def _with(batch: Any, changed: dict[Any, Any]) -> Any:
    """Returns a copy with other values for some children."""
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
    container: Any = batch
    if isinstance(batch, list | Mapping):
        container[key] = value
    elif _is_stored(batch, key):
        object.__setattr__(batch, key, value)  # it may be frozen
    else:
        setattr(batch, key, value)


def _select(batch: Any, selector: int | str, absent: bool) -> list[tuple[Path, Tensor]]:
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
        raise ValueError(f"no leaf {selector!r} in the batch; {_list_leaves(batch)}")
    return found


def _only(found: Iterable[Path], selector: int | str, kind: str) -> Path:
    path, *others = found
    if others:
        raise ValueError(f"one leaf must be the {kind}, but {selector!r} means {', '.join(map(format_path, [path, *others]))}")
    return path


def _matching(value: Any, part: str) -> list[tuple[Any, Any]]:
    children = _children(value)
    if part == "*":
        return children
    if _is_namedtuple(value) and part.isdigit():
        return children[int(part) : int(part) + 1]
    return [(key, child) for key, child in children if str(key) == part]


def _suggest(batch: Any, argument: str, candidates: list[Path]) -> str:
    """Returns what to type, by the example of the first candidate or leaf."""
    path = next(iter(candidates or [path for path, _ in leaves(batch)]), None)
    if not path:
        return _list_leaves(batch)
    selector = path[0] if len(path) == 1 else format_path(path)
    return f"Type {argument}=…, such as {argument}={selector!r}; {_list_leaves(batch)}"


def _list_leaves(batch: Any) -> str:
    found = ", ".join(f"{format_path(path)!r} {describe(leaf)}" for path, leaf in leaves(batch))
    return f"leaves are: {found}." if found else f"there is no tensor in it, it is of type {describe(batch)}."


def _is_integer(leaf: Tensor) -> bool:
    return not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)


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
    """Returns whether the value is an array, a data frame, a function or a module, which leads into the whole program."""
    return hasattr(type(value), "__array__") or inspect.isroutine(value) or inspect.ismodule(value)


def _attributes(value: Any) -> list[str]:
    """Returns the keys of a graph or tensorclass, the fields of a dataclass, or the stored attributes of another object."""
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
    """Returns whether the object stores the attribute, in a slot or in ``__dict__``, instead of computing the value."""
    return name in getattr(value, "__dict__", ()) or name in _slots(type(value))


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
