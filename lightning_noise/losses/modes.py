r"""Soft targets at the loss: the labels of the batch stay what they are, and the loss is that of softened ones.

Cross-entropy is linear in the target, so the loss of a soft target is a sum of losses of hard ones. Taken where the loss is
computed, softening leaves alone all else that reads the labels: accuracies, confusion matrices, class weights, ignored
positions. A mode follows the target through the training step, by the identity of the tensors that are made from it, and
changes ``F.cross_entropy``, ``F.nll_loss`` and ``F.binary_cross_entropy_with_logits``, and with them the losses of
``torch.nn``, wherever their target is one of these.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_noise._tensor import column
from lightning_noise.batch import describe
from lightning_noise.loop.internals import run_backward

__all__ = [
    "LabelLoss",
    "MixedLabelLoss",
    "NoisyLabelLoss",
    "SmoothedLabelLoss",
    "smoothed_binary_cross_entropy_with_logits",
    "smoothed_cross_entropy",
    "smoothed_nll_loss",
]

Loss = Callable[..., Tensor]


def smoothed_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    level: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Returns the cross-entropy with smoothed labels, as ``F.cross_entropy(..., label_smoothing=level)`` does.

    .. math:: L_\varepsilon = (1 - \varepsilon) \, L + \frac{\varepsilon}{K} \sum_{k=1}^{K} -w_k \log p_k

    It does the operations of torch in their order and is equal to it bit for bit, but for the mean with class weights and
    ignored positions, whose weights are summed with zeros among them and may differ in the last bit. The level is a tensor,
    which a compiled step takes as an input where it would be compiled anew for each number. Without class weights
    :math:`L_\varepsilon = (1 - \varepsilon) L + \varepsilon (\mathrm{KL}(U \Vert p) + \log K)`.

    Args:
        input: The logits, of shape :math:`(N, K, *)` or :math:`(K)`.
        target: The classes, of shape :math:`(N, *)` or :math:`()`, or probabilities of the shape of the input.
        weight: The weights of the classes, of shape :math:`(K)`.
        level: The share :math:`\varepsilon \in [0, 1]` of the uniform distribution, of shape :math:`()`; 0.1 is usual.
        ignore_index: The class of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    References:
        Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2016), https://arxiv.org/abs/1512.00567

        When Does Label Smoothing Help? (Müller et al., 2019), https://arxiv.org/abs/1906.02629

    Example:
        >>> logits, target = torch.randn(8, 3), torch.arange(8) % 3
        >>> loss = smoothed_cross_entropy(logits, target, level=torch.tensor(0.1, dtype=torch.float64))
        >>> torch.equal(loss, F.cross_entropy(logits, target, label_smoothing=0.1))
        True
    """
    dim = _class_dim(input)
    if target.is_floating_point():
        soft = _smoothed(target, level, input.shape[dim])
        return F.cross_entropy(input, soft, weight, ignore_index=ignore_index, reduction=reduction)
    log_probs = F.log_softmax(_full_precision(input), dim)
    return smoothed_nll_loss(log_probs, target, weight, level=level, ignore_index=ignore_index, reduction=reduction)


def smoothed_nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    level: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Returns the loss of :func:`smoothed_cross_entropy` from log-probabilities.

    Args:
        input: The log-probabilities, of shape :math:`(N, K, *)` or :math:`(K)`.
        target: The classes, of shape :math:`(N, *)` or :math:`()`.
        weight: The weights of the classes, of shape :math:`(K)`.
        level: The share of the uniform distribution, of shape :math:`()`.
        ignore_index: The class of positions that do not count.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Example:
        >>> log_probs = torch.full((2, 4), 0.25).log()
        >>> loss = smoothed_nll_loss(log_probs, torch.tensor([0, 1]), level=torch.tensor(0.3))
        >>> torch.allclose(loss, torch.tensor(4.0).log())
        True
    """
    input, dim = _full_precision(input), _class_dim(input)
    hard = F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)
    weighted = input if weight is None else input * weight.view(-1, *[1] * (input.ndim - dim - 1))
    uniform = (-weighted.sum(dim)).masked_fill(target == ignore_index, 0)
    if reduction != "none":
        uniform = uniform.sum()
    if reduction == "mean":
        uniform = uniform / _total_weight(target, weight, ignore_index)
    level = level.to(torch.promote_types(level.dtype, input.dtype))
    return _scaled(hard, 1 - level) + _scaled(uniform, level / input.shape[dim])


def smoothed_binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    level: Tensor,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Returns the binary cross-entropy of :math:`(1 - \varepsilon) y + \varepsilon / 2`, for one label or many.

    Args:
        input: The logits, of any shape.
        target: The labels in [0, 1], of the same shape.
        weight: A weight that broadcasts to the input.
        level: The share of the uniform distribution over yes and no, of shape :math:`()`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        pos_weight: The weights of the positive labels.

    Example:
        >>> loss = smoothed_binary_cross_entropy_with_logits(torch.zeros(5), torch.ones(5), level=torch.tensor(0.2))
        >>> torch.allclose(loss, torch.tensor(2.0).log())
        True
    """
    soft = _smoothed(target, level, 2)
    return F.binary_cross_entropy_with_logits(input, soft, weight, reduction=reduction, pos_weight=pos_weight)


class LabelLoss(TorchFunctionMode, ABC):
    """Softens the losses that are computed on a target while it is active.

    The target is followed by identity: what a torch function makes of tensors that are all followed is followed, and so is
    what it picks from one by an index or a mask, fills in or converts; ``zeros_like`` of the target is not. Other losses are
    left alone, and nothing is written into the target. Modes may be nested in any order, and mixing is then of smoothed
    losses; but labels are changed by the outer mode and mixed by the inner one, or an error says so.

    It is exact where what is made of the loss is linear and the same for all labels. A focal loss is not: as a function of
    ``F.cross_entropy`` with ``reduction="none"`` it becomes that function of the softened loss; nor are masks and weights that
    the module makes of the labels and multiplies the loss by, which stay those of the true labels, while ``weight`` and
    ``ignore_index`` of the loss itself are heeded. A loss that is only logged is softened like one that is minimised. Out of
    reach are a loss that calls none of the three functions, as ``F.linear_cross_entropy``, and a target that leaves torch, as
    numbers and arrays do, is written into another tensor, or is merged with what is not followed.

    A compiled step is compiled once for all levels, and once more for a run without a mode.

    Attributes:
        target: The target of the batch.
        hit: Whether a loss with a gradient was softened.
    """

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target
        self.applied = False
        self._modes: tuple[LabelLoss, ...] = ()
        # the tensors are kept alive for the step: an identity is given again once it is free
        self._followed: list[tuple[Tensor, ...]] = []

    def __enter__(self) -> LabelLoss:
        self._followed = [(self.target, *self.paired_tensors())]
        self._modes = (self, *_active.get())
        _active.set(self._modes)
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        _active.set(self._modes[1:])
        self._followed = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PASSING:
            return func(*args, **kwargs)
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        if func in _ARGUMENTS:
            call = _bound(func, args, kwargs)
            modes = [mode for mode in self._modes if mode.tracked(call.get("target")) is not None]
            if modes:
                return _softened(modes, func, call)
        output = func(*args, **kwargs)
        made = [item for item in _each(output) if isinstance(item, Tensor)]
        learned = len(made) > 0 and made[0].requires_grad and not self.target.requires_grad
        if (made or output is None) and not learned and self._follows(func, args, kwargs):
            self._follow(func, args, kwargs, output)
        return output

    @abstractmethod
    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        """Returns the softened loss of a call.

        Args:
            modes: The modes around this one that soften the loss, too.
            loss: The function that computes it.
            call: The arguments by their names.
        """

    def paired_tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors that accompany the target: what is made of the target is made of them."""
        return ()

    def tracked(self, tensor: Any) -> tuple[Tensor, ...] | None:
        """Returns the tensor with its companions if it is followed."""
        for entry in self._followed:
            if entry[0] is tensor:
                return entry
        return None

    def derived(self, index: int, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Returns what becomes of a companion where ``func`` made ``output`` of the target."""
        if func in _PICKING:  # at the positions that are picked from the target
            picked = func(self._exchanged(args[0], index), *args[1:], **kwargs)
            mask = self.tracked(args[1]) if index == 1 and len(args) == 2 else None
            if mask is None or mask[0].dtype != torch.bool:
                return picked
            # a label that its own mask would leave out is none: the one of the target takes its place
            return torch.where(func(mask[1], args[1]), picked, output)
        func = _RESHAPING.get(func, func)
        return func(*self._exchanged(args, index), **self._exchanged(kwargs, index))

    def _backward(self, func: Any, args: Any, kwargs: Any) -> None:
        """Runs the backward pass within the mode, which is off in the functions that it gets.

        What is checkpointed computes the loss anew in it, and must soften it anew. No public function of torch leaves the
        mode on, so this one calls the engine as they do.
        """
        call = inspect.signature(func).bind(*args, **kwargs).arguments
        tensors, inputs = (_sequence(call.get(name)) for name in (next(iter(call)), "inputs"))
        grads = _sequence(call.get("gradient", call.get("grad_tensors"))) or (None,) * len(tensors)
        create_graph = call.get("create_graph", False)
        retain_graph = call.get("retain_graph")
        super().__enter__()
        try:
            run_backward(
                tensors,
                grads,
                inputs=inputs,
                retain_graph=create_graph if retain_graph is None else retain_graph,
                create_graph=create_graph,
            )
        finally:
            super().__exit__(None, None, None)

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        companions = [_each(self.derived(i, func, args, kwargs, output)) for i in range(1, len(self._followed[0]))]
        for entry in zip(_each(output), *companions, strict=True):
            new = isinstance(entry[0], Tensor) and self.tracked(entry[0]) is None
            if new and all([item.shape == entry[0].shape for item in entry[1:2]]):  # as unique values are not
                self._followed.append(entry)

    def _follows(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func in _CREATING or func is _ALIAS:
            return False
        tensors = _values(func, args, kwargs)
        if func in _PICKING or func in _KEEPING:
            tensors = tensors[:1]
        return len(tensors) > 0 and all([self.tracked(tensor) is not None for tensor in tensors])

    def _exchanged(self, value: Any, index: int) -> Any:
        """The arguments with the companion of each tensor that is followed."""
        if isinstance(value, Tensor):
            entry = self.tracked(value)
            return value if entry is None else entry[index]
        if isinstance(value, dict):
            return {key: self._exchanged(item, index) for key, item in value.items()}
        if isinstance(value, tuple | list):
            items = [self._exchanged(item, index) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value


class SmoothedLabelLoss(LabelLoss):
    """Smooths the labels: see :func:`smoothed_cross_entropy` for the formula.

    Args:
        target: The target of the batch: classes, probabilities, or the labels of a binary cross-entropy.
        level: The share of the uniform distribution, of shape ``()``, a tensor in float64 to be exact.

    Raises:
        TypeError: The level is no tensor of shape ``()``.
        ValueError: The criterion smooths already, or two modes would smooth one target.

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
                f"level must be a tensor of shape (), which a compiled step takes as an input, got {describe(level)}"
            )
        self.level = level

    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        smoothing = call.get("label_smoothing", 0.0)
        if smoothing or loss not in _SMOOTHED:
            other = f"the criterion has label_smoothing={smoothing}" if smoothing else "another mode smooths this target"
            raise ValueError(f"label smoothing must have one owner, but {other}; remove one of the two")
        call = {name: value for name, value in call.items() if name != "label_smoothing"}
        return _softened(modes, partial(_SMOOTHED[loss], level=self.level), call)


class NoisyLabelLoss(LabelLoss):
    """Takes the loss of other labels: those that are noisy, while all else reads the true ones.

    What is made of the target is made of the other labels, too, but a mask picks the same positions of both, and the true
    label where it would leave out the other one.

    Args:
        target: The target of the batch.
        labels: What the loss is to see in its place, of the same shape.

    Example:
        >>> logits, target, noisy = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 2, 0])
        >>> with NoisyLabelLoss(target, noisy):
        ...     loss = F.cross_entropy(logits, target)
        >>> torch.equal(loss, F.cross_entropy(logits, noisy))
        True
    """

    def __init__(self, target: Tensor, labels: Tensor):
        super().__init__(target)
        if labels.shape != target.shape:
            raise ValueError(f"labels must have the shape of the target, {tuple(target.shape)}, got {describe(labels)}")
        self.labels = labels

    def paired_tensors(self) -> tuple[Tensor, ...]:
        return (self.labels,)

    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        _, labels = self.tracked(call["target"])  # type: ignore[misc]
        return _softened(modes, loss, call | {"target": labels})


class MixedLabelLoss(LabelLoss):
    r"""Takes the loss of the labels of two samples, as goes with an input that is mixed of the two.

    .. math:: L = \lambda \, L(a) + (1 - \lambda) \, L(b), \quad b_i = a_{\pi(i)}

    For a mean each term has the denominator of its own hard call: :math:`L(b)` is divided by the class weights of :math:`b`
    and leaves out what is ignored in :math:`b`. All that is made of the target is made of the partner labels, too, but a mask
    picks the same positions of both. The own label takes the place of a partner's that its mask would leave out, and of all
    partners where none of them counts. What moves the elements of the target, moves the :math:`\lambda` of each sample.

    Args:
        target: The target of the batch, of shape :math:`(B, *)`.
        partners: The permutation :math:`\pi`, the index of the partner of each sample, of shape :math:`(B)`.
        lam: The share :math:`\lambda \in [0, 1]` of the sample itself, of shape ``()``, or :math:`(B)` for one each.

    Raises:
        ValueError: The shapes do not fit, or the :math:`\lambda` of each sample is lost on the way to the loss: the ``argmax``
            of one-hot rows, say, goes only with a :math:`\lambda` of the batch.

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

    def paired_tensors(self) -> tuple[Tensor, ...]:
        lam = column(self.lam, self.target).expand(self.target.shape) if self.lam.ndim else self.lam
        return self.target[self.partners], lam

    def transform_loss(self, modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
        entry = self.tracked(call["target"])
        if entry is None:
            raise ValueError("labels that are changed at the loss cannot be mixed there: change them before, in the batch")
        target, partner, lam = entry
        if not target.is_floating_point() and loss is not F.binary_cross_entropy_with_logits:
            # a partner without a single label that counts would make the mean 0 / 0: its place is taken by the sample's own
            counted = (partner.long() != call.get("ignore_index", -100)).any()
            partner = torch.where(counted, partner, target)
        soft = partial(_softened, modes, loss)
        return _share(soft, call, lam) + _share(soft, call | {"target": partner}, 1 - lam)

    def derived(self, index: int, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if index == 1 or (self.lam.ndim and func in _MOVING):
            return super().derived(index, func, args, kwargs, output)
        followed = [self.tracked(tensor) for tensor in _values(func, args, kwargs)]
        lam = next(entry[2] for entry in followed if entry is not None)
        if self.lam.ndim and func not in _ELEMENTWISE:
            lam = lam.new_empty(0)  # nobody knows where it went
        return [_fitted(lam, item) for item in _each(output)]


_active: ContextVar[tuple[LabelLoss, ...]] = ContextVar("active", default=())

# what is passed on through it is not followed: neither a mode around this one nor this one, where it sees the calls of a
# compiled graph again, must soften the loss twice
_ALIAS = torch.ops.aten.alias.default

_ARGUMENTS = {
    loss: tuple(inspect.signature(loss).parameters)
    for loss in (F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits)
}
_SMOOTHED: dict[Loss, Loss] = {
    F.cross_entropy: smoothed_cross_entropy,
    F.nll_loss: smoothed_nll_loss,
    F.binary_cross_entropy_with_logits: smoothed_binary_cross_entropy_with_logits,
}


def _functions(*names: str) -> frozenset[Any]:
    """The functions and methods of these names: by themselves, because a compiler does not know their names."""
    found = [getattr(owner, name) for name in names for owner in (torch, Tensor) if hasattr(owner, name)]
    # a property is known by its getter; torch.float and the like are no functions
    return frozenset(item if callable(item) else item.__get__ for item in found if not isinstance(item, torch.dtype))


# the first argument is what matters, other tensors only say where or how
_PICKING = _functions("__getitem__", "gather", "index_select", "masked_select", "take_along_dim")
_KEEPING = _functions(
    *("__setitem__", "expand_as", "masked_fill", "masked_fill_", "reshape_as", "to", "type_as", "view_as"),
)
# elements are moved and not changed
_MOVING = _PICKING | _functions(
    *("T", "mT", "broadcast_to", "cat", "chunk", "concat", "contiguous", "diagonal", "expand", "expand_as", "flatten"),
    *("flip", "fliplr", "flipud", "hsplit", "hstack", "moveaxis", "movedim", "narrow", "permute", "ravel", "repeat"),
    *("repeat_interleave", "reshape", "reshape_as", "roll", "rot90", "select", "split", "squeeze", "stack", "swapaxes"),
    *(
        "swapdims",
        "t",
        "tensor_split",
        "tile",
        "transpose",
        "vsplit",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
        "vstack",
    ),
)
_MOVING |= {F.pad}
# elements stay where they are
_ELEMENTWISE = _functions(
    *("__and__", "__invert__", "__or__", "__setitem__", "add", "byte", "clamp", "clamp_max", "clamp_min", "clip", "clone"),
    *("detach", "div", "double", "eq", "float", "ge", "gt", "half", "int", "le", "logical_and", "logical_not", "logical_or"),
    *("long", "lt", "masked_fill", "masked_fill_", "mul", "ne", "remainder", "requires_grad_", "short", "sub", "to", "type"),
    *("type_as", "where", "__add__", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__mul__", "__ne__", "__sub__"),
    *("__radd__", "__rmul__", "__rsub__", "__mod__", "floor_divide", "__floordiv__", "alias", "bool", "bfloat16", "char"),
) | {F.one_hot, torch.Tensor.cpu, torch.Tensor.cuda}
# a companion may lie in memory in another way
_RESHAPING: dict[Any, Any] = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
# the result has the shape of the argument and nothing else of it
_CREATING = _functions(*[name for name in {*dir(torch), *dir(Tensor)} if name.endswith("_like") or name.startswith("new_")])


# half of what comes by in a step: an optimizer clears the gradients before the backward pass
_PASSING = frozenset({Tensor.grad.__get__, Tensor.grad.__set__})  # type: ignore[attr-defined]
_BACKWARD = frozenset({Tensor.backward, torch.autograd.backward})


def _sequence(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,) if isinstance(value, Tensor) else tuple(value)


def _softened(modes: list[LabelLoss], loss: Loss, call: dict[str, Any]) -> Tensor:
    """The loss of a call, softened by all of the modes."""
    if not modes:
        return loss(**call | {"target": _ALIAS(call["target"])})
    if torch.is_grad_enabled():  # and is not only logged
        modes[0].applied = True
    return modes[0].transform_loss(modes[1:], loss, call)


def _bound(func: Loss, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a loss by their names, without those that are deprecated in favour of ``reduction``."""
    call = dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
    average, reduce = call.pop("size_average", None), call.pop("reduce", None)
    if average is not None or reduce is not None:
        call["reduction"] = "none" if reduce is False else "sum" if average is False else "mean"
    return call


def _share(soft: Callable[[dict[str, Any]], Tensor], call: dict[str, Any], lam: Tensor) -> Tensor:
    """The share of a term in a mixed loss."""
    if lam.ndim == 0:
        return _scaled(soft(call), lam)
    target, reduction = call["target"], call.get("reduction", "mean")
    losses = soft(call | {"reduction": "none"})
    if target.ndim > losses.ndim:  # probabilities: the positions of the loss have no dimension of classes
        lam = lam.select(_class_dim(target), 0)
    if lam.shape != losses.shape:
        raise ValueError(
            f"lam of each sample does not follow the target of shape {tuple(target.shape)} from its batch to the loss; "
            "mix with one lam for the batch, or use a target whose elements are those of the batch"
        )
    losses = _scaled(losses, lam.to(losses.device))
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if target.is_floating_point():
        return losses.mean()
    return losses.sum() / _total_weight(target, call.get("weight"), call.get("ignore_index", -100))


def _total_weight(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The denominator of a mean."""
    ignored = target.long() == ignore_index  # of unsigned labels, -100 would be 156
    if weight is None:
        return (~ignored).sum()
    weights = weight.gather(0, target.long().masked_fill(ignored, 0).flatten())
    return weights.masked_fill(ignored.flatten(), 0).sum()


def _smoothed(target: Tensor, level: Tensor, classes: int) -> Tensor:
    level = level.to(torch.promote_types(level.dtype, target.dtype))
    return (_scaled(target, 1 - level) + level / classes).to(target.dtype)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` times a factor as torch multiplies by a number: in float32 at least, whatever the dtype of the factor."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) * factor.to(dtype)).to(x.dtype)


def _full_precision(x: Tensor) -> Tensor:
    """``x`` as autocast hands it to a loss."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 else x


def _class_dim(x: Tensor) -> int:
    return 0 if x.ndim == 1 else 1


def _fitted(lam: Tensor, output: Any) -> Tensor:
    """The share of each element after a function that moves none, where one-hot coding adds a dimension."""
    if lam.ndim and isinstance(output, Tensor) and output.shape[:-1] == lam.shape:
        return lam.unsqueeze(-1).expand(output.shape)
    return lam


def _each(output: Any) -> Iterable[Any]:
    return output if isinstance(output, tuple | list) else (output,)


def _values(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a function is of; the condition of ``where`` says which, and not what."""
    return _tensors([*(args[1:] if func is torch.where else args), *kwargs.values()])


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found
