"""The modules of the conditions. Each takes the same batches, and begins with the same weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from helpers import N_FEATURES, Classifier
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint


class Tokens(Classifier):
    """Adds to the input the mean of the embeddings of its signs."""

    def __init__(self, lr: float):
        super().__init__(lr)
        self.embedding = nn.Embedding(2, N_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        return x + self.embedding((x > 0).long()).mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.note("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.note("val_loss", F.cross_entropy(self(x), y))

    def note(self, name: str, value: Tensor) -> None:
        self.log(name, value)


class Manual(Tokens):
    """Updates the first and the last layer with an optimizer each."""

    def __init__(self, lr: float):
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=self.lr) for i in (1, 4)]


class LBFGS(Tokens):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=self.lr, max_iter=3)


class Recomputed(Tokens):
    """Computes its activations again in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.net, self.embed(x), use_reentrant=self.reentrant)


class RecomputedReentrantly(Recomputed):
    reentrant = True


class CompiledInPart(Tokens):
    def __init__(self, lr: float):
        super().__init__(lr)
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


class LogsLater(Tokens):
    """Logs after its last step, because in this Lightning ``self.log`` fails in a compiled step."""

    def note(self, name: str, value: Tensor) -> None:
        self.last = value.detach()

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self.last)


class Quantized(Tokens):
    """Trains with the rounding of its quantized layers."""

    def __init__(self, lr: float):
        super().__init__(lr)
        self.net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        torch.ao.quantization.prepare_qat(self.net.train(), inplace=True)


class LoRA(Tokens):
    """Trains adapters of its layers, which `peft` adds."""

    def __init__(self, lr: float):
        super().__init__(lr)
        peft: Any = import_module("peft")
        self.net = peft.get_peft_model(self.net, peft.LoraConfig(target_modules=["1", "4"], r=2))


class ShardedByData(Tokens):
    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        for part in (self.net, self.embedding):
            fully_shard(part, mesh=mesh["data_parallel"])


class ShardedByTensor(Tokens):
    """Shards its layers; each rank has the whole embedding."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        parallelize_module(self.net, mesh["tensor_parallel"], {"1": ColwiseParallel(), "4": RowwiseParallel()})
