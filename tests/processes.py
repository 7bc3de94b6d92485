"""A fit, a validation and a test on one or more processes; each writes what it saw to `<folder>/<rank>.pt`.

Run as a script: python processes.py FOLDER STRATEGY DEVICES LEVEL
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from conftest import Classifier, Rows, loader, make_trainer
from pytorch_lightning.callbacks import EarlyStopping

from lightning_noise import InputNoise, RobustnessMonitor, noise


class Recorder(Classifier):
    """Keeps what its forward pass gets in evaluation: each clean batch twice, for the module itself and the monitor."""

    def __init__(self):
        super().__init__()
        self.evaluated: list[torch.Tensor] = []

    def forward(self, x):
        if not self.training:
            self.evaluated.append(x.clone())
        return super().forward(x)


class Write(pl.Callback):
    def __init__(self, folder: Path):
        self.folder = folder
        self.kept: dict[str, Any] = {}

    def on_validation_epoch_start(self, trainer, pl_module: Any):
        pl_module.evaluated.clear()
        self.kept["streams"] = torch.get_rng_state()

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.kept |= {"evaluated": pl_module.evaluated, "validated": dict(trainer.callback_metrics)}
            self.kept["streams after"] = torch.get_rng_state()
            torch.save(self.kept, self.folder / f"{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module: Any):
        self.kept |= {
            "seen": [batch[0] for batch in pl_module.seen],
            "weights": {key: value.clone() for key, value in pl_module.state_dict().items()},
            "fitted": dict(trainer.callback_metrics),
            "epochs": trainer.current_epoch,
            "data": trainer.train_dataloader.dataset.x.clone(),  # type: ignore[union-attr]
        }
        torch.save(self.kept, self.folder / f"fit-{trainer.global_rank}.pt")


def main(folder: Path, strategy: str, devices: int, level: float) -> None:
    distributed = {"devices": devices, "strategy": strategy}
    monitor = RobustnessMonitor([noise.Gaussian(), noise.Impulse()], [0.2, 0.5])
    # no score rises by two, so that the patience of one epoch ends the fit on all processes at once
    stopper = EarlyStopping("robustness/score", mode="max", patience=1, min_delta=2.0)
    pl.seed_everything(0, verbose=False)
    module = Recorder()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = make_trainer([InputNoise(noise.Gaussian(), level), monitor, stopper, Write(folder)], max_epochs=5, **distributed)
    trainer.fit(module, loader(shuffle=True), loader(Rows(13, seed=1), batch_size=4))
    module.load_state_dict(start)
    trainer = make_trainer([monitor, Write(folder)], **distributed)
    trainer.validate(module, loader(Rows(13, seed=1), batch_size=4), verbose=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
