"""A fit of a model whose parameters are sharded over two processes; each writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from helpers import N_CLASSES, N_FEATURES, Classifier, loader, make_trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from lightning_noise import GradientNoise, Key, RobustnessMonitor, WeightNoise, noise
from lightning_noise.perturb.weights import PerturbedParameters, RelativeTo


class Sharded(Classifier):
    """Keeps the matrices that each of its training steps computes with."""

    def __init__(self, how: str):
        super().__init__()
        # of five rows, the last process has fewer
        self.rows = 5 if how == "data" else 8
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(N_FEATURES, self.rows), nn.Tanh(), nn.LayerNorm(self.rows), nn.Linear(self.rows, N_CLASSES)
        )
        self.how = how
        self.used: list[list[Tensor]] = []

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        if self.how == "data":
            fully_shard(self.net[4], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])
        else:  # the normalisation and the last bias have replicas, and the gradients of the normalisation are sums in parts
            plan = {
                "1": ColwiseParallel(output_layouts=Shard(0)),
                "3": SequenceParallel(sequence_dim=0),
                "4": RowwiseParallel(input_layouts=Shard(0)),
            }
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        self.net[4].register_forward_pre_hook(self._keep)

    def matrices(self) -> list[Tensor]:
        """What this process computes with: whole matrices, or shards that are not gathered."""
        return [whole(layer.weight) for layer in (self.net[1], self.net[4])]  # type: ignore[arg-type]

    def _keep(self, layer: nn.Module, args: Any) -> None:
        if self.training:
            self.used.append(self.matrices())


class Watch(pl.Callback):
    """Looks whether the weights are those before the step, after it and in what is saved."""

    def __init__(self):
        self.before: list[list[Tensor]] = []
        self.restored: list[bool] = []
        self.saved: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append(pl_module.matrices())

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        state = pl_module.state_dict()
        self.saved.append(self._is_as_before([whole(state[f"net.{i}.weight"]) for i in (1, 4)]))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.restored.append(self._is_as_before(pl_module.matrices()))

    def _is_as_before(self, matrices: list[Tensor]) -> bool:
        return all(torch.equal(one, two) for one, two in zip(matrices, self.before[-1], strict=True))


class Gradients(pl.Callback):
    """Keeps what this process has of the gradients of the first update."""

    def __init__(self):
        self.kept: dict[str, tuple[bool, Tensor]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in [] if self.kept else pl_module.named_parameters():
            (placement,) = parameter.placements
            gradient = parameter.grad.redistribute(placements=parameter.placements)
            self.kept[name] = placement.is_shard(), gradient.to_local().clone()


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def refusal(module: nn.Module) -> str:
    try:
        PerturbedParameters(module, None, noise.Speckle(), 0.5, Key(()), gradient="reparametrized")
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path, how: str, relative: RelativeTo | None) -> None:
    pl.seed_everything(0, verbose=False)
    module, watch, clean, noisy = Sharded(how), Watch(), Gradients(), Gradients()
    probe = WeightNoise(noise.Gaussian(), 0.5, relative=relative, name="probe")
    callbacks = [
        WeightNoise(noise.Gaussian(), 0.5, relative=relative, seed=5),
        RobustnessMonitor(probe, [0.5, 1e-20]),
        watch,
        clean,
        GradientNoise(noise.Gaussian(), 0.5),
        noisy,
    ]
    strategy = ModelParallelStrategy(*((2, 1) if how == "data" else (1, 2)))
    logger = CSVLogger(folder, name="", version="")
    settings = {"devices": 2, "strategy": strategy, "logger": logger, "log_every_n_steps": 1, "val_check_interval": 1}
    trainer = make_trainer(callbacks, use_distributed_sampler=False, **settings)
    trainer.fit(module, loader(), loader())
    kept = {
        "used": module.used,
        "before": watch.before,
        "restored": watch.restored,
        "saved": watch.saved,
        "gradients": clean.kept,
        "noisy gradients": noisy.kept,
        "measured": {key: value.item() for key, value in trainer.callback_metrics.items()},
        "refused": refusal(module),
    }
    torch.save(kept, folder / f"{trainer.global_rank}.pt")
