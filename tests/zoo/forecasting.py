"""Series whose future is to be predicted."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, IterableDataset

from lightning_noise import tasks
from zoo.member import Member, Module, Samples, generator, randn

PAST, FUTURE = 6, 2
Output = namedtuple("Output", ["prediction", "scale"])


class Recurrent(Module):
    """Takes a dict of inputs beside a tuple of target and weight, in which several tensors share memory."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8 + 2 * FUTURE, FUTURE)

    def forward(self, x: dict[str, Tensor]) -> Output:
        packed = pack_padded_sequence(x["encoder_cont"], x["encoder_lengths"], batch_first=True, enforce_sorted=False)
        _, state = self.encoder(packed)
        scaled = self.head(torch.cat([state[0], x["decoder_cont"].flatten(1)], 1))
        center, width = x["target_scale"][:, :1], x["target_scale"][:, 1:]
        return Output(scaled * width + center, x["target_scale"])

    def _loss(self, batch: Any) -> Tensor:
        x, (y, weight) = batch
        error = (self(x).prediction - y).abs() / x["target_scale"][:, 1:]
        future = torch.arange(FUTURE) < x["decoder_lengths"][:, None]
        return (error * (future if weight is None else future * weight)).sum() / future.sum()

    def training_step(self, batch, batch_idx):
        loss = self._loss(batch)
        self.log("train_MAE", loss, batch_size=len(batch[0]["encoder_cont"]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_MAE", self._loss(batch), batch_size=len(batch[0]["encoder_cont"]))


def collate(samples: list[Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, None]]:
    series = torch.stack(samples)
    lengths = 2 + torch.arange(len(series)) % (PAST - 1)
    past = series[:, :PAST] * (torch.arange(PAST) < lengths[:, None])[..., None]
    scale = torch.stack([series[..., 0].mean(1), series[..., 0].std(1) + 1], 1)
    x = {
        "encoder_cont": past,
        "encoder_target": past[..., 0],  # a view
        "encoder_lengths": lengths,
        "decoder_cont": series[:, PAST:, 1:],
        "decoder_target": series[:, PAST:, 0],
        "decoder_lengths": torch.full((len(series),), FUTURE),
        "decoder_time_idx": torch.arange(FUTURE).expand(len(series), FUTURE),
        "target_scale": scale,
    }
    return x, (series[:, PAST:, 0], None)


def known(batch: Any) -> Tensor:
    """The mask that a user types: what is not padding."""
    return torch.arange(PAST) < batch[0]["encoder_lengths"][:, None]


class Windowed(Module):
    """Cuts past and future out of one tensor of (B, channels, T), of which one channel is a mask."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2 * PAST, FUTURE)

    def forward(self, window):
        return self.net(window)

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        y, exogenous, available = batch["temporal"].unbind(1)
        past = torch.cat([y[:, :PAST], exogenous[:, :PAST]], 1)
        error = (self(past) - y[:, PAST:]).square() * available[:, PAST:]
        return error.sum() / available[:, PAST:].sum()

    def training_step(self, batch, batch_idx):
        return self._step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("ptl/val_loss", self._step(batch), batch_size=len(batch["temporal"]))


def windows() -> list[dict[str, Tensor]]:
    y = randn(10, 2, PAST + FUTURE)
    available = (torch.rand(10, 1, PAST + FUTURE, generator=generator()) < 0.8).float()
    return [{"temporal": torch.cat(pair)} for pair in zip(y, available, strict=True)]


def past_values(batch: dict[str, Tensor]) -> Tensor:
    """The mask that a user types: what is the past of a channel of numbers."""
    valid = torch.zeros_like(batch["temporal"], dtype=torch.bool)
    valid[:, :2, :PAST] = True
    return valid


class Probabilistic(Module):
    """Predicts a distribution of the future, from a past with missing values, which an indicator marks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2 * PAST, 2 * FUTURE)

    def forward(self, past_target, past_observed_values):
        mean, spread = self.net(torch.cat([past_target * past_observed_values, past_observed_values], 1)).chunk(2, 1)
        return mean, nn.functional.softplus(spread) + 0.1

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        mean, spread = self(batch["past_target"], batch["past_observed_values"])
        likelihood = torch.distributions.Normal(mean, spread).log_prob(batch["future_target"].nan_to_num())
        return -(likelihood * batch["future_observed_values"]).sum() / batch["future_observed_values"].sum()

    def training_step(self, batch, batch_idx):
        return self._step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_nll", self._step(batch), batch_size=len(batch["past_target"]))


class Stream(IterableDataset):
    """Draws windows without end."""

    def __iter__(self):
        stream = generator()
        while True:
            y = torch.randn(PAST + FUTURE, generator=stream)
            y[torch.rand(PAST + FUTURE, generator=stream) < 0.2] = torch.nan
            past, future = y[:PAST], y[PAST:]
            yield {
                "past_target": past.nan_to_num(),
                "past_observed_values": past.isfinite().float(),
                "future_target": future,
                "future_observed_values": future.isfinite().float(),
            }


MEMBERS = {
    "forecasting, dicts and tuples": Member(
        Recurrent,
        lambda: DataLoader(Samples(list(randn(10, PAST + FUTURE, 3))), batch_size=4, collate_fn=collate),
        lambda batch, shift: batch[0]["encoder_cont"].add_(shift * known(batch)[..., None]),
        {"inputs": "0.encoder_cont", "mask": known},
        {"target": "1.0", "task": tasks.Regression(), "predict": lambda module, batch: module(batch[0]).prediction},
        lambda module, batch: (module(batch[0])[0].flatten(), batch[1][0].flatten()),
        layers="head",
    ),
    "forecasting, one tensor": Member(
        Windowed,
        lambda: DataLoader(Samples(windows()), batch_size=4),
        lambda batch, shift: batch["temporal"][:, :2, :PAST].add_(shift),
        {"mask": past_values},
    ),
    "forecasting, a stream": Member(
        Probabilistic,
        lambda: DataLoader(Stream(), batch_size=4),
        lambda batch, shift: batch["past_target"].add_(shift * batch["past_observed_values"]),
        {"inputs": "past_target", "mask": "past_observed_values"},
        {
            "target": "future_target",
            "task": tasks.Regression(),
            "predict": lambda module, batch: module(batch["past_target"], batch["past_observed_values"])[0],
        },
        lambda module, batch: tuple(
            part[batch["future_target"].isfinite()]
            for part in (module(batch["past_target"], batch["past_observed_values"])[0], batch["future_target"])
        ),
        trainer={"limit_train_batches": 3, "limit_val_batches": 3},
    ),
}
