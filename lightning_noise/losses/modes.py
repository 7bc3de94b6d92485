"""Modes that transform the loss of hard labels into the loss of soft labels.

Cross-entropy is linear in the target, so the loss of a soft label is a sum of losses of hard labels. A mode transforms the loss
where the module calls ``F.cross_entropy``, ``F.nll_loss``, ``F.binary_cross_entropy`` or
``F.binary_cross_entropy_with_logits``, as the losses of ``torch.nn`` do. Accuracies, confusion matrices and class weights keep
the true labels, and ignored positions stay ignored.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_noise._tensor import column
from lightning_noise.batch import describe
from lightning_noise.losses import functional
from lightning_noise.losses.functional import class_dim, log_softmax, scale, sum_weights
from lightning_noise.losses.tracker import ALIAS, Tracked, Tracker, find_tensors
from lightning_noise.losses.uses import Uses

__all__ = [
    "CheckedLabelLoss",
    "LabelLoss",
    "MixedLabelLoss",
    "NoisyLabelLoss",
    "SmoothedLabelLoss",
    "resume_modes",
    "suspend_modes",
]

Loss = Callable[..., Tensor]


class LabelLoss(TorchFunctionMode, ABC):
    """Transforms the losses that are computed on a target while the mode is active.

    A mode transforms a loss on the target, and on a tensor that torch functions derive from the target; see
    :class:`~lightning_noise.losses.tracker.Tracker`. The same functions derive tensors from labels that are paired with the
    target. A mask picks the same positions of both. If the mask of the paired labels would leave out a position, the label of
    the target takes its place.

    Modes nest in any order, and mixing always mixes smoothed losses. To mix noisy labels, put the mode of the noisy labels
    outside; inside, it raises an error.

    The result is exact if the module applies to the loss a linear function that is the same for all labels. A focal loss is not
    exact: a function of ``F.cross_entropy`` with ``reduction="none"`` becomes this function of the transformed loss. Masks and
    weights that the module derives from the labels and multiplies by the loss stay those of the true labels. The ``weight`` and
    ``ignore_index`` of the loss itself follow the transformed labels.

    A loss that is only logged is transformed, too. Not transformed are a loss that calls none of the four functions, such as
    ``F.linear_cross_entropy``, and a loss on a target that left torch as a number or array, was written into another tensor, or
    was merged with a tensor that is not tracked. If the backward pass needs such a loss, or another function that joins the
    labels and a tensor with a gradient, ``unfollowed`` names the function. Metrics are not named.

    A compiled step is compiled once for all levels, and once more for a run without a mode.

    Attributes:
        target: The target of the batch.
        applied: Whether a loss with a gradient was transformed.
        tracker: The tensors that derive from the target, while the mode is active.
        searches: Whether to search for functions of the target that the loss needs and that are not transformed.
        unfollowed: These functions, each with the place of the call. They use the labels of the batch. Compiled code is not
            searched.
        reads_weights: Whether weights that the module reads off the labels make a difference to the transformed loss.
        reads_tokens: Whether an embedding of sequences of labels does, such as that of a decoder that reads the previous
            labels.
    """

    reads_weights: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target
        self.applied = False
        self.tracker = Tracker(target)
        self.searches = True
        self.unfollowed: list[str] = []
        self._uses: Uses | None = None
        self._modes: tuple[LabelLoss, ...] = ()
        self._is_suspended = False

    def __enter__(self) -> LabelLoss:
        self.tracker = Tracker(self.target, **self.paired_tensors())
        if self.searches:
            self._uses = Uses(self.tracker, weights=self.reads_weights, tokens=self.reads_tokens)
        self._modes = (self, *_active.get())
        _active.set(self._modes)
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if not self._is_suspended:
            super().__exit__(exc_type, exc_val, exc_tb)
        self._is_suspended = False
        _active.set(self._modes[1:])
        # frees the tensors of the step; the modes refer to this one, and a cycle would keep its labels
        self.tracker, self._uses, self._modes = Tracker(self.target), None, ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            return self._run_backward(*args, **kwargs)
        is_compiled = torch.compiler.is_compiling()
        if func is torch.autograd.grad and not is_compiled:
            self._trace(_find_edges(kwargs["outputs"] if "outputs" in kwargs else args[0]))
        if not (is_compiled or self.tracker.may_contain((*args, *kwargs.values()))):
            return func(*args, **kwargs)  # nearly all calls of a step end here
        if func in _PARAMETERS:
            call = _bind(func, args, kwargs)
            modes = [mode for mode in self._modes if mode.tracker.find(call.get("target")) is not None]
            if modes:
                loss = _transform(modes, func, call)
                for mode in modes:
                    mode._follow_loss(loss)
                return loss
        output = func(*args, **kwargs)
        self.tracker.track(func, args, kwargs, output)
        if not is_compiled and self._uses is not None:
            self._uses.see(func, args, kwargs, output)
        return output

    @abstractmethod
    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        """Returns the transformed loss of a call.

        Args:
            modes: The outer modes that also transform this loss.
            loss: The function that computes the loss.
            call: The arguments of the loss by name.
        """

    def paired_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that are paired with the target: the ``labels`` and ``share`` of a tracker."""
        return {}

    def tracked(self, target: Tensor) -> Tracked:
        """Returns the target of a loss with the tensors that are paired with it."""
        entry = self.tracker.find(target)
        if entry is None:
            raise ValueError(
                f"{type(self).__name__} needs the labels of the batch, but another mode has changed them at the loss; "
                "change them before, in the batch"
            )
        return entry

    def _run_backward(self, tensors: Any, inputs: Any = None, **arguments: Any) -> None:
        """Runs the backward pass with the mode active, so that activation checkpointing recomputes the transformed loss.

        Torch disables a mode within the function that it intercepts, but does not intercept a call on gradient edges.
        """
        arguments["grad_tensors"] = arguments.pop("gradient", arguments.get("grad_tensors"))
        if inputs is not None:
            for tensor in find_tensors(inputs):
                tensor.retain_grad()  # as torch does for each input that is a tensor
            arguments["inputs"] = _find_edges(inputs)
        edges = _find_edges(tensors)
        self._trace(edges)
        super().__enter__()
        try:
            torch.autograd.backward(edges, **arguments)
        finally:
            super().__exit__(None, None, None)

    def _follow_loss(self, loss: Tensor) -> None:
        if not torch.compiler.is_compiling() and self._uses is not None:
            self._uses.add_loss(loss)

    def _trace(self, edges: Iterable[GradientEdge]) -> None:
        """Finds the functions of the target that a backward pass needs, for all modes."""
        nodes = [edge.node for edge in edges]
        for mode in self._modes:
            if mode._uses is not None:
                mode.unfollowed = mode._uses.trace(nodes)


class SmoothedLabelLoss(LabelLoss):
    """Smooths the labels; :func:`~lightning_noise.losses.smoothed_cross_entropy` has the formula.

    Args:
        target: The target of the batch: classes, probabilities, or the labels of a binary cross-entropy.
        level: The share of the uniform distribution, of shape ``()``. A tensor in float64 is exact.

    Raises:
        TypeError: The level is not a tensor of shape ``()``.
        ValueError: The criterion or another mode smooths the target, too.

    Example:
        >>> logits, target = torch.randn(8, 3), torch.arange(8) % 3
        >>> with SmoothedLabelLoss(target, torch.tensor(0.1, dtype=torch.float64)):
        ...     loss = torch.nn.CrossEntropyLoss()(logits, target)
        >>> torch.equal(loss, F.cross_entropy(logits, target, label_smoothing=0.1))
        True
    """

    def __init__(self, target: Tensor, level: Tensor):
        super().__init__(target)
        if not isinstance(level, Tensor) or level.ndim:
            raise TypeError(
                f"level must be a tensor of shape (), an input of a compiled step, got {describe(level)}; "
                "use torch.tensor(0.1, dtype=torch.float64)"
            )
        self.level = level

    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        smoothing = call.get("label_smoothing", 0.0)
        if smoothing or loss not in _SMOOTHED:
            other = f"the criterion has label_smoothing={smoothing}" if smoothing else "another mode smooths this target"
            raise ValueError(f"labels can be smoothed in one place only, but {other}; remove one of the two")
        call = _without_smoothing(call)
        return _transform(modes, partial(_SMOOTHED[loss], level=self.level), call)


class NoisyLabelLoss(LabelLoss):
    """Computes the loss of noisy labels, while everything else reads the true labels.

    Args:
        target: The target of the batch.
        labels: The noisy labels, of the shape of the target.
        ignore_index: The label of positions that do not count, which the noise has left alone.

    Raises:
        ValueError: The labels have another shape than the target, or the loss ignores a label that the noise has changed.

    Example:
        >>> logits, target, noisy = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 2, 0])
        >>> with NoisyLabelLoss(target, noisy):
        ...     loss = F.cross_entropy(logits, target)
        >>> torch.equal(loss, F.cross_entropy(logits, noisy))
        True
    """

    reads_weights: ClassVar[bool] = True

    def __init__(self, target: Tensor, labels: Tensor, *, ignore_index: int = -100):
        super().__init__(target)
        if labels.shape != target.shape:
            raise ValueError(f"labels must have the shape of the target, {tuple(target.shape)}, got {describe(labels)}")
        self.labels = labels
        self.ignore_index = ignore_index

    def paired_tensors(self) -> dict[str, Tensor]:
        return {"labels": self.labels}

    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        _check_ignored(call, self.ignore_index)
        target, labels, _ = self.tracked(call["target"])
        if not target.is_floating_point():
            # the module may have marked positions that do not count, on the true labels and on the noisy ones
            ignored = call.get("ignore_index", -100)
            labels = torch.where((target.long() == ignored) | (labels.long() == ignored), target, labels)
        return _transform(modes, loss, call | {"target": labels})


class CheckedLabelLoss(LabelLoss):
    """Changes no loss, and checks that the loss ignores no other label than a noise in the batch has left alone.

    Args:
        target: The target of the batch.
        ignore_index: The label of positions that do not count, which the noise has left alone.

    Raises:
        ValueError: The loss ignores another label.
    """

    def __init__(self, target: Tensor, *, ignore_index: int = -100):
        super().__init__(target)
        self.ignore_index = ignore_index
        self.searches = False

    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        _check_ignored(call, self.ignore_index)
        return _transform(modes, loss, call)


class MixedLabelLoss(LabelLoss):
    r"""Mixes the losses of the labels of two samples, for an input that is mixed from both.

    .. math:: L = \lambda \, L(a) + (1 - \lambda) \, L(b), \quad b_i = a_{\pi(i)}

    Each mean has its own denominator: :math:`L(b)` is divided by the class weights of :math:`b` and leaves out the ignored
    positions of :math:`b`. If all labels of the partners are ignored, the labels of the samples take their place. The
    :math:`\lambda` of each sample moves with the elements of the target.

    Args:
        target: The target of the batch, of shape :math:`(B, *)`.
        partners: The permutation :math:`\pi`, the index of the partner of each sample, of shape :math:`(B)`.
        lam: The share :math:`\lambda \in [0, 1]` of the sample itself, of shape ``()`` for all samples, or :math:`(B)`.

    Raises:
        ValueError: The shapes do not fit, or the :math:`\lambda` of each sample cannot be traced to the loss. For example,
            the ``argmax`` of one-hot rows needs one :math:`\lambda` for the batch.

    References:
        mixup: Beyond Empirical Risk Minimization (Zhang et al., 2018), https://arxiv.org/abs/1710.09412

        CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (Yun et al., 2019),
        https://arxiv.org/abs/1905.04899

    Example:
        >>> logits, target, partners = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0, 3, 2])
        >>> with MixedLabelLoss(target, partners, torch.tensor(0.25)):
        ...     loss = F.cross_entropy(logits, target)
        >>> torch.equal(loss, 0.25 * F.cross_entropy(logits, target) + 0.75 * F.cross_entropy(logits, target[partners]))
        True
    """

    reads_weights: ClassVar[bool] = True
    reads_tokens: ClassVar[bool] = True

    def __init__(self, target: Tensor, partners: Tensor, lam: Tensor):
        super().__init__(target)
        samples = target.shape[:1]
        if partners.shape != samples or not isinstance(lam, Tensor) or lam.shape not in ((), samples):
            raise ValueError(
                f"for a target of {len(target)} samples, partners must be of shape {tuple(samples)} and lam a tensor of "
                f"shape () or {tuple(samples)}, got {describe(partners)} and {describe(lam)}"
            )
        self.partners = partners
        self.lam = lam

    def paired_tensors(self) -> dict[str, Tensor]:
        share = column(self.lam, self.target).expand(self.target.shape) if self.lam.ndim else self.lam
        labels = self.target.index_select(0, self.partners)
        if labels.is_floating_point():
            # before the module fills missing labels; if no label is 0, -1 is a class
            missing = labels.isnan() | ((labels < 0) & (self.target == 0).any())
            labels = torch.where(missing, self.target, labels)
        return {"labels": labels, "share": share}

    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        target, partner, lam = self.tracked(call["target"])
        if target.is_floating_point():
            # a binary label that is missing, as a NaN or a negative number, gives its place to the own one
            partner = torch.where(partner >= 0, partner, target)
        else:
            # the mean would be 0 / 0 if all labels of the partners were ignored
            counted = (partner.long() != call.get("ignore_index", -100)).any()
            partner = torch.where(counted, partner, target)
            if loss is F.cross_entropy and not modes and not call.get("label_smoothing"):  # one softmax for both labels
                call = _without_smoothing(call) | {"input": log_softmax(call["input"])}
                loss = F.nll_loss
        transformed = partial(_transform, modes, loss)
        return _weigh(transformed, call, lam) + _weigh(transformed, call | {"target": partner}, 1 - lam)


_active: ContextVar[tuple[LabelLoss, ...]] = ContextVar("active", default=())  # innermost first


def suspend_modes() -> None:
    """Takes the active modes off the stack of torch, where they slow down every call."""
    for mode in _active.get():
        TorchFunctionMode.__exit__(mode, None, None, None)
        mode._is_suspended = True


def resume_modes() -> None:
    """Puts suspended modes back on the stack of torch."""
    for mode in reversed(_active.get()):
        if mode._is_suspended:
            TorchFunctionMode.__enter__(mode)
            mode._is_suspended = False


_SMOOTHED: dict[Loss, Loss] = {
    F.cross_entropy: functional.smoothed_cross_entropy,
    F.nll_loss: functional.smoothed_nll_loss,
    F.binary_cross_entropy: functional.smoothed_binary_cross_entropy,
    F.binary_cross_entropy_with_logits: functional.smoothed_binary_cross_entropy_with_logits,
}
_PARAMETERS = {loss: tuple(inspect.signature(loss).parameters) for loss in _SMOOTHED}
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward})


def _bind(func: Loss, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of a loss by name. ``reduction`` replaces the deprecated arguments."""
    call = dict(zip(_PARAMETERS[func], args, strict=False)) | kwargs
    average, reduce = call.pop("size_average", None), call.pop("reduce", None)
    if average is not None or reduce is not None:
        call["reduction"] = "none" if reduce is False else "sum" if average is False else "mean"
    return call


def _without_smoothing(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "label_smoothing"}


def _check_ignored(call: dict[str, Any], ignore_index: int) -> None:
    """Raises an error if a loss ignores a label that the noise takes for a class."""
    ignored = call.get("ignore_index", -100)
    if ignore_index == -100 != ignored:
        raise ValueError(
            f"the loss ignores the label {ignored}, which the noise takes for a class; type ignore_index={ignored}, or the "
            "label of the batch that became this label"
        )


def _transform(modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
    """Returns the loss of a call, transformed by all modes."""
    if not modes:
        return loss(**call | {"target": ALIAS(call["target"])})
    if torch.is_grad_enabled():  # a loss without a gradient is only logged
        modes[0].applied = True
    return modes[0].transform_loss(modes[1:], loss, call)


def _weigh(transformed: Callable[[dict[str, Any]], Tensor], call: dict[str, Any], lam: Tensor) -> Tensor:
    """Returns one term of a mixed loss."""
    if lam.ndim == 0:
        return scale(transformed(call), lam)
    target = call["target"]
    losses = transformed(call | {"reduction": "none"})
    if target.ndim > losses.ndim:  # probabilities have a dimension of classes, and their losses have none
        lam = lam.select(class_dim(target), 0)
    if lam.shape != losses.shape:
        raise ValueError(
            f"lam of each sample does not follow the target of shape {tuple(target.shape)} from its batch to the loss; "
            "mix with one lam for the batch, or use a target whose elements are those of the batch"
        )
    losses, reduction = scale(losses, lam.to(losses.device)), call.get("reduction", "mean")
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if target.is_floating_point():
        return losses.mean()
    return losses.sum() / sum_weights(target, call.get("weight"), call.get("ignore_index", -100))


def _find_edges(tensors: Any) -> list[GradientEdge]:
    """Returns the edges of the tensors in the autograd graph."""
    tensors = [tensors] if isinstance(tensors, (Tensor, GradientEdge)) else tensors
    return [get_gradient_edge(item) if isinstance(item, Tensor) else item for item in tensors]
