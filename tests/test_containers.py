"""Batches of other libraries and of combined loaders get noise in a real fit, and nothing but the named leaf changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import N_FEATURES, Classifier, Rows, fit, loader, weights
from pandas import DataFrame
from pytorch_lightning.utilities import CombinedLoader
from tensordict import TensorDict, tensorclass
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader as GraphLoader

from lightning_noise import InputNoise, RobustnessMonitor, noise, schedules

CHUNKS = [Rows(6, seed=seed) for seed in range(3)]


@tensorclass
class Sample:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor
    views: tuple[Tensor, ...] = ()


class Meta(dict):
    def __init__(self, source: str, **items: Any):
        super().__init__(**items)
        self.source = source


class Image(Tensor):
    """A subclass of a tensor."""


def graphs(rows: Rows) -> Any:
    edges = torch.tensor([[0, 1], [1, 0]])
    return Batch.from_data_list(
        [Data(x=row[None], edge_index=edges[:, :0], y=y[None]) for row, y in zip(rows.x, rows.y, strict=True)]
    )


def hetero(rows: Rows) -> Any:
    graph = HeteroData()
    graph["user"].x, graph["user"].y = rows.x, rows.y
    graph["user", "knows", "user"].edge_index = torch.tensor([[0, 1], [1, 0]])
    return graph


# how rows become a batch, inputs=, and how x and y are read from it
CONTAINERS: dict[str, tuple[Callable[[Rows], Any], str | None, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "TensorDict": (lambda rows: TensorDict({"x": rows.x, "y": rows.y}, batch_size=[6]), "x", lambda b: (b["x"], b["y"])),
    "nested TensorDict": (
        lambda rows: TensorDict({"in": {"x": rows.x}, "y": rows.y}, batch_size=[6]),
        "in.x",
        lambda b: (b["in", "x"], b["y"]),
    ),
    "tensorclass": (
        lambda rows: Sample(x=rows.x, y=rows.y, batch_size=[6]),  # type: ignore[call-arg]
        "x",
        lambda b: (b.x, b.y),
    ),
    "graphs": (graphs, "x", lambda b: (b.x, b.y)),
    "graph of several kinds": (hetero, "_node_store_dict.user.x", lambda b: (b["user"].x, b["user"].y)),
    "frozen slotted dataclass": (lambda rows: Frozen(rows.x, rows.y), "x", lambda b: (b.x, b.y)),
    "views of one storage": (lambda rows: Frozen(rows.x, rows.y, (rows.x[:2], rows.x.T)), "x", lambda b: (b.x, b.y)),
    "dict that needs an argument": (lambda rows: Meta("a", x=rows.x, y=rows.y), None, lambda b: (b["x"], b["y"])),
    "subclass of a tensor": (lambda rows: [rows.x.as_subclass(Image), rows.y], None, lambda b: (b[0], b[1])),
    "data frame among the leaves": (
        lambda rows: {"x": rows.x, "y": rows.y, "table": DataFrame({"x": range(6)}), "names": ["a"] * 6},
        None,
        lambda b: (b["x"], b["y"]),
    ),
}


class Batches(Dataset):
    def __init__(self, build: Callable[[Rows], Any]):
        self.batches = [build(rows) for rows in CHUNKS]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Any:
        return self.batches[i]


def as_it_is(batch: Any) -> Any:
    return batch


class Reading(Classifier):
    """Takes batches as they are, on the CPU: Lightning's own transfer refuses frozen dataclasses."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]):
        super().__init__()
        self.read = read

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        x, y = self.read(batch)
        return F.cross_entropy(self(x.as_subclass(Tensor)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def parts(batch: Any) -> dict[Any, Any]:
    """Everything that a user can read of a batch."""
    if isinstance(batch, HeteroData):
        return {f"{store._key}.{key}": value for store in batch.stores for key, value in store.items()}
    if isinstance(batch, Frozen):
        return {"x": batch.x, "y": batch.y, "views": batch.views}
    if isinstance(batch, TensorDict):
        return dict(batch.items(include_nested=True, leaves_only=True))
    if isinstance(batch, Data):
        return dict(batch.items())  # type: ignore[operator]
    return dict(enumerate(batch)) if isinstance(batch, list) else dict(batch.items())


@pytest.mark.parametrize(("build", "inputs", "read"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_comes_back_of_its_type_with_all_but_the_named_leaf_the_same_object(build, inputs, read):
    data = Batches(build)
    before = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in parts(b).items()} for b in data.batches
    ]
    train = DataLoader(data, batch_size=None, collate_fn=as_it_is)
    callback = InputNoise(noise.Gaussian(), 0.5, inputs=inputs)
    module, _ = fit([callback], module=lambda: Reading(read), train=train, validation=train, max_epochs=1)
    assert len(module.seen) == 3
    for seen, batch, untouched in zip(module.seen, data.batches, before, strict=True):
        assert type(seen) is type(batch)
        noisy, clean = parts(seen), parts(batch)
        changed = [key for key in clean if noisy[key] is not clean[key]]
        assert len(changed) == 1
        x, y = read(batch)
        assert clean[changed[0]] is x
        assert type(read(seen)[0]) is type(x)
        assert not torch.equal(read(seen)[0], x)
        assert read(seen)[1] is y
        for key, value in untouched.items():
            assert torch.equal(clean[key], value) if isinstance(value, Tensor) else clean[key] is value


def test_a_tensordict_keeps_its_batch_size_and_a_batch_of_graphs_its_graphs():
    td = TensorDict({"x": CHUNKS[0].x, "in": {"z": CHUNKS[0].x}}, batch_size=[6])
    seen = {}

    class Keeping(Reading):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen[type(batch)] = batch
            return super().training_step(batch, batch_idx)

    for batch, path in ((td, "in.z"), (graphs(CHUNKS[0]), "x")):
        module = Keeping(lambda b: (b["x"], CHUNKS[0].y))
        train = DataLoader([batch], batch_size=None, collate_fn=as_it_is)  # type: ignore[arg-type]
        fit([InputNoise(noise.Gaussian(), 0.5, inputs=path)], module=module, train=train, validation=train, max_epochs=1)
    assert seen[TensorDict].batch_size == seen[TensorDict]["in"].batch_size == torch.Size([6])
    graph = seen[type(graphs(CHUNKS[0]))]
    assert graph.num_graphs == 6
    assert torch.equal(torch.cat([part.x for part in graph.to_data_list()]), graph.x)


def test_a_loader_of_graphs_gets_noise_and_a_monitor():
    class Graphs(Reading):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    data = [graph for rows in CHUNKS for graph in graphs(rows).to_data_list()]
    module = Graphs(lambda b: (b.x, b.y))
    monitor = RobustnessMonitor(noise.Gaussian(), [0.1, 3.0], inputs="x", target="y")
    _, trainer = fit(
        [InputNoise(noise.Gaussian(), 0.5, inputs="x"), monitor],
        module=module,
        train=GraphLoader(data, batch_size=4),
        validation=GraphLoader(data, batch_size=5),
    )
    assert not torch.equal(module.seen[0].x, data[0].x)
    values = trainer.callback_metrics
    assert values["robustness_levels/gaussian/3/accuracy"] < values["robustness/accuracy_clean"]


# --- loaders


class Pairs(Reading):
    """Reads what a combined loader of two gives, of which one part may be absent."""

    def __init__(self):
        super().__init__(lambda batch: (torch.empty(0), torch.empty(0)))

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.seen.append(batch)
        given = [part for part in batch.values() if part is not None]
        return sum((F.cross_entropy(self(x), y) for x, y in given), torch.zeros(()))


@pytest.mark.parametrize(("mode", "n_batches"), [("min_size", 2), ("max_size", 3), ("max_size_cycle", 3)])
@pytest.mark.parametrize("inputs", ["*.0", ["long.0", "short.0"], "short.0"], ids=repr)
def test_the_parts_of_a_combined_loader_get_noise_where_they_are_there(mode, n_batches, inputs):
    data = {"long": Rows(24), "short": Rows(16, seed=1)}
    train = CombinedLoader({key: loader(rows) for key, rows in data.items()}, mode)
    module, _ = fit([InputNoise(noise.Gaussian(), 0.5, inputs=inputs)], module=Pairs, train=train, max_epochs=1)
    assert len(module.seen) == n_batches
    for i, batch in enumerate(module.seen):
        for key, rows in data.items():
            if mode == "max_size" and key == "short" and i == 2:
                assert batch[key] is None
                continue
            start = 8 * i % len(rows)
            clean = rows.x[start : start + 8]
            named = inputs != "short.0" or key == "short"
            assert torch.equal(batch[key][0], clean) is not named
    if mode != "max_size":
        assert len({batch["short"][0].sum().item() for batch in module.seen}) == n_batches  # no draw comes twice


def test_every_part_of_a_combined_loader_of_bare_tensors_gets_noise():
    train = CombinedLoader({"long": DataLoader(Rows(24).x, 8), "short": DataLoader(Rows(16).x, 8)}, "max_size")  # type: ignore[arg-type]

    class Bare(Pairs):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            self.seen.append(batch)
            return sum((self(x).square().mean() for x in batch.values() if x is not None), torch.zeros(()))

    module, _ = fit([InputNoise(noise.Gaussian(), 0.5, inputs="*")], module=Bare, train=train, max_epochs=1)
    assert [sorted(key for key, x in batch.items() if x is not None) for batch in module.seen] == 2 * [["long", "short"]] + [
        ["long"]
    ]
    assert not torch.equal(module.seen[2]["long"], Rows(24).x[16:])


def test_a_part_that_is_absent_from_the_first_batch_is_an_error():
    train = DataLoader([{"a": [torch.zeros(4, N_FEATURES), torch.zeros(4).long()], "b": None}], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no leaf 'b\.0' in the batch; leaves are: 'a\.0' float32"):
        fit([InputNoise(noise.Gaussian(), 0.5, inputs="b.0")], module=Pairs, train=train)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(Rows().x, Rows().y, strict=True))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 24


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("run", [{"max_steps": 6, "max_epochs": -1}, {"max_epochs": 2}], ids=repr)
@pytest.mark.parametrize("stream", [Stream, SizedStream])
def test_a_stream_gets_the_noise_of_a_data_set(stream, run):
    # in a run of epochs of unknown length the fraction counts whole epochs
    level = 0.5 if "max_epochs" in run and run["max_epochs"] > 0 else schedules.Linear(0.0, 0.5)
    one, _ = fit([InputNoise(noise.Gaussian(), level)], train=loader(stream()), **run)
    two, _ = fit([InputNoise(noise.Gaussian(), level)], train=loader(Rows()), **run)
    assert all(torch.equal(x, y) for x, y in zip(weights(one), weights(two), strict=True))
    assert len(one.seen) == 6
