"""Graphs, experience, boxes and text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as GraphLoader

from lightning_noise import EmbeddingNoise, tasks
from zoo.member import Member, Module, Samples, generator, randn

# --- graphs


class Molecules(Module):
    """Predicts a number for each graph from positions and features of its nodes."""

    def __init__(self):
        super().__init__()
        self.node, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, data):
        source, to = data.edge_index
        distances = (data.pos[source] - data.pos[to]).norm(dim=1, keepdim=True)
        nodes = self.node(torch.cat([data.x, torch.zeros_like(data.x[:, :1]).index_add(0, to, distances)], 1)).relu()
        graphs = nodes.new_zeros(data.num_graphs, 8).index_add(0, data.batch, nodes)
        return self.head(graphs)

    def training_step(self, data, batch_idx):
        return F.mse_loss(self(data), data.y)

    def validation_step(self, data, batch_idx):
        self.log("mae", F.l1_loss(self(data), data.y), batch_size=data.num_graphs)


def molecule(i: int) -> Data:
    n = 2 + i % 3
    edges = torch.stack([torch.arange(n), torch.arange(n).roll(1)])
    return Data(x=randn(n, 3, seed=i), pos=randn(n, 3, seed=i + 50), edge_index=edges, y=randn(1, 1, seed=i + 99))


class Nodes(Module):
    """Classifies the nodes of the only graph; masks say for which nodes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x, edge_index):
        return self.net(x + torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]]))

    def training_step(self, data, batch_idx):
        logits = self(data.x, data.edge_index)
        return F.cross_entropy(logits[data.train_mask], data.y[data.train_mask])

    def validation_step(self, data, batch_idx):
        right = self(data.x, data.edge_index).argmax(1) == data.y
        self.log("val_acc", right[data.val_mask].float().mean(), batch_size=1)


def nodes() -> Data:
    edges = torch.randint(0, 12, (2, 20), generator=generator())
    train = torch.arange(12) < 8
    return Data(x=randn(12, 4), edge_index=edges, y=torch.arange(12) % 3, train_mask=train, val_mask=~train)


# --- reinforcement learning


class Policy(Module):
    """Weights the logarithm of the probability of what was done with an advantage; there is no target."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        actions = torch.distributions.Categorical(logits=self.net(batch["observation"]))
        ratio = (actions.log_prob(batch["action"]) - batch["sample_log_prob"]).exp()
        return -torch.min(ratio * batch["advantage"], ratio.clamp(0.8, 1.2) * batch["advantage"]).mean()

    def validation_step(self, batch, batch_idx):
        actions = torch.distributions.Categorical(logits=self.net(batch["observation"]))
        self.log("entropy", actions.entropy().mean(), batch_size=len(batch))


def experience() -> list[TensorDict]:
    found = TensorDict(
        {
            "observation": randn(12, 4),
            "action": torch.arange(12) % 3,
            "sample_log_prob": -1 - torch.rand(12, generator=generator()),
            "advantage": randn(12, seed=1),
            "next": {"observation": randn(12, 4, seed=2), "reward": randn(12, 1), "done": torch.zeros(12, 1).bool()},
        },
        batch_size=[12],
    )
    return list(found.split(5))


# --- images with boxes


class Detector(Module):
    """Takes images of several sizes as a list, and a list of dicts with their boxes and labels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4 + 2)

    def forward(self, images, targets=None):
        outputs = torch.stack([self.net(image.mean((1, 2))) for image in images])
        if targets is None:
            return [{"boxes": row[None, :4], "scores": row[4:].softmax(0)} for row in outputs]
        boxes = torch.stack([target["boxes"].mean(0) for target in targets])
        labels = torch.stack([target["labels"][0] for target in targets])
        return {"box": F.smooth_l1_loss(outputs[:, :4], boxes), "class": F.cross_entropy(outputs[:, 4:], labels)}

    def training_step(self, batch, batch_idx):
        images, targets = batch
        losses = self(images, targets)
        return losses["box"] + losses["class"]

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        found = self(images)
        overlap = [1 - (row["boxes"] - target["boxes"]).abs().mean() for row, target in zip(found, targets, strict=True)]
        self.log("map", torch.stack(overlap).mean(), batch_size=len(images))


def photographs() -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [
        (
            randn(3, 5 + i % 3, 6, seed=i),
            {"boxes": randn(1 + i % 2, 4, seed=i + 9), "labels": torch.tensor([i % 2] * (1 + i % 2))},
        )
        for i in range(10)
    ]


# --- text


class Packed(Module):
    """Reads several documents in a row, and predicts the next token except at the end of each."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(7, 6), nn.Linear(6, 11)

    def forward(self, input_ids, position_ids):
        states = self.mix(torch.cat([self.embedding(input_ids), position_ids[..., None] / 4.0], -1)).tanh()
        return self.head(states)

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self(batch["input_ids"], batch["position_ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    def training_step(self, batch, batch_idx):
        return self._step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("eval/ppl", self._step(batch).exp(), batch_size=len(batch["input_ids"]))


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(1, 11, (10, 8), generator=generator())
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    labels = ids.roll(-1, 1)
    labels[:, [2, 7]] = -100
    return [{"input_ids": i, "position_ids": positions, "labels": y} for i, y in zip(ids, labels, strict=True)]


def next_tokens(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    counts = batch["labels"] != -100
    return module(batch["input_ids"], batch["position_ids"])[counts], batch["labels"][counts]


MEMBERS = {
    "graphs": Member(
        Molecules,
        lambda: GraphLoader(list(map(molecule, range(10))), batch_size=4),
        lambda batch, shift: batch.x.add_(shift),
        {"inputs": "x"},
        {"target": "y", "task": tasks.Regression(), "predict": lambda module, batch: module(batch)},
        lambda module, batch: (module(batch).flatten(), batch.y.flatten()),
    ),
    "nodes of one graph": Member(
        Nodes,
        lambda: DataLoader(Samples([nodes()]), batch_size=None, collate_fn=lambda graph: graph),
        lambda batch, shift: batch.x.add_(shift),
    ),
    "reinforcement learning": Member(
        Policy,
        lambda: DataLoader(Samples(experience()), batch_size=None, collate_fn=lambda batch: batch),
        lambda batch, shift: batch["observation"].add_(shift),
        {"inputs": "observation"},
    ),
    "detection": Member(
        Detector,
        lambda: DataLoader(
            Samples(photographs()), batch_size=4, collate_fn=lambda samples: tuple(map(list, zip(*samples, strict=True)))
        ),
        lambda batch, shift: [image.add_(shift) for image in batch[0]],
    ),
    "packed text": Member(
        Packed,
        lambda: DataLoader(Samples(rows()), batch_size=4),
        lambda batch, shift: None,  # the noise is in the embeddings
        {"noise": EmbeddingNoise},
        {"target": "labels", "task": tasks.Multiclass(ignore_index=-100)},
        next_tokens,
    ),
}
