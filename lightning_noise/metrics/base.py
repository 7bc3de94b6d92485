"""Exact sums for groups of samples, and the quantities that metrics read from logits."""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_noise.loop.internals import state_names, sync_states
from lightning_noise.metrics.functional.calibration import bin_indices

__all__ = ["RESOLUTION", "Predictions", "Sums", "quantize", "validate_bins"]

# summands become whole multiples of 2^-24, the resolution of float32 below 1: exact, in any order and on any device
RESOLUTION = 2**24

Value = TypeVar("Value", Tensor, dict[str, Tensor])


class Sums(Metric, Generic[Value]):
    r"""A metric whose states are sums over samples, separately for groups of samples.

    The sums are integers and so exact in any order. Each state has a leading axis of :math:`G` groups. The metric without one
    of the groups, which a jackknife needs, therefore costs no second pass. Predictions that are not finite are counted.

    Args:
        n_groups: The number of groups, :math:`G`.
        shapes: The shape of each state without the axis of groups.
    """

    is_differentiable = False
    full_state_update = False
    key: ClassVar[str]  # the name of a value that is a single tensor

    count: Tensor
    undefined: Tensor

    def __init__(self, n_groups: int = 1, **shapes: int | tuple[int, ...]):
        super().__init__()
        if n_groups < 1:
            raise ValueError(f"n_groups must be at least 1, got {n_groups}")
        self.n_groups = n_groups
        for state, shape in {**shapes, "undefined": ()}.items():
            zeros = torch.zeros(n_groups, *((shape,) if isinstance(shape, int) else shape), dtype=torch.long)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def compute(self) -> Value:
        sums = {state: values.sum(0) for state, values in self._states().items()}
        # not in update, where looking at the value would wait for the device in each step
        if sums["undefined"]:
            raise ValueError(
                f"{type(self).__name__} expects finite predictions, got {sums['undefined'].item()} that are NaN or give an "
                "infinite loss; look for NaN and infinity in the outputs of the module"
            )
        value = self._value_in_float64(sums)
        if isinstance(value, dict):
            return {key: each.float().to(self.device) for key, each in value.items()}
        return value.float().to(self.device)

    def totals(self) -> dict[str, float]:
        """Returns the values of all samples of all ranks, by the keys of ``compute``.

        If a prediction was not finite, they are NaN.
        """
        return self._floats({state: values.sum(0) for state, values in self._synchronized_states().items()})

    def estimates(self) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Returns the values of all samples, and the values without each group, over all ranks.

        They have the keys of ``compute``, are computed in float64, and are NaN if a prediction was not finite.
        """
        states = self._synchronized_states()
        total = {state: values.sum(0) for state, values in states.items()}
        without = [{state: total[state] - values[group] for state, values in states.items()} for group in range(self.n_groups)]
        return self._floats(total), [self._floats(sums) for sums in without]

    def _value(self, sums: dict[str, Tensor]) -> Value:
        """Returns the value of sums in float64, without the axis of groups."""
        raise NotImplementedError

    def _value_in_float64(self, sums: dict[str, Tensor]) -> Value:
        return self._value({state: values.double() for state, values in sums.items()})

    def _states(self) -> dict[str, Tensor]:
        return {state: getattr(self, state).cpu() for state in state_names(self)}  # not every device has float64

    def _synchronized_states(self) -> dict[str, Tensor]:
        with sync_states(self):
            return self._states()

    def _floats(self, sums: dict[str, Tensor]) -> dict[str, float]:
        value = self._value_in_float64(sums)
        values = value if isinstance(value, dict) else {self.key: value}
        return {key: math.nan if sums["undefined"] else each.item() for key, each in values.items()}

    def _add(self, groups: Tensor | None, **values: Tensor) -> None:
        """Adds values of shape (B, *) to the states of the same names, for each group."""
        for state, value in values.items():
            sums = getattr(self, state)
            if groups is None:
                sums[0] += value.sum()
            else:
                of_samples = value if value.ndim == 1 else value.flatten(1).sum(1)
                sums.index_add_(0, groups, of_samples.to(sums.dtype))

    def _add_binned(self, groups: Tensor | None, bins: Tensor, **values: Tensor) -> None:
        """Adds values of shape (B, *) to the bins of the states of the same names, for each group."""
        size = getattr(self, next(iter(values)))[0].numel()
        if groups is not None:
            bins = bins + size * groups.view(-1, *[1] * (bins.ndim - 1))
        index = bins.flatten()
        for state, value in values.items():
            getattr(self, state).view(-1).index_add_(0, index, value.flatten().long())


class Predictions:
    """Logits of shape (B, K, *) with the quantities that metrics read from them.

    The logits are in at least float32. Each quantity is computed once and has shape (B, *), except for probabilities. Several
    metrics can be updated with the same object instead of the logits.
    """

    n_odds = 4096
    limit = 18.0  # of the log-odds: beyond it, 1 - c is below the resolution of float32

    def __init__(self, logits: Tensor):
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # in half precision the sums would overflow
        self._scored: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, preds: Tensor | Predictions) -> Predictions:
        return preds if isinstance(preds, Predictions) else cls(preds)

    @cached_property
    def label(self) -> Tensor:
        return self.logits.max(1).indices  # several times as fast as argmax if the classes are not the last axis

    @cached_property
    def log_probabilities(self) -> Tensor:
        return self.logits.log_softmax(1)

    @cached_property
    def probabilities(self) -> Tensor:
        return self.log_probabilities.exp()

    @cached_property
    def log_confidence(self) -> Tensor:
        return self.log_probabilities.amax(1)

    @cached_property
    def undefined(self) -> Tensor:
        """1 if the prediction is NaN, else 0."""
        return self.log_confidence.isnan().long()

    @cached_property
    def ones(self) -> Tensor:
        return torch.ones_like(self.label)

    @cached_property
    def confidence(self) -> Tensor:
        return self.log_confidence.exp().nan_to_num(0.0)

    @cached_property
    def odds_bins(self) -> Tensor:
        """The bins of the confidence among 4096 of equal width in the log-odds; within a bin, 1 - c changes by 0.9 %."""
        log_odds = self.log_confidence - (-self.log_confidence.expm1()).log()
        log_odds = log_odds.nan_to_num(0.0).clamp(-self.limit, self.limit)
        return bin_indices((log_odds / self.limit + 1) / 2, self.n_odds)

    def log_probability(self, target: Tensor) -> Tensor:
        """Returns the log-probability of the target; the last target is remembered."""
        if self._scored is None or self._scored[0] is not target:
            self._scored = target, self.log_probabilities.gather(1, target[:, None]).squeeze(1)
        return self._scored[1]

    def check_classes(self, metric: Sums, num_classes: int) -> None:
        """Raises a ValueError if the logits have another number of classes."""
        n_classes = self.logits.shape[1]
        if n_classes != num_classes:
            name = type(metric).__name__
            raise ValueError(
                f"{name}(num_classes={num_classes}) expects logits of shape (B, {num_classes}, *), got {n_classes} classes; "
                f"give {name}(num_classes={n_classes})"
            )


def quantize(values: Tensor) -> Tensor:
    """Returns the values as whole multiples of the resolution."""
    return (values * RESOLUTION).round().long()


def validate_bins(n_bins: int) -> int:
    """Returns the number of bins, or raises a ValueError if it is below 1."""
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    return n_bins
