"""What the metrics share: sums that are whole numbers, kept apart for groups of samples, and what is read of logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_noise.loop.internals import state_names, sync_states
from lightning_noise.metrics.functional import bin_indices

__all__ = ["RESOLUTION", "Predictions", "Sums", "validate_bins", "whole"]

# what is summed becomes whole multiples of 2^-24, the resolution of float32 below 1: exact, in any order and on any device
RESOLUTION = 2**24

Value = TypeVar("Value", Tensor, dict[str, Tensor])


class Sums(Metric, Generic[Value]):
    r"""A metric of sums that are whole numbers, and so exact in any order; it counts the predictions that are none.

    A sample belongs to one of :math:`G` groups, and each state has a leading axis of them, so that the metric can be had of
    all data and without one of the groups in turn, from which a jackknife tells its standard error.

    Args:
        n_groups: The number of groups, :math:`G`.
        shapes: The shape of each state without the axis of groups.
    """

    is_differentiable = False
    full_state_update = False
    key: ClassVar[str]  # what a value is called that is one tensor

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
        # here and not in update, where the question would wait for the device in each step
        if sums["undefined"]:
            raise ValueError(
                f"{type(self).__name__} reads finite predictions, but {sums['undefined'].item()} predictions were not a number "
                "or gave an infinite loss; look for NaN and infinity in what the module returns"
            )
        return self._single(self._value_of(sums))

    def totals(self) -> dict[str, float]:
        """Returns the values of all data, over all processes, by the keys of ``compute``; NaN where a prediction was none."""
        return self._floats({state: values.sum(0) for state, values in self._synchronised().items()})

    def estimates(self) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Returns the values of all data, and those without each group in turn, over all processes.

        They have the keys of ``compute``, in float64, and are not a number where a prediction was none.
        """
        states = self._synchronised()
        total = {state: values.sum(0) for state, values in states.items()}
        rest = [{state: total[state] - values[group] for state, values in states.items()} for group in range(self.n_groups)]
        return self._floats(total), [self._floats(sums) for sums in rest]

    def _value(self, sums: dict[str, Tensor]) -> Value:
        """The value of sums without the axis of groups, all of them in float64."""
        raise NotImplementedError

    def _value_of(self, sums: Mapping[str, Tensor]) -> Value:
        return self._value({state: values.double() for state, values in sums.items()})

    def _states(self) -> dict[str, Tensor]:
        return {state: getattr(self, state).cpu() for state in state_names(self)}  # not every device has float64

    def _synchronised(self) -> dict[str, Tensor]:
        with sync_states(self):
            return self._states()

    def _single(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._single(each) for key, each in value.items()}
        return value.float().to(self.device)

    def _floats(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        value = self._value_of(sums)
        values = value if isinstance(value, dict) else {self.key: value}
        return {key: math.nan if sums["undefined"] else each.item() for key, each in values.items()}

    def _add(self, groups: Tensor | None, **values: Tensor) -> None:
        """Adds values of shape (B, *), sample by sample, to the states of their names."""
        for state, value in values.items():
            sums = getattr(self, state)
            if groups is None:
                sums[0] += value.sum()
            else:
                of_samples = value if value.ndim == 1 else value.flatten(1).sum(1)
                sums.index_add_(0, groups, of_samples.to(sums.dtype))

    def _add_binned(self, groups: Tensor | None, bins: Tensor, **values: Tensor) -> None:
        """Adds values of shape (B, *) to the bins of the states of their names."""
        size = getattr(self, next(iter(values)))[0].numel()
        if groups is not None:
            bins = bins + size * groups.view(-1, *[1] * (bins.ndim - 1))
        index = bins.flatten()
        for state, value in values.items():
            getattr(self, state).view(-1).index_add_(0, index, value.flatten().long())


class Predictions:
    """Logits of shape (B, K, *), in at least float32, and what metrics read of them, of shape (B, *), computed once.

    Several metrics can be updated with one of these instead of the logits.
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
        return self.logits.max(1).indices  # several times as fast as argmax, where the classes are not the last axis

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
        """One where the prediction is not a number, else zero."""
        return self.log_confidence.isnan().long()

    @cached_property
    def ones(self) -> Tensor:
        return torch.ones_like(self.label)

    @cached_property
    def confidence(self) -> Tensor:
        return self.log_confidence.exp().nan_to_num(0.0)

    @cached_property
    def odds_bins(self) -> Tensor:
        """The bins of the confidence among 4096 of equal width in its log-odds, in which 1 - c changes by 0.9 %."""
        log_odds = self.log_confidence - (-self.log_confidence.expm1()).log()
        log_odds = log_odds.nan_to_num(0.0).clamp(-self.limit, self.limit)
        return bin_indices((log_odds / self.limit + 1) / 2, self.n_odds)

    def log_probability(self, target: Tensor) -> Tensor:
        if self._scored is None or self._scored[0] is not target:
            self._scored = target, self.log_probabilities.gather(1, target[:, None]).squeeze(1)
        return self._scored[1]

    def check_classes(self, metric: Sums, num_classes: int) -> None:
        if self.logits.shape[1] != num_classes:
            name = type(metric).__name__
            raise ValueError(f"{name}(num_classes={num_classes}) got logits of {self.logits.shape[1]} classes")


def whole(values: Tensor) -> Tensor:
    """Returns the values as whole multiples of the resolution."""
    return (values * RESOLUTION).round().long()


def validate_bins(n_bins: int) -> int:
    """Returns the number of bins, or raises a ValueError where it is none."""
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    return n_bins
