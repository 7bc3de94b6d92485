"""A fit of a model whose parameters are sharded over two processes; each writes what it saw to `<folder>/<rank>.pt`.

Run as a script: python sharded.py FOLDER RELATIVE
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from conftest import N_CLASSES, N_FEATURES, Classifier, loader, make_trainer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_noise import Key, RobustnessMonitor, WeightNoise, noise
from lightning_noise.parameters import PerturbedParameters, RelativeTo


class Sharded(Classifier):
    """Keeps the whole weights that each of its training steps computes with."""

    def __init__(self):
        super().__init__()
        # of five rows, the last process has fewer
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(N_FEATURES, 5), nn.Tanh(), nn.Linear(5, N_CLASSES))
        self.used: list[list[Tensor]] = []

    def configure_model(self):
        if not self.used:
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            fully_shard(self.net[3], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            self.net[3].register_forward_pre_hook(self._keep)
            self.used.append([])

    def _keep(self, layer: nn.Module, args: Any) -> None:
        if self.training:
            self.used.append([self.net[1].weight.detach().clone(), self.net[3].weight.detach().clone()])  # type: ignore[operator]


class Watch(pl.Callback):
    def __init__(self):
        self.before: list[list[Tensor]] = []
        self.restored: list[bool] = []
        self.saved: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(whole(pl_module))

    def on_before_backward(self, trainer, pl_module, loss):
        entries = [pl_module.state_dict()[f"net.{i}.weight"].full_tensor() for i in (1, 3)]
        self.saved.append(all(torch.equal(one, two) for one, two in zip(entries, self.before[-1], strict=True)))

    def on_after_backward(self, trainer, pl_module):
        self.restored.append(all(torch.equal(one, two) for one, two in zip(whole(pl_module), self.before[-1], strict=True)))


def whole(module: Any) -> list[Tensor]:
    return [module.net[i].weight.full_tensor().detach().clone() for i in (1, 3)]


def main(folder: Path, relative: RelativeTo | None) -> None:
    pl.seed_everything(0, verbose=False)
    module, watch = Sharded(), Watch()
    noisy = WeightNoise(noise.Gaussian(), 0.5, relative=relative, seed=5)
    probe = WeightNoise(noise.Gaussian(), 0.5, relative=relative, name="probe")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callbacks = [noisy, RobustnessMonitor(probe, [0.5, 1e-20]), watch]
    trainer = make_trainer(callbacks, devices=2, strategy=strategy, val_check_interval=1, use_distributed_sampler=False)
    trainer.fit(module, loader(), loader())
    kept = {"used": module.used[1:], "before": watch.before, "restored": watch.restored, "saved": watch.saved}
    kept["measured"] = {key: value.item() for key, value in trainer.callback_metrics.items()}
    try:
        PerturbedParameters(module, None, noise.Speckle(), 0.5, Key(()), gradient="reparametrized")
    except ValueError as error:
        kept["refused"] = str(error)
    torch.save(kept, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), None if sys.argv[2] == "None" else sys.argv[2])  # type: ignore[arg-type]
