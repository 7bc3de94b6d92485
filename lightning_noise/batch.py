"""Batches of any type: their leaves, the selection of leaves, and changed copies.

A leaf is a tensor. Its path is the tuple of keys, indices and attribute names that leads to the leaf. A path with ``*`` leads
to the leaves of all samples in a list, such as images of different sizes. A changed copy shares all objects with the original,
except the containers on the paths of the changed leaves. Tree utilities that rebuild the whole batch lose what they do not
know.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_noise._usage import nearest

__all__ = [
    "TARGETS",
    "Path",
    "Selector",
    "describe",
    "find_inputs",
    "find_target",
    "format_path",
    "get",
    "holds_samples",
    "is_sequence",
    "leaves",
    "map_tensors",
    "modify",
    "resolve",
    "select",
    "select_one",
    "write_access",
]

Path = tuple[Any, ...]
Selector = int | str | Sequence[int | str]

_EACH = "*"
_CHANNELS = (1, 3, 4)  # of images
_LISTED = 12  # leaves in a message
TARGETS = ("label", "labels", "target", "targets", "y")
# as tuples, because each union with | is made anew; a list needs no slow check of an abstract class
_LISTS = (list, MutableSequence)
_ATOMS = (Tensor, str, bytes, int, float, complex, type)


def leaves(batch: Any) -> Iterator[tuple[Path, Tensor]]:
    """Returns an iterator over every leaf with its path, depth first.

    Example:
        >>> import torch
        >>> [format_path(path) for path, _ in leaves({"x": [torch.zeros(2), torch.ones(2)], "id": "a"})]
        ['x.0', 'x.1']
    """
    return _walk(batch, (), ())


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
    selectors = _as_list(selector)
    return {path: leaf for part in selectors for path, leaf in _select(batch, part, absent)}


def resolve(batch: Any, selector: int | str) -> list[tuple[Path, Any]]:
    """Returns whatever an index, a key or a dotted path means, leaf or not, with its path."""
    found: list[tuple[Path, Any]] = [((), batch)]
    for part in [] if selector == "" else str(selector).split("."):
        found = _step(found, part)
    return found


def select_one(batch: Any, selector: int | str, kind: str) -> Tensor:
    """Returns the only leaf that a selector selects; ``kind`` names the leaf in messages, such as ``"mask"``."""
    return get(batch, _only(select(batch, selector), selector, kind))


def modify(batch: Any, paths: Iterable[Path], function: Callable[[Any, Path], Any]) -> Any:
    """Returns a copy of the batch with the leaves ``function(leaf, path)``; everything off the paths is the same object.

    At a path with ``*``, the function takes and returns a list with the leaf of each sample. A container whose copy shares its
    content with the original is a TypeError.

    Example:
        >>> import torch
        >>> batch = {"x": (torch.zeros(2), torch.ones(2)), "y": torch.ones(1)}
        >>> new = modify(batch, [("x", 0)], lambda leaf, path: leaf + 5)
        >>> new["x"][0], new["x"][1] is batch["x"][1], batch["x"][0]
        (tensor([5., 5.]), True, tensor([0., 0.]))
    """
    changes: dict[Any, Any] = {}  # nested, as the batch is
    for path in dict.fromkeys(paths):
        new = function(get(batch, path), path)
        places = zip(_places(batch, path), new, strict=True) if isinstance(new, list) else [(path, new)]
        for place, leaf in places:
            if not place:
                return leaf
            container = changes
            for key in place[:-1]:
                container = container.setdefault(key, {})
            container[place[-1]] = leaf
    return _modify(batch, changes)


def get(batch: Any, path: Path) -> Any:
    """Returns what is at a path; with ``*``, the list of what is at the path in each sample.

    Example:
        >>> get([{"x": 1}, {"x": 2}], (1, "x")), get([{"x": 1}, {"x": 2}], ("*", "x"))
        (2, [1, 2])
    """
    for i, key in enumerate(path):
        if key == _EACH and is_sequence(batch):
            return [get(sample, path[i + 1 :]) for sample in batch]
        batch = _child(batch, key)
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
    return _copy(batch, change, {})


def find_inputs(batch: Any, inputs: Selector | None = None, *, absent: bool = False) -> list[Path]:
    """Returns the paths of the inputs of the model, as :func:`select` does.

    An input is a tensor with a row for each sample, or a list with a tensor for each sample; see :func:`holds_samples`. The
    path of such a list ends in ``*``, or has the path within each sample after it. A selector may name the list itself, too.

    Default: a bare tensor, the first element of a sequence, or else the only floating-point leaf or list of such leaves. A leaf
    whose name ends in ``mask`` or ``masks``, or is label(s), target(s) or y, does not count. If there are several, the default
    is a ValueError, whose message lists all leaves.

    Raises:
        TypeError: If an input is part of a packed sequence.
        ValueError: If a selector selects nothing, or if samples cannot be told from inputs with rows.

    Example:
        >>> import torch
        >>> images = [torch.ones(3, 8, 9), torch.ones(3, 9, 8)]
        >>> find_inputs((images, [{"boxes": torch.ones(5, 4)}, {"boxes": torch.ones(1, 4)}]))
        [(0, '*')]
    """
    if inputs is None:
        paths = _default_inputs(batch)
    else:
        selectors = _as_list(inputs)
        paths = list(dict.fromkeys(path for selector in selectors for path in _select_inputs(batch, selector, absent)))
        if not paths and not absent:
            raise ValueError(f"inputs={inputs!r} selects nothing; {_list_leaves(batch)}")
    for path in paths:
        _refuse_packed(batch, path)
    return paths


def holds_samples(batch: Any, path: Path, rest: Path = ()) -> bool | None:
    """Returns whether each element of a list is a sample, and not an input with a row for each sample.

    Beside the list of a batch of 8 samples, whatever counts the samples has 8 entries: labels, or a list of targets. So the
    list holds samples if one of the others has as many entries as the list, and none as many as each of the tensors has rows.
    It holds inputs in the opposite case. If elements are themselves containers, those of a sample hold numbers, strings or
    tensors of several lengths; tensors of one length are the rows of a batch.

    If both or neither are found, shapes decide: tensors of three axes with 1, 3 or 4 channels first are images, of four axes
    with the channels second are batches of images. In any other case, both means inputs with rows, and neither is ``None``.

    Args:
        batch: A batch.
        path: The path of a list or tuple.
        rest: The path of a tensor within each element.

    Example:
        >>> import torch
        >>> one, two, labels = torch.ones(7, 2), torch.ones(9, 2), torch.zeros(2)
        >>> holds_samples(([one, two], labels), (0,)), holds_samples(([one, one], torch.zeros(7)), (0,))
        (True, False)
    """
    elements = list(get(batch, path))
    tensors = [get(element, rest) for element in elements]
    if len({(leaf.dtype, leaf.ndim) for leaf in tensors}) > 1:  # samples are of one kind
        return False
    rows = {leaf.shape[0] if leaf.ndim else -1 for leaf in tensors}
    if rest:
        evidence = {_is_one_sample(element) for element in elements} - {None} if len(elements) > 1 else set()
    else:
        beside = set(_counts_beside(batch, path))
        signs = {True: len(elements) in beside, False: len(rows) == 1 and rows <= beside}
        evidence = {kind for kind, seen in signs.items() if seen}
    if len(evidence) == 1:
        return evidence.pop()
    if all(leaf.ndim == 3 and leaf.shape[0] in _CHANNELS for leaf in tensors):
        return True
    is_batch = all(leaf.ndim == 4 and leaf.shape[1] in _CHANNELS for leaf in tensors) and len(rows) == 1
    return False if is_batch or evidence else None


def find_target(batch: Any, target: int | str | None = None) -> Path:
    """Returns the path of the target, a single leaf.

    Default: the second element of a sequence; elsewhere the only leaf named label(s), target(s) or y, or else the only leaf of
    integers. If there are several, the default is a ValueError, whose message lists all leaves.
    """
    if target is not None:
        return _only(select(batch, target), target, "target")
    if is_sequence(batch):
        candidates = [_children(batch)[1][:1]] if len(batch) > 1 and isinstance(batch[1], Tensor) else []
    else:
        named = [path for path, _ in leaves(batch) if path and path[-1] in TARGETS]
        candidates = named or [path for path, leaf in leaves(batch) if path and _is_integer(leaf)]
    if len(candidates) != 1:
        raise ValueError(f"which leaf is the target? {_suggest(batch, 'target', candidates)}")
    return candidates[0]


def write_access(value: Any, path: Path) -> str:
    """Returns a path as Python that picks the leaf of a value.

    Example:
        >>> write_access({"x": [1, 2]}, ("x", 0))
        "['x'][0]"
    """
    path = path[: path.index(_EACH)] if _EACH in path else path  # a list of samples
    is_item = [isinstance(get(value, path[:i]), Mapping | list | tuple) for i in range(len(path))]
    return "".join(f"[{key!r}]" if item else f".{key}" for key, item in zip(path, is_item, strict=True))


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
    shape = "nested" if value.is_nested else tuple(value.shape)  # a nested tensor may have no shape
    return f"{str(value.dtype).removeprefix('torch.')} {shape}"


def _default_inputs(batch: Any) -> list[Path]:
    if isinstance(batch, Tensor):
        return [()]
    if is_sequence(batch) and len(batch) and isinstance(batch[0], Tensor):
        return [(0,)]
    if is_sequence(batch) and len(batch) and _holds_tensors(batch[0]) and holds_samples(batch, (0,)):
        return [(0, _EACH)]
    floating = [path for path, leaf in leaves(batch) if leaf.is_floating_point() or leaf.is_complex()]
    names = {path: next((key for key in reversed(path) if isinstance(key, str)), "") for path in floating}
    floating = [path for path, name in names.items() if not name.lower().endswith(("mask", "masks")) and name not in TARGETS]
    # what is in a list of containers, such as boxes, is no candidate beside what is not
    outside = [path for path in floating if all(i == len(path) - 1 for i in _lists_of(batch, path))] or floating
    candidates = list(dict.fromkeys(_list_of_samples(batch, path) or path for path in outside))
    if not floating and any(_is_integer(leaf) for _, leaf in leaves(batch)):
        masks = [f"mask={path[-1]!r}" for path, _ in leaves(batch) if path and str(path[-1]).lower().endswith("mask")]
        raise ValueError(
            f"no leaf is floating-point. Noise for token ids is in their embeddings: type EmbeddingNoise({', '.join(masks)}) "
            f"in place of a noise, or inputs=… for another input; {_list_leaves(batch)}"
        )
    if len(candidates) != 1:
        raise ValueError(f"which leaf is the input? {_suggest(batch, 'inputs', candidates)}")
    return candidates


def _as_list(selector: Any) -> list[int | str]:
    if isinstance(selector, int | str):
        return [selector]
    is_list = isinstance(selector, Sequence)
    wrong = [part for part in selector if not isinstance(part, int | str)] if is_list else [selector]
    if wrong:
        found = f"a list with {describe(wrong[0])}" if is_list else describe(selector)
        raise TypeError(f"expected the name of a leaf, such as 'image' or 0, or a list of names, got {found}")
    return list(selector)


def _list_of_samples(batch: Any, path: Path) -> Path | None:
    """Returns the path of the list of samples to which a leaf belongs, or ``None``."""
    for i in _lists_of(batch, path):
        if holds_samples(batch, path[:i], path[i + 1 :]):
            return (*path[:i], _EACH, *path[i + 1 :])
    return None


def _lists_of(batch: Any, path: Path) -> Iterator[int]:
    """Yields where a path enters a sequence in all elements of which it goes on."""
    for i in range(len(path)):
        container = get(batch, path[:i])
        if is_sequence(container) and all(_has(element, path[i + 1 :]) for element in container):
            yield i


def _is_one_sample(element: Any) -> bool | None:
    """Returns whether a container holds one sample and not a batch, or ``None`` if it holds only one tensor."""
    counts = {count for _, child in _children(element) for count in _counts(child)}
    if len(list(leaves(element))) > 1 or -1 in counts:
        return len(counts) > 1
    return None


def _select_inputs(batch: Any, selector: int | str, absent: bool) -> list[Path]:
    """Returns the paths of the inputs that a selector selects: leaves, or lists of samples."""
    parts = [] if selector == "" else str(selector).split(".")
    if _EACH not in parts:
        found = resolve(batch, selector)
        for path, value in found:
            if isinstance(value, PackedSequence):
                _refuse_packed(batch, (*path, "data"))
        lists = [path for path, value in found if is_sequence(value) and _holds_tensors(value)]
        for path in lists:
            if holds_samples(batch, path) is False:
                raise ValueError(
                    f"inputs={selector!r} is a list of inputs with a row for each sample; type "
                    f"inputs={format_path((*path, _EACH))!r} for all of them; {_list_leaves(batch)}"
                )
        return [(*path, _EACH) for path in lists] or list(select(batch, selector, absent=absent))
    found, star = list(select(batch, selector, absent=absent)), len(parts) - 1 - parts[::-1].index(_EACH)
    return list(dict.fromkeys(_sample_or_input(batch, path, star, selector) for path in found))


def _sample_or_input(batch: Any, path: Path, star: int, selector: int | str) -> Path:
    """Returns the path of the list of samples to which a selected leaf belongs, or else the path of the leaf."""
    head, rest = path[:star], path[star + 1 :]
    if star not in _lists_of(batch, path):  # or a loader has ended before the others
        return path
    is_sample = holds_samples(batch, head, rest)
    if is_sample is None:
        names = [format_path((*head, i, *rest)) for i in range(len(get(batch, head)))]
        raise ValueError(
            f"inputs={selector!r} may be a list of samples or several inputs; type inputs={format_path(head)!r} if each tensor "
            f"is a sample, or inputs={names} if each has a row for each sample; {_list_leaves(batch)}"
        )
    return (*head, _EACH, *rest) if is_sample else path


def _refuse_packed(batch: Any, path: Path) -> None:
    container = batch
    for i, key in enumerate(path):
        if isinstance(container, PackedSequence):
            raise TypeError(
                f"the input {format_path(path)!r} is part of a PackedSequence, in which rows are not samples; put the padded "
                "tensor and the lengths into the batch, pack them in the module, and type mask=lambda batch: torch.arange(T) < "
                'batch["lengths"][:, None]'
            )
        if key == _EACH or i == len(path) - 1:
            return
        container = _child(container, key)


def _counts(value: Any) -> Iterator[int]:
    """Yields how many entries a value has: rows of tensors and elements of lists. Anything that has no entries counts -1."""
    if isinstance(value, Tensor):
        yield value.size(0) if value.ndim else -1
    elif is_sequence(value):
        yield len(value)
        if _holds_tensors(value) and len({len(leaf) if leaf.ndim else -1 for leaf in value}) == 1:
            yield from _counts(value[0])
    elif children := _children(value):
        for _, child in children:
            yield from _counts(child)
    else:
        yield -1


def _counts_beside(batch: Any, path: Path) -> Iterator[int]:
    """Yields the counts of everything off a path."""
    for i, key in enumerate(path):
        for other, child in _children(get(batch, path[:i])):
            if other != key:
                yield from _counts(child)


def _holds_tensors(value: Any) -> bool:
    return is_sequence(value) and len(value) > 0 and all(isinstance(element, Tensor) for element in value)


def _has(value: Any, path: Path) -> bool:
    for key in path:
        children = dict(_children(value))
        if key not in children:
            return False
        value = children[key]
    return isinstance(value, Tensor)


def _places(batch: Any, path: Path) -> list[Path]:
    """Returns the paths of all leaves at a path."""
    i = path.index(_EACH) if _EACH in path else -1
    if i < 0 or not is_sequence(samples := get(batch, path[:i])):
        return [path]
    return [(*path[:i], j, *path[i + 1 :]) for j in range(len(samples))]


def _walk(value: Any, path: Path, ancestors: tuple[int, ...]) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif id(value) not in ancestors:  # objects may point back at their owner
        for key, child in _children(value):
            yield from _walk(child, (*path, key), (*ancestors, id(value)))


def _modify(value: Any, changes: Any) -> Any:
    """Returns the value with the changes of its children: new leaves, or the changes of theirs."""
    changed = {}
    for key, change in changes.items():
        child = _child(value, key)
        new = _modify(child, change) if isinstance(change, dict) else change
        if new is not child:
            changed[key] = new
    return _with(value, changed) if changed else value


def _with(batch: Any, changed: dict[Any, Any]) -> Any:
    """Returns a copy with other values for some children."""
    if type(batch) is list or type(batch) is dict:
        result = batch.copy()
        for key, value in changed.items():
            result[key] = value
        return result
    if _is_namedtuple(batch):
        return batch._replace(**changed)
    if isinstance(batch, tuple):
        return type(batch)([changed.get(index, child) for index, child in enumerate(batch)])
    result, before = copy.copy(batch), {key: _child(batch, key) for key in changed}
    for key, value in changed.items():
        _set(result, key, value)
    if any(_child(batch, key) is value for key, value in changed.items()):
        for key, value in before.items():
            _set(batch, key, value)
        raise TypeError(f"a copy of {type(batch).__name__} shares its content with the original; let it define __copy__")
    return result


def _set(batch: Any, key: Any, value: Any) -> None:
    container: Any = batch
    if isinstance(batch, MutableSequence | Mapping):
        container[key] = value
    elif _is_stored(batch, key):
        object.__setattr__(batch, key, value)  # it may be frozen
    else:
        setattr(batch, key, value)


def _select(batch: Any, selector: int | str, absent: bool) -> list[tuple[Path, Tensor]]:
    found: list[tuple[Path, Any]] = [((), batch)]
    for part in str(selector).split("."):
        found = _step(found, part)
        if absent and found:
            found = [(path, value) for path, value in found if value is not None]
            if not found:
                return []
    if not found or not all(isinstance(value, Tensor) for _, value in found):
        # a key may have dots in it
        found = [(path, leaf) for path, leaf in leaves(batch) if format_path(path) == str(selector)]
    if not found:
        names = [format_path(path) for path, _ in leaves(batch)]
        place = selector if isinstance(selector, int) else -1
        close = names[place] if 0 <= place < len(names) else nearest(selector, names, 0.7)
        advice = f"type {close!r}; " if close else ""
        raise ValueError(f"no leaf {selector!r} in the batch; {advice}{_list_leaves(batch)}")
    return found


def _step(found: list[tuple[Path, Any]], part: str) -> list[tuple[Path, Any]]:
    return [((*path, key), child) for path, value in found for key, child in _matching(value, part)]


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
    every = [f"{format_path(path)!r} {describe(leaf)}" for path, leaf in leaves(batch)]
    more = [f"and {len(every) - _LISTED} more"] if len(every) > _LISTED else []
    found = ", ".join([*every[:_LISTED], *more])
    return f"leaves are: {found}." if found else f"the batch, of type {describe(batch)}, holds no tensor."


def _is_integer(leaf: Tensor) -> bool:
    return not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)


def _copy(value: Any, change: Callable[[Tensor], Tensor], memo: dict[int, tuple[Any, Any]]) -> Any:
    """Returns a changed copy. The memo has each copy beside its original, so that Python does not give its id again."""
    # no closure: one that calls itself is a cycle, and would keep its batch until the garbage is collected
    if id(value) not in memo:
        memo[id(value)] = value, value  # objects may point back at their owner
        memo[id(value)] = value, change(value) if isinstance(value, Tensor) else _copy_parts(value, change, memo)
    return memo[id(value)][1]


def _copy_parts(value: Any, change: Callable[[Tensor], Tensor], memo: dict[int, tuple[Any, Any]]) -> Any:
    if type(value) not in (list, tuple, dict, set) and next(leaves(value), None) is None:
        return value
    changed = {key: part for key, child in _children(value) if (part := _copy(child, change, memo)) is not child}
    return value if isinstance(value, tuple) and not changed else _with(value, changed)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if is_sequence(value):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in value.keys()]  # noqa: SIM118 (a TensorDict iterates over its rows)
    if _is_namedtuple(value):
        return list(zip(value._fields, value, strict=True))
    if value is None or isinstance(value, _ATOMS) or _is_no_container(value):
        return []
    return [(name, getattr(value, name)) for name in _attributes(value) if hasattr(value, name)]


def _child(value: Any, key: Any) -> Any:
    return value[key] if type(key) is int or isinstance(value, Mapping) else getattr(value, key)


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


def is_sequence(value: Any) -> bool:
    """Returns whether a container has indices, and not names, for its elements."""
    if isinstance(value, tuple):
        return not _is_namedtuple(value)
    return isinstance(value, _LISTS) and not isinstance(value, bytearray)


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
