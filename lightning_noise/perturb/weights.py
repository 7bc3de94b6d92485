"""Parameters perturbed in place, and put back from a copy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_noise._tensor import column
from lightning_noise.loop.internals import copy_all_, count_writes, plain_name, register_gradient_hook, register_state_dict_hook
from lightning_noise.noise import Noise
from lightning_noise.patterns import match
from lightning_noise.perturb.sharding import check_rows_are_whole, is_sharded, local, parameter_key, reshard, whole, with_local
from lightning_noise.rng import Key

__all__ = [
    "GradientOf",
    "PerturbedParameters",
    "RelativeTo",
    "check_dense",
    "find_parameters",
    "unit_of",
    "weight_noise",
]

_WRITES: Any = WeakTensorKeyDictionary()  # how often noises have written to a parameter
RelativeTo = Literal["std", "max", "filter"]
GradientOf = Literal["straight_through", "reparametrized"]


def weight_noise(w: Tensor, noise: Noise, level: float | Tensor, key: Key, relative: RelativeTo | None = None) -> Tensor:
    r"""Returns the weights with noise, as a function of ``w`` that can be differentiated.

    .. math:: \tilde w = \text{noise}(w, \sigma u), \quad
        u = 1, \; \operatorname{std}(w), \; \max |w| \; \text{or} \; \lVert w_f \rVert / \lVert n_f \rVert

    The last is filter normalisation: :math:`n_f`, the noise of the filter :math:`w_f`, a row of the tensor, gets its norm.

    Args:
        w: The weights.
        noise: The noise, an additive one where the level is relative.
        level: The amount :math:`\sigma`.
        key: The key of the draw.
        relative: The unit of the level, and ``None`` for that of the weights.

    References:
        Visualizing the Loss Landscape of Neural Nets (Li et al., 2018), https://arxiv.org/abs/1712.09913

    Example:
        >>> from lightning_noise import noise
        >>> w = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> (weight_noise(w, noise.Gaussian(), 0.1, Key(()), "filter") - w).norm(dim=1)
        tensor([0.5000, 0.0000])
    """
    # at least float32, so that half precision is rounded once; a row is what noises take for a sample
    x = torch.atleast_1d(w.to(torch.promote_types(w.dtype, torch.float32)))
    if relative == "filter":
        direction = key.apply(noise, torch.zeros_like(x), 1.0)
        y = x + level * direction * (_filter_norm(x) / _filter_norm(direction).clamp_min(torch.finfo(x.dtype).tiny))
    elif relative is not None:
        y = key.apply(noise, x, (level * unit_of(x, relative)).expand(len(x)))
    else:
        y = key.apply(noise, x, level)
    return y.view_as(w).to(w.dtype)


def unit_of(w: Tensor, relative: RelativeTo) -> Tensor:
    """Returns the standard deviation or the largest absolute value of the weights, a scalar."""
    return w.std(correction=0) if relative == "std" else w.abs().amax()


class PerturbedParameters:
    """Parameters with noise, from :meth:`enter` to :meth:`exit`.

    In between a part of them can be restored for an update and perturbed again after it, by another draw. What
    ``module.state_dict()`` returns meanwhile is clean.

    Args:
        module: The module.
        params: Which parameters, as in :func:`find_parameters`.
        noise: The noise.
        level: The amount.
        key: The key of the draws.
        relative: The unit of the level.
        gradient: The gradient at the noisy weights, ``"straight_through"``, or that with respect to the clean ones,
            ``"reparametrized"``: before anything else happens to it, it is multiplied by the Jacobian of the noise.

    Raises:
        ValueError: Nothing is selected, or the parameters are sharded in a way that the options cannot deal with.

    Example:
        >>> from lightning_noise import noise
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.weight.detach().clone()
        >>> noisy = PerturbedParameters(layer, None, noise.Gaussian(), 0.1, Key((0,)))
        >>> noisy.enter()
        >>> bool((layer.weight != before).all()), bool((layer.state_dict()["weight"] == before).all())
        (True, True)
        >>> noisy.exit()
        >>> bool((layer.weight == before).all())
        True
    """

    def __init__(
        self,
        module: nn.Module,
        params: str | Sequence[str] | None,
        noise: Noise,
        level: float,
        key: Key,
        *,
        relative: RelativeTo | None = None,
        gradient: GradientOf = "straight_through",
    ):
        self.module = module
        reshard(module)
        self.names = {parameter: name for name, parameter in find_parameters(module, params).items()}
        self.noise = noise
        self.level = level
        self.relative: RelativeTo | None = relative
        self.is_absolute: bool = relative is None and noise.additive
        # what is absolute does not depend on the weights
        self.reparametrized = gradient == "reparametrized" and not self.is_absolute
        self.clean: dict[nn.Parameter, Tensor] = {}
        self._versions: dict[nn.Parameter, int] = {}
        self._updates: Counter[nn.Parameter] = Counter()
        self._handles: list[Any] = []
        self._sharded = any(is_sharded(parameter) for parameter in self.names)
        # processes that share a tensor must see one noise
        self.key = key.everywhere if self._sharded else key
        if self._sharded and self.reparametrized:
            raise ValueError("gradient='reparametrized' needs whole parameters, but these are sharded over processes")
        if relative == "filter":
            for parameter, name in self.names.items():
                check_rows_are_whole(parameter, name)

    def enter(self) -> None:
        """Perturbs all parameters."""
        self.perturb(self.names)
        self._handles = [register_state_dict_hook(self.module, self._put_clean)]
        for parameter in self.names if self.reparametrized else ():
            if parameter.requires_grad:
                # before those that are there, which are about the weights that this noise was given
                self._handles.append(register_gradient_hook(parameter, partial(self._gradient_of_clean, parameter)))

    def exit(self) -> None:
        """Restores all parameters."""
        for handle in self._handles:
            handle.remove()
        self.restore(self.names)
        reshard(self.module)

    def check_untouched(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raises a ValueError where somebody has written to a noisy parameter, which would be lost when it is restored."""
        for parameter in parameters:
            written = parameter in self.clean and self._versions[parameter] != _version(parameter)
            if written and not is_sharded(parameter) and self._is_changed(parameter):
                raise ValueError(
                    f"the training step has written to {self.names[parameter]!r} while there was noise in it; change weights "
                    "in on_train_batch_end, when they are clean, or select other parameters by params=…"
                )

    @torch.no_grad()
    def perturb(self, parameters: Iterable[nn.Parameter]) -> None:
        """Perturbs those of the parameters that are clean."""
        found = [parameter for parameter in parameters if parameter in self.names and parameter not in self.clean]
        weights = [local(parameter) for parameter in found]
        copies = [torch.empty_like(w) for w in weights]
        copy_all_(copies, weights)
        self.clean.update(zip(found, copies, strict=True))
        for parameter, w, copy in zip(found, weights, copies, strict=True):
            with _own_writes([parameter]):
                w.copy_(self._noisy(parameter, copy))
            self._versions[parameter] = _version(parameter)

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restores those of the parameters that are noisy."""
        found = [parameter for parameter in parameters if parameter in self.clean]
        if found:  # in place, because optimizers, replicas and graphs know the storage
            clean = [self.clean.pop(parameter) for parameter in found]
            with _own_writes(found):
                copy_all_([local(parameter) for parameter in found], clean)

    def updated(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes note of an update, after which the parameters get another draw."""
        self._updates.update(parameter for parameter in parameters if parameter not in self.clean)

    def norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the norms of noise and weights for each parameter, on this process, scalars."""
        norm = torch.linalg.vector_norm
        return {
            self.names[parameter]: (norm(local(parameter).detach().float() - w), norm(w.float()))
            for parameter, w in self.clean.items()
        }

    def _noisy(self, parameter: nn.Parameter, w: Tensor) -> Tensor:
        key = parameter_key(self.key / "parameter", self.names[parameter], parameter)
        if updates := self._updates[parameter]:
            key = key / updates
        if is_sharded(parameter) and self.relative in ("std", "max"):  # which are those of the whole tensor
            unit = unit_of(whole(parameter).float(), self.relative)
            return weight_noise(w, self.noise, self.level * unit, key)
        return weight_noise(w, self.noise, self.level, key, self.relative)

    def _is_changed(self, parameter: nn.Parameter) -> bool:
        noisy = self._noisy(parameter, self.clean[parameter])
        largest = float(noisy.abs().max())
        # what is added and taken away again, as sharpness-aware minimization does, loses some roundings
        close = torch.allclose(parameter.detach(), noisy, rtol=0, atol=8 * torch.finfo(noisy.dtype).eps * largest)
        return math.isfinite(largest) and not close

    def _gradient_of_clean(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        if parameter not in self.clean:
            return None
        check_dense(self.names[parameter], gradient)
        twice = torch.is_grad_enabled()  # the gradient will have a gradient
        with torch.enable_grad():
            w = self.clean[parameter].detach().requires_grad_()
            noisy = self._noisy(parameter, w)
            if not noisy.requires_grad:
                raise ValueError("gradient='reparametrized' needs a noise that can be differentiated: it must not detach x")
            (gradient,) = torch.autograd.grad(noisy, w, gradient, create_graph=twice)
            if twice and gradient.requires_grad:
                _check_factor_is_constant(gradient, w)
        return gradient

    def _put_clean(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            entry, clean = state_dict.get(prefix + name), self.clean.get(parameter)
            # an entry that is not the parameter has been put there by a noise that began before this one
            if entry is not None and clean is not None and local(entry).data_ptr() == local(parameter).data_ptr():
                state_dict[prefix + name] = with_local(parameter, clean)


def find_parameters(module: nn.Module, params: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Returns the parameters that are selected, by name; one that several modules share has its first name.

    Args:
        module: The module.
        params: A pattern of names or a list of these, in which ``*`` stands for any characters, or else all parameters
            of two or more dimensions that are trained.

    Raises:
        ValueError: A pattern selects no floating-point parameter; the message lists the parameters.

    Example:
        >>> list(find_parameters(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        ['0.weight']
        >>> list(find_parameters(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "*.bias"))
        ['0.bias', '1.bias']
    """
    named = {plain_name(name): p for name, p in module.named_parameters() if p.is_floating_point()}
    if params is None:
        found = {name: p for name, p in named.items() if p.ndim >= 2 and p.requires_grad}
        if not found:
            raise ValueError(
                f"no parameter of two dimensions is trained; give params=…; parameters are: {', '.join(map(repr, named))}"
            )
        return found
    return match(named, params, "parameter")


@contextmanager
def _own_writes(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Takes note of what is written by a noise itself, so that what others write can be told from it."""
    before = [_version(parameter) for parameter in parameters]
    yield
    for parameter, version in zip(parameters, before, strict=True):
        _WRITES[parameter] = _WRITES.get(parameter, 0) + _version(parameter) - version  # as it is without this entry


def _version(parameter: nn.Parameter) -> int:
    """How often anybody but a noise has written to the parameter; one that was made for inference does not count it."""
    return count_writes(parameter) - _WRITES.get(parameter, 0)


def check_dense(name: str, gradient: Tensor) -> None:
    """Raises a TypeError where the gradient of the parameter cannot take noise, with the way out."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"noise needs dense gradients, but that of {name!r} is {gradient.layout}; make its embedding with sparse=False"
        )


def _check_factor_is_constant(gradient: Tensor, w: Tensor) -> None:
    """Raises a ValueError where the gradient depends on the weights by the noise, which its own gradient would leave out."""
    if torch.autograd.grad(gradient.sum(), w, retain_graph=True, allow_unused=True)[0] is not None:
        raise ValueError(
            "gradient='reparametrized' has no second derivatives of noise that is relative to the weights; "
            "use 'straight_through', or a noise such as Speckle()"
        )


def _filter_norm(w: Tensor) -> Tensor:
    return column(torch.linalg.vector_norm(w.flatten(1), dim=1), w) if w.ndim > 1 else w.abs()
