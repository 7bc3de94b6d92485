"""A leaf of any batch is found, read and replaced, and nothing else changes."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pandas import DataFrame
from torch import Tensor

from lightning_noise.batch import find_inputs, find_target, format_path, get, leaves, map_tensors, modify, select, select_one

X, Y, IDS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
Pair = namedtuple("Pair", ["image", "label"])


@dataclass
class Sample:
    image: Tensor
    label: Tensor
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    image: Tensor
    label: Tensor
    built: int = field(init=False, default=3)


@dataclass
class Unset:
    image: Tensor
    later: int = field(init=False)


@dataclass(slots=True)
class Slotted:
    image: Tensor
    label: Tensor


@dataclass(frozen=True, slots=True)
class FrozenSlotted:
    image: Tensor
    label: Tensor


class Slots:
    """No dataclass."""

    __slots__ = ("image", "label", "unset")

    def __init__(self, image, label):
        self.image, self.label = image, label


class Guarded:
    """Computes one attribute and refuses to set others."""

    def __init__(self, image, label):
        vars(self).update(image=image, label=label)

    def __setattr__(self, name, value):
        raise AttributeError(name)

    @property
    def twice(self):
        raise AssertionError("a property was read")


class Named(dict):
    """A dict that needs an argument."""

    def __init__(self, name, **items):
        super().__init__(**items)
        self.name = name


class Keyed:
    """Reads and sets its keys as attributes and is callable, as graphs are."""

    def __init__(self, **items):
        vars(self)["_items"] = items

    def keys(self):
        return list(self._items)

    def __call__(self, *names):
        raise AssertionError("a batch was called")

    def __getitem__(self, key):
        raise AssertionError("a graph of several kinds makes a new kind of what is asked for")

    def __getattr__(self, name):
        try:
            return vars(self)["_items"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self._items[name] = value

    def __copy__(self):
        return Keyed(**self._items)


class Answering(dict):
    """Answers for every attribute."""

    def __getattr__(self, name):
        return self.get(name)


class Wrapped:
    """An object with a method."""

    def __init__(self, image):
        self.image = image


class Owner:
    """An object that a child points back at."""

    def __init__(self):
        self.image = X
        self.child = SimpleNamespace(owner=self, label=Y)


# batch, inputs=, path of the input
BATCHES: dict[str, tuple[Any, Any, tuple]] = {
    "bare tensor": (X, None, ()),
    "list": ([X, Y], None, (0,)),
    "tuple": ((X, Y, None, "id", 3), None, (0,)),
    "list by index": ([IDS, X], 1, (1,)),
    "namedtuple": (Pair(X, Y), None, ("image",)),
    "namedtuple by name": (Pair(X, Y), "image", ("image",)),
    "namedtuple by index": (Pair(Y, X), 1, ("label",)),
    "dict": ({"image": X, "label": Y}, None, ("image",)),
    "dict by key": ({"a": X, "image": X.clone(), "none": None, "path": "x.png", "n": 7}, "image", ("image",)),
    "dict with integer keys": ({0: X, 1: Y}, 0, (0,)),
    "mapping": (UserDict(image=X, label=Y), "image", ("image",)),
    "nested": ({"data": [{"x": X}, Y], "meta": {"ids": IDS}}, "data.0.x", ("data", 0, "x")),
    "tuple of dicts": (({"a": X, "b": IDS}, Y), "0.a", (0, "a")),
    "key with dots": ({"left.png": X, "cls": Y}, "left.png", ("left.png",)),
    "nested key with dots": ({"v": {"a.b": X, "c": Y}}, "v.a.b", ("v", "a.b")),
    "only floating leaf": (({"a": X, "b": IDS}, Y), None, (0, "a")),
    "dataclass": (Sample(X, Y), "image", ("image",)),
    "frozen dataclass": (Frozen(X, Y), "image", ("image",)),
    "dataclass with an unset field": (Unset(X), "image", ("image",)),
    "slotted dataclass": (Slotted(X, Y), "image", ("image",)),
    "frozen slotted dataclass": (FrozenSlotted(X, Y), None, ("image",)),
    "slots": (Slots(X, Y), None, ("image",)),
    "guarded object": (Guarded(X, Y), "image", ("image",)),
    "keys as attributes": (Keyed(image=X, label=Y), "image", ("image",)),
    "ordered dict": (OrderedDict(image=X, label=Y), None, ("image",)),
    "default dict": (defaultdict(list, image=X, label=Y), None, ("image",)),
    "dict that needs an argument": (Named("a", image=X, label=Y), None, ("image",)),
    "data frame among the leaves": ({"image": X, "table": DataFrame({"a": [1, 2]}, index=["c", "d"])}, None, ("image",)),
    "dict that answers for every attribute": (Answering(image=X, label=Y), "image", ("image",)),
    "functions and modules among the leaves": (
        {"image": X, "f": format_path, "m": torch, "b": [].append, "c": Wrapped},
        None,
        ("image",),
    ),
    "method among the leaves": ({"image": X, "method": Wrapped(Y).__init__, "lambda": lambda: X}, None, ("image",)),
    "object": (SimpleNamespace(image=X, label=Y), "image", ("image",)),
    "object with a cycle": (Owner(), "image", ("image",)),
}


@pytest.mark.parametrize(("batch", "inputs", "path"), BATCHES.values(), ids=BATCHES)
def test_the_input_is_found_and_replaced_and_all_else_is_the_same_object(batch, inputs, path):
    assert find_inputs(batch, inputs) == [path]
    original = get(batch, path)
    assert torch.equal(original, X)
    before = list(leaves(batch))
    value = torch.ones(1)
    result = modify(batch, [path], lambda leaf, path: value)
    assert type(result) is type(batch) or result is value
    assert get(result, path) is value
    assert get(batch, path) is original, "the batch itself was changed"
    for one, (where, leaf) in zip(leaves(batch), before, strict=True):
        assert one[0] == where
        assert one[1] is leaf
    for where, leaf in before:
        if where != path and path[:1] != where[:1]:
            assert get(result, where) is leaf


def test_only_containers_on_the_path_are_copied():
    batch = {"data": [{"x": X}, {"x": X}], "meta": {"ids": IDS}}
    result = modify(batch, [("data", 0, "x")], lambda leaf, path: Y)
    assert result["data"] is not batch["data"]
    assert result["data"][1] is batch["data"][1]
    assert result["meta"] is batch["meta"]


def test_a_star_is_every_element_and_a_list_is_several_leaves():
    batch = ((X, X, [X]), {"a": X, "b": X}, Y)
    assert find_inputs(batch, "1.*") == [(1, "a"), (1, "b")]
    assert find_inputs(batch, ["0.0", "0.2.0", "1.b"]) == [(0, 0), (0, 2, 0), (1, "b")]
    assert find_inputs(Pair(X, X), "*") == [("image",), ("label",)]


def test_the_target_is_the_second_of_a_sequence_or_what_is_said():
    assert find_target([X, Y]) == (1,)
    assert find_target(Pair(X, Y)) == ("label",)
    assert find_target({"label": Y}, "label") == ("label",)


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        ({"image": X, "label": Y}, ("label",)),
        ({"x": X, "y": X}, ("y",)),
        ({"ids": IDS, "mask": IDS, "labels": Y}, ("labels",)),
        ({"x": X, "class": Y, "valid": Y > 0}, ("class",)),
        ({"meta": {"target": Y}, "id": IDS}, ("meta", "target")),
        (Sample(X, Y), ("label",)),
    ],
    ids=str,
)
def test_the_target_of_a_mapping_is_the_only_leaf_of_that_name_or_the_only_integers(batch, path):
    assert find_target(batch) == path


@pytest.mark.parametrize(
    ("batch", "typed"),
    [
        (X, ""),
        ([X], r"Type target=…, such as target=0; "),
        ([X, {"label": Y}], r"Type target=…, such as target=0; "),
        ({"a": IDS, "b": Y}, r"Type target=…, such as target='a'; "),
        ({"x": X, "meta": {"label": Y, "y": Y}}, r"Type target=…, such as target='meta\.label'; "),
        ({"x": X}, r"Type target=…, such as target='x'; "),
    ],
    ids=str,
)
def test_a_target_that_must_be_said_is_asked_for(batch, typed):
    with pytest.raises(ValueError, match=rf"which leaf is the target\? {typed}leaves are"):
        find_target(batch)


def test_leaves_on_several_paths_are_changed_at_once_and_in_one_copy():
    batch = {"data": [X, IDS, X], "y": Y}
    seen = []

    def changed(leaf, path):
        seen.append(path)
        return leaf + 1

    result = modify(batch, select(batch, ["data.0", "y", "data.2"]), changed)
    assert seen == [("data", 0), ("y",), ("data", 2)]
    assert torch.equal(result["data"][2], X + 1)
    assert result["data"][1] is IDS
    assert batch["data"][0] is X


@pytest.mark.parametrize("paths", [[], [("x",)]])
def test_a_batch_in_which_nothing_changes_is_the_batch_itself(paths):
    batch = {"x": X}
    assert modify(batch, paths, lambda leaf, path: leaf) is batch


def test_a_leaf_of_another_kind_is_selected_and_must_be_one():
    assert select_one({"mask": Y, "x": X}, "mask", "mask") is Y
    with pytest.raises(ValueError, match="one leaf must be the mask"):
        select_one([X, Y], "*", "mask")


def test_a_target_of_several_leaves_is_refused():
    with pytest.raises(ValueError, match=r"one leaf must be the target, but '1\.\*' means 1.a, 1.b"):
        find_target([X, {"a": Y, "b": Y}], "1.*")


@pytest.mark.parametrize("wrong", ["img", "image.0", 5, "meta", "meta.*.x"])
def test_a_wrong_path_lists_the_leaves(wrong):
    batch = {"image": X, "label": Y, "meta": {"weights": [X[0]]}}
    with pytest.raises(ValueError, match="no leaf") as error:
        find_inputs(batch, wrong)
    listing = "leaves are: 'image' float32 (4, 3), 'label' int64 (4,), 'meta.weights.0' float32 (3,)."
    assert str(error.value).startswith(f"no leaf {wrong!r} in the batch; ")
    assert str(error.value).endswith(listing)


def test_a_container_whose_copies_share_their_content_is_refused_and_stays_as_it_was():
    class Store(MutableMapping):
        def __init__(self, **items):
            self.items_ = items

        def __getitem__(self, key):
            return self.items_[key]

        def __setitem__(self, key, value):
            self.items_[key] = value

        def __delitem__(self, key):
            del self.items_[key]

        def __iter__(self):
            return iter(self.items_)

        def __len__(self):
            return len(self.items_)

    class Bag:
        def __init__(self, **items):
            vars(self)["store"] = items

        def keys(self):
            return list(self.store)

        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            return vars(self)["store"][name]

        def __setattr__(self, name, value):
            self.store[name] = value

    for kind in (Store, Bag):
        batch = kind(image=X, label=Y)
        with pytest.raises(TypeError, match=rf"a copy of {kind.__name__} shares its content with the original"):
            modify(batch, [("image",)], lambda leaf, path: Y)
        assert get(batch, ("image",)) is X


def test_an_array_is_no_container():
    @dataclass
    class Array:
        image: Tensor

        def __array__(self):
            raise AssertionError("an array was made")

    assert list(leaves({"image": X, "array": Array(Y)})) == [(("image",), X)]


def test_what_a_subclass_holds_besides_its_items_stays():
    named = modify(Named("a", image=X), [("image",)], lambda leaf, path: Y)
    assert (named.name, dict(named)) == ("a", {"image": Y})
    default = modify(defaultdict(list, image=X), [("image",)], lambda leaf, path: Y)
    assert default.default_factory is list


def test_what_is_none_in_the_place_of_a_leaf_can_be_left_out():
    batch = {"a": [X, Y], "b": None}
    assert find_inputs(batch, ["a.0", "b.0"], absent=True) == [("a", 0)]
    assert find_inputs({"a": X, "b": None}, "*", absent=True) == [("a",)]
    assert find_inputs(batch, "b", absent=True) == find_inputs(batch, "b.0.x", absent=True) == []
    for wrong in ("b", "b.0"):
        with pytest.raises(ValueError, match="no leaf"):
            find_inputs(batch, ["a.0", wrong])
    with pytest.raises(ValueError, match=r"no leaf 'a\.2'"):
        find_inputs(batch, "a.2", absent=True)


def test_a_leaf_that_is_named_twice_is_found_once():
    assert find_inputs([X, Y], ["0", 0, "*"]) == [(0,), (1,)]


def test_a_selection_of_nothing_lists_the_leaves():
    with pytest.raises(ValueError, match=r"inputs=\[\] selects nothing; leaves are: '0' float32"):
        find_inputs([X, Y], [])


def test_a_mask_is_an_input_only_if_said():
    batch = {"x": X, "attention_mask": Y.float(), "masked": torch.tensor(0)}
    assert find_inputs(batch) == [("x",)]
    assert find_inputs(batch, "attention_mask") == [("attention_mask",)]
    with pytest.raises(ValueError, match=r"type EmbeddingNoise\(mask='attention_mask'\) in place of a noise"):
        find_inputs({"ids": torch.zeros(4, 3, dtype=torch.long), "attention_mask": Y.float()})


def test_a_target_is_an_input_only_if_said():
    """Noise in the labels of a text would be noise in the target, without a word."""
    assert find_inputs({"x": X, "y": X}) == [("x",)]
    assert find_inputs({"x": X, "y": X}, "y") == [("y",)]
    with pytest.raises(ValueError, match=r"no leaf is floating-point.* type EmbeddingNoise\(\) in place of a noise"):
        find_inputs({"ids": torch.zeros(4, 3, dtype=torch.long), "label": torch.rand(4)})
    with pytest.raises(ValueError, match=r"which leaf is the input\? Type inputs=…, such as inputs='y'"):
        find_inputs({"y": X})


def test_an_ambiguous_input_lists_the_leaves():
    with pytest.raises(
        ValueError, match=r"which leaf is the input\? Type inputs=…, such as inputs='a'; leaves are: 'a' float32 \(4, 3\), 'b'"
    ):
        find_inputs({"a": X, "b": X})


def test_a_batch_without_tensors_is_said_to_have_none():
    with pytest.raises(ValueError, match="the batch, of type dict, holds no tensor"):
        find_inputs({"a": "b"})


def test_a_path_is_written_as_a_user_writes_it():
    assert format_path(("data", 0, "x")) == "data.0.x"


def test_a_renewed_batch_shares_nothing_that_a_step_writes_to():
    class Plain:
        names = ("a",)

    twice, plain = torch.zeros(2), Plain()
    image = Slots(twice, [1])
    batch = {"x": twice, "image": image, "pair": (twice, {1}), "plain": plain, "size": torch.Size([2]), "own": image}
    new = map_tensors(batch, torch.clone)
    assert new["x"] is new["image"].image is new["pair"][0], "one tensor in three places"
    assert new["x"] is not twice
    assert new["own"] is new["image"] is not image
    assert new["image"].label == [1]
    assert new["image"].label is not image.label
    assert new["pair"][1] is not batch["pair"][1]
    assert new["plain"] is plain
    assert new["size"] is batch["size"]
    assert batch["image"] is image
    assert image.image is twice


def test_an_object_that_points_back_at_its_owner_is_renewed():
    batch = {"x": torch.zeros(2)}
    batch["back"] = batch  # type: ignore[assignment]
    assert map_tensors(batch, torch.clone)["x"] is not batch["x"]


def test_a_copy_is_freed_without_a_collection_of_garbage():
    gc.disable()
    try:
        new = map_tensors({"x": [torch.zeros(2)]}, torch.clone)
        tensor = weakref.ref(new["x"][0])
        del new
        assert tensor() is None
    finally:
        gc.enable()
