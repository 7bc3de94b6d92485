"""A fit of a model whose parameters are sharded over two processes; each writes its gradients to `<folder>/<rank>.pt`.

Run as a script: python shards.py FOLDER data|tensor
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from conftest import Classifier, loader, make_trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from lightning_noise import GradientNoise, noise


class Sharded(Classifier):
    def __init__(self, how: str):
        super().__init__()
        self.net[3] = nn.LayerNorm(8)
        self.how = how

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        if self.how == "data":
            fully_shard(self.net, mesh=mesh["data_parallel"])
        else:  # the normalisation and the last bias have replicas, and the gradients of the normalisation are sums in parts
            plan = {
                "1": ColwiseParallel(output_layouts=Shard(0)),
                "3": SequenceParallel(sequence_dim=0),
                "4": RowwiseParallel(input_layouts=Shard(0)),
            }
            parallelize_module(self.net, mesh["tensor_parallel"], plan)


class Write(pl.Callback):
    def __init__(self, path: Path):
        self.path = path
        self.kept: dict[str, tuple[bool, torch.Tensor]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            (placement,) = parameter.placements
            gradient = parameter.grad.redistribute(placements=parameter.placements)
            self.kept[name] = placement.is_shard(), gradient.to_local().clone()
        torch.save(self.kept, self.path.with_name(f"{self.path.name}-{trainer.global_rank}.pt"))


def main(folder: Path, how: str) -> None:
    sizes = (2, 1) if how == "data" else (1, 2)
    strategy = ModelParallelStrategy(*sizes)
    pl.seed_everything(0, verbose=False)
    callbacks = [Write(folder / "clean"), GradientNoise(noise.Gaussian(), 0.5), Write(folder / "noisy")]
    logger = CSVLogger(folder, name="", version="")
    once = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "log_every_n_steps": 1}
    make_trainer(callbacks, devices=2, strategy=strategy, logger=logger, **once).fit(Sharded(how), loader())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2])
