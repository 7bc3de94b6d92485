"""Exact sums for groups of samples, and the quantities that metrics read from logits."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_noise._checks import check_counts
from lightning_noise._tensor import at_least_float32, column
from lightning_noise.batch import describe
from lightning_noise.loop.internals import add_zeros, plot_values, states_hidden, sync_states

__all__ = ["RESOLUTION", "Predictions", "Sums", "are_distributions", "bin_indices", "quantize"]

# summands become whole multiples of 2^-24, the resolution of float32 below 1: exact, in any order and on any device
RESOLUTION = 2**24


class Sums(Metric):
    r"""A metric whose states are sums over samples, separately for groups of samples.

    Sums of whole numbers make the value the same for any split into batches, any order and any number of ranks. Summands are
    rounded to multiples of :math:`2^{-24}`, the resolution of float32 below 1. Each state has
    a leading axis of :math:`G` groups, so the metric without a group, which a jackknife needs, costs no second pass.

    ``update(preds, target, groups=None)`` adds logits of shape :math:`(B, K, *)`, class indices of shape :math:`(B, *)` and the
    group of each sample, of shape :math:`(B,)`. ``compute`` raises a ValueError if a prediction was not finite.

    Args:
        n_groups: The number of groups, :math:`G`, for :meth:`estimates`.
        shapes: The shape of each state without the axis of groups.
    """

    is_differentiable = False
    full_state_update = False
    key: ClassVar[str] = ""  # of the only value, which compute then returns by itself
    refuses_nan = True  # otherwise compute returns NaN

    count: Tensor
    undefined: Tensor

    def __init__(self, n_groups: int = 1, **shapes: tuple[int, ...]):
        super().__init__()
        check_counts(n_groups=n_groups)
        self.n_groups = n_groups
        self._has_read = False
        for state, shape in {**shapes, "undefined": ()}.items():
            add_zeros(self, state, n_groups, *shape)

    def _read(self, preds: Tensor | Predictions, target: Tensor | None = None) -> Predictions:
        """Returns the predictions, or raises a ValueError if they do not fit the target or are no logits.

        Only the values of the first update are looked at, because that waits for the device.
        """
        if isinstance(preds, Predictions):
            return preds
        name = type(self).__name__
        if preds.ndim < 2 or (target is not None and preds.select(1, 0).shape != target.shape):
            what = f"{describe(preds)} for a target of {describe(target)}" if target is not None else describe(preds)
            raise ValueError(
                f"{name} expects logits of shape (B, K, *) and class indices of shape (B, *), got {what}; if the classes are "
                "the last axis, type preds.movedim(-1, 1)"
            )
        if not self._has_read and are_distributions(preds):
            raise ValueError(f"{name} expects logits, got probabilities, which sum to 1; type preds.log()")
        n_classes = preds.shape[1]
        if not self._has_read and target is not None and ((target < 0) | (target >= n_classes)).any():
            raise ValueError(
                f"{name} expects class indices in [0, {n_classes}), got {describe(target)} from {target.min().item()} to "
                f"{target.max().item()}; to leave out a label such as -100, type keep = target != -100 and update("
                f"preds{'' if preds.ndim == 2 else '.movedim(1, -1)'}[keep], target[keep])"
            )
        self._has_read = self._has_read or preds.select(1, 0).numel() > 1
        return Predictions(preds)

    def compute(self) -> Any:
        sums = self._sums()
        # not in update, where looking at the value would wait for the device in each step
        if sums["undefined"] and self.refuses_nan:
            raise ValueError(
                f"{type(self).__name__} expects finite predictions, got {sums['undefined'].item()} that are NaN or give an "
                "infinite loss; look for NaN and infinity in the outputs of the module"
            )
        values = {key: value.float().to(self.device) for key, value in self._defined_values(sums).items()}
        return values[self.key] if self.key else values

    def reset_in_place(self) -> None:
        """Resets without new tensors, which would leave gaps in the memory of the process at each validation.

        ``reset`` makes new ones, because ``forward`` of early torchmetrics holds the sums of earlier batches meanwhile.
        """
        with states_hidden(self):
            self.reset()
        with torch.inference_mode(False):
            for state in self.metric_state:
                values = getattr(self, state)  # if made in inference mode, it cannot be written to outside
                setattr(self, state, torch.zeros_like(values) if values.is_inference() else values.zero_())

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plots values on the axes of pyplot, or on given axes, as each metric of torchmetrics does.

        Args:
            val: A value, or a list of the values of several steps. Default: the value of ``compute``.
            ax: The axes. Default: those of a new figure.

        Returns:
            The figure, or ``None`` with given axes, and the axes.
        """
        return plot_values(self, val, ax)

    def totals(self) -> dict[str, float]:
        """Returns the values of all samples of all ranks, in float64; NaN if a prediction was not finite."""
        with sync_states(self):
            sums = self._sums()
        return {key: value.item() for key, value in self._defined_values(sums).items()}

    def estimates(self) -> dict[str, Tensor]:
        """Returns each value of all samples of all ranks and then without each group, in float64, of shape (1 + G,)."""
        sums = {}
        for state, values in self._synchronized_states().items():
            total = values.sum(0, keepdim=True)
            sums[state] = torch.cat([total, total - values])
        return self._defined_values(sums)

    def _values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the values of sums in float64, of shape (*) for sums of shape (*, *shape)."""
        raise NotImplementedError

    def _sums(self) -> dict[str, Tensor]:
        return {state: getattr(self, state).sum(0).cpu() for state in self.metric_state}

    def _states(self) -> dict[str, Tensor]:
        return {state: getattr(self, state).cpu() for state in self.metric_state}  # not every device has float64

    def _synchronized_states(self) -> dict[str, Tensor]:
        with sync_states(self):
            return self._states()

    def _defined_values(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the values, NaN if a prediction was not finite."""
        is_defined = sums["undefined"] == 0
        return {key: value.where(is_defined, math.nan) for key, value in self._values(_double(sums)).items()}

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
            bins = bins + size * column(groups, bins)
        index = bins.flatten()
        for state, value in values.items():
            getattr(self, state).view(-1).index_add_(0, index, value.flatten().long())


class Predictions:
    """Logits of shape (B, K, *) in at least float32, with the quantities that metrics read from them.

    Each quantity is computed once, and has shape (B, *) except for probabilities. Several metrics can be updated with the same
    object instead of the logits.
    """

    n_odds = 4096

    def __init__(self, logits: Tensor):
        self.logits = at_least_float32(logits)  # in half precision the sums would overflow
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
    def log_odds(self) -> Tensor:
        r"""The log-odds of the confidence, :math:`\log c - \log (1 - c) = z_\text{max} - \log \sum_\text{others} e^{z_k}`.

        They rank confidences that are rounded to 1. Infinity means that all other classes have the probability 0.
        """
        label = self.label[:, None]
        others = self.logits.scatter(1, label, -math.inf).logsumexp(1)
        return self.logits.gather(1, label).squeeze(1) - others

    @cached_property
    def odds_bins(self) -> Tensor:
        r"""The bin of the log-odds :math:`x` among 4096 bins of equal width in :math:`x / (64 + |x|) + \text{asinh}(x) / 400`.

        The scale has no end. A bin is 0.02 wide around 0 (2 % of 1 - c), 0.04 at 20, 0.13 at 90 and 14 % of :math:`x` beyond.
        """
        x = self.log_odds.nan_to_num(0.0).clamp_max(1e38)  # infinity is the largest
        scale = x / (64 + x.abs()) + x.asinh() / 400
        return bin_indices((scale + 0.2) / 1.45, self.n_odds)  # -0.2 is the uniform distribution over three million classes

    def log_probability(self, target: Tensor) -> Tensor:
        """Returns the log-probability of the target; the last target is remembered."""
        if self._scored is None or self._scored[0] is not target:
            self._scored = target, self.log_probabilities.gather(1, target[:, None]).squeeze(1)
        return self._scored[1]


def bin_indices(confidence: Tensor, n_bins: int) -> Tensor:
    r"""Returns the bin of each confidence among :math:`M` bins of equal width.

    Bin :math:`b` is :math:`[b / M, (b + 1) / M)`. The last bin is closed, so a confidence of exactly 1 needs no bin of its own.
    """
    return (confidence * n_bins).long().clamp_(0, n_bins - 1)


def quantize(values: Tensor) -> Tensor:
    """Returns the values as whole multiples of the resolution."""
    return (values * RESOLUTION).round().long()


def are_distributions(values: Tensor) -> bool:
    """Returns whether at least two rows of values of shape (B, K, *) are probabilities that sum to 1.

    The sums may be off by rounding, and those of many rows also by a clamp of the probabilities.
    """
    if values.ndim < 2 or values[:, 0].numel() < 2:
        return False
    error = max(_rounding(values), 0.01 if values[:, 0].numel() >= 20 else 0.0)
    return bool((values >= -error).all() and ((values.sum(1) - 1).abs() <= error).all())


def _rounding(values: Tensor) -> float:
    """Returns the error of a sum of probabilities, which were perhaps rounded to half precision before."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return 4 * torch.finfo(dtype).eps
    return 1e-5


def _double(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {state: values.double() for state, values in sums.items()}
