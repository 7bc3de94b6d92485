"""Noise in parameters, written in place and undone from a copy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_noise._tensor import column
from lightning_noise.batch import describe
from lightning_noise.loop.internals import (
    copy_all_,
    count_writes,
    hooks_of_weights,
    plain_name,
    preserve_version,
    register_gradient_hook,
    register_state_dict_hook,
)
from lightning_noise.noise import Noise
from lightning_noise.patterns import match
from lightning_noise.perturb.sharding import check_rows_are_whole, is_sharded, local, parameter_key, reshard, whole, with_local
from lightning_noise.rng import Key

__all__ = [
    "GradientOf",
    "PerturbedParameters",
    "RelativeTo",
    "check_dense",
    "check_embeddings_are_dense",
    "find_parameters",
    "unit_of",
    "weight_noise",
]

_WRITES: Any = WeakTensorKeyDictionary()  # how often the noise of this module was written to each parameter
RelativeTo = Literal["std", "max", "filter"]
GradientOf = Literal["straight_through", "reparametrized"]


def weight_noise(w: Tensor, noise: Noise, level: float | Tensor, key: Key, relative: RelativeTo | None = None) -> Tensor:
    r"""Returns the noisy weights as a differentiable function of ``w``.

    .. math:: \tilde w = \text{noise}(w, \sigma u), \quad
        u = 1, \; \operatorname{std}(w), \; \max |w| \; \text{or} \; \lVert w_f \rVert / \lVert n_f \rVert

    The last unit is filter normalization: the noise :math:`n_f` of a filter :math:`w_f`, a row of the tensor, is scaled to the
    norm of the filter. ``relative`` selects the unit :math:`u` of the level :math:`\sigma`, and needs an additive noise.

    References:
        Visualizing the Loss Landscape of Neural Nets (Li et al., 2018), https://arxiv.org/abs/1712.09913

    Example:
        >>> from lightning_noise import noise
        >>> w = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> (weight_noise(w, noise.Gaussian(), 0.1, Key(()), "filter") - w).norm(dim=1)
        tensor([0.5000, 0.0000])
    """
    # half precision is perturbed in float32, to round once; a noise takes each row for a sample
    x = _float(w if w.ndim else w[None])
    if relative == "filter":
        direction = key.apply(noise, torch.zeros_like(x), 1.0)
        y = x + level * direction * (_filter_norm(x) / _filter_norm(direction).clamp_min(torch.finfo(x.dtype).tiny))
    elif relative is not None:
        y = key.apply(noise, x, (level * unit_of(x, relative)).expand(len(x)))
    else:
        y = key.apply(noise, x, level)
    return y.view_as(w).to(w.dtype)


def unit_of(w: Tensor, relative: RelativeTo) -> Tensor:
    """Returns the standard deviation or the largest absolute value, a scalar."""
    return w.std(correction=0) if relative == "std" else w.abs().amax()


class PerturbedParameters:
    """Parameters that hold noise between :meth:`enter` and :meth:`exit`.

    In between, some parameters can be restored for an update, and perturbed by a new draw after the update. The
    ``state_dict()`` of the module and of its parts always returns clean parameters. The weights that pruning computes from
    parameters follow the parameters. :func:`find_parameters` and :func:`weight_noise` explain the
    arguments. The gradient is ``"straight_through"``, at the noisy weights, or ``"reparametrized"``, with respect to the clean
    weights: it is multiplied by the Jacobian of the noise before any other hook runs.

    Raises:
        TypeError: If a parameter is complex and the noise takes real numbers alone.
        ValueError: If no parameter is selected, or the parameters are sharded in a way that the options do not support.

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
        reshard(module)
        self.module = module
        self.names = {parameter: name for name, parameter in find_parameters(module, params).items()}
        self.noise = noise
        self.level = level
        self.relative: RelativeTo | None = relative
        self.is_absolute: bool = relative is None and noise.additive
        # the Jacobian of absolute noise is the identity
        self.reparametrized = gradient == "reparametrized" and not self.is_absolute
        self.clean: dict[nn.Parameter, Tensor] = {}
        self._data: dict[nn.Parameter, Tensor] = {}  # what each noisy parameter holds, in the storage of the clean parameter
        self._computed = [(part, hook) for part in module.modules() for hook in hooks_of_weights(part)]
        self._versions: dict[nn.Parameter, int] = {}
        self._updates: Counter[nn.Parameter] = Counter()
        self._paused: dict[nn.Parameter, tuple[Any, int]] = {}
        self._handles: list[Any] = []
        sharded = any(is_sharded(parameter) for parameter in self.names)
        self.key = key.everywhere if sharded else key  # ranks that share a tensor must see the same noise
        if sharded and self.reparametrized:
            raise ValueError(
                "gradient='reparametrized' needs whole parameters, but these are sharded over ranks; "
                "type gradient='straight_through'"
            )
        for parameter, name in self.names.items():
            if relative == "filter":
                check_rows_are_whole(parameter, name)
            if parameter.is_complex() and noise.is_known and not noise.takes_complex:
                raise TypeError(
                    f"{noise.title} needs real numbers, but the parameter {name!r} is {describe(parameter)}; "
                    "type params=… to perturb other parameters"
                )

    def enter(self) -> None:
        """Perturbs all parameters."""
        self.perturb(self.names)
        owners = [part for part in self.module.modules() if any(p in self.names for p in part.parameters(recurse=False))]
        self._handles = [register_state_dict_hook(part, _CleanEntries(self)) for part in owners]
        for parameter in self.names if self.reparametrized else ():
            if parameter.requires_grad:
                # this noise was written last, so its Jacobian comes first in the backward pass
                self._handles.append(register_gradient_hook(parameter, partial(self._multiply_by_jacobian, parameter)))

    def exit(self) -> None:
        """Restores all parameters."""
        for handle in self._handles:
            handle.remove()
        self.restore(self.names)
        reshard(self.module)

    def check_untouched(self, parameters: Iterable[nn.Parameter], *, by_value: bool = False) -> None:
        """Raises a ValueError if the training step wrote to a noisy parameter.

        torch does not count writes to ``.data``. They are found by value, which draws the noise again.
        """
        by_value = by_value and self.noise.is_known  # a function may count its calls
        for parameter in parameters:
            if parameter not in self.clean or is_sharded(parameter):
                continue
            written = self._versions[parameter] != _version(parameter) or self._is_exchanged(parameter)
            if (written or by_value) and self._is_changed(parameter):
                raise ValueError(
                    f"the training step has written to {self.names[parameter]!r} while it held noise; write to weights in "
                    "on_train_batch_end, where they are clean, or type params=… to perturb other parameters"
                )

    @torch.no_grad()
    def perturb(self, parameters: Iterable[nn.Parameter]) -> None:
        """Perturbs the parameters that are clean."""
        found = [parameter for parameter in parameters if parameter in self.names and parameter not in self.clean]
        weights = [local(parameter) for parameter in found]
        copies = [torch.empty_like(w) for w in weights]
        copy_all_(copies, weights)
        self.clean.update(zip(found, copies, strict=True))
        self._data.update((parameter, parameter.data) for parameter in found)
        with _own_writes(found), ExitStack() as paused:
            for parameter in found:
                count, writes = self._paused.pop(parameter, (nullcontext(), -1))
                if count_writes(parameter) == writes:  # the bits that graphs of before the pause have saved
                    paused.enter_context(count)
            for group in _groups(found):
                copy_all_(map(local, group), [self._draw(parameter, self.clean[parameter]) for parameter in group])
        self._versions.update((parameter, _version(parameter)) for parameter in found)
        self._compute_weights()

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restores the parameters that are noisy."""
        found = [parameter for parameter in parameters if parameter in self.clean]
        clean = [self.clean.pop(parameter) for parameter in found]
        for parameter in found:
            if self._is_exchanged(parameter):
                parameter.data = self._data[parameter]
        with _own_writes(found):  # in place: optimizers, replicas and graphs keep the storage
            copy_all_([local(parameter) for parameter in found], clean)
        self._compute_weights()

    def pause(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restores the parameters until :meth:`perturb`.

        If nothing else writes to a parameter in between, autograd does not see the writes. A graph of before the pause can then
        run its backward pass after the pause, as in a closure that does not repeat the forward pass.
        """
        found = [parameter for parameter in parameters if parameter in self.clean]
        counts = [preserve_version(parameter) for parameter in found]
        self.restore(found)
        self._paused.update(
            (parameter, (count, count_writes(parameter))) for parameter, count in zip(found, counts, strict=True)
        )

    def count_update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts an update: the next perturbation is a new draw."""
        for parameter in parameters:
            if parameter not in self.clean:
                self._updates[parameter] += 1
                self._paused.pop(parameter, None)

    def norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns the norms of noise and weights per parameter, on this rank."""
        norm = torch.linalg.vector_norm
        return {
            self.names[parameter]: (norm(_float(local(parameter).detach()) - w), norm(_float(w)))
            for parameter, w in self.clean.items()
        }

    def frozen_norms(self) -> dict[str, Tensor]:
        """Returns the norms of the other parameters that are not trained, on this rank."""
        others = {name: p for name, p in self.module.named_parameters() if p not in self.names and not is_lazy(p)}
        frozen = {name: local(p) for name, p in others.items() if not p.requires_grad and p.is_floating_point()}
        return {name: torch.linalg.vector_norm(_float(p)) for name, p in frozen.items()}

    def _draw(self, parameter: nn.Parameter, w: Tensor) -> Tensor:
        key = parameter_key(self.key / "parameter", self.names[parameter], parameter)
        if updates := self._updates[parameter]:
            key = key / updates
        if is_sharded(parameter) and self.relative in ("std", "max"):  # the unit is that of the whole tensor
            return weight_noise(w, self.noise, self.level * unit_of(whole(parameter).float(), self.relative), key)
        return weight_noise(w, self.noise, self.level, key, self.relative)

    def _compute_weights(self) -> None:
        with torch.enable_grad():
            for module, hook in self._computed:
                hook(module, ())

    def _is_exchanged(self, parameter: nn.Parameter) -> bool:
        """Returns whether the parameter holds other data than the noise was written to."""
        return not is_sharded(parameter) and parameter.data_ptr() != self._data[parameter].data_ptr()

    def _is_changed(self, parameter: nn.Parameter) -> bool:
        noisy = self._draw(parameter, self.clean[parameter])
        largest = float(torch.linalg.vector_norm(noisy, math.inf))
        # not in place, because a noise may return the clean copy itself
        difference = float(torch.linalg.vector_norm(noisy - parameter.detach(), math.inf))
        # sharpness-aware minimization adds to the weights and subtracts again, which costs a few roundings
        return math.isfinite(largest) and not difference <= 8 * torch.finfo(noisy.dtype).eps * largest

    def _multiply_by_jacobian(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        if parameter not in self.clean:
            return None
        check_dense(self.names[parameter], gradient)
        twice = torch.is_grad_enabled()  # the backward pass builds a graph, for a gradient of the gradient
        with torch.enable_grad():
            w = self.clean[parameter].detach().requires_grad_()
            noisy = self._draw(parameter, w)
            if not noisy.requires_grad:
                raise ValueError(
                    "gradient='reparametrized' needs a differentiable noise, but the noise detaches x; "
                    "type gradient='straight_through'"
                )
            (gradient,) = torch.autograd.grad(noisy, w, gradient, create_graph=twice)
            # w is a copy, so a second derivative would miss how the Jacobian depends on the weights
            if twice and gradient.requires_grad and _depends_on(gradient, w):
                raise ValueError(
                    "gradient='reparametrized' has no second derivatives of noise that is relative to the weights; "
                    "type gradient='straight_through', or use a noise such as Speckle()"
                )
        return gradient


class _CleanEntries:
    """A hook that puts the clean parameters of a module into its state dict."""

    def __init__(self, noisy: PerturbedParameters | None = None):
        self.noisy = noisy

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            entry, clean = state_dict.get(prefix + name), self.noisy.clean.get(parameter) if self.noisy else None
            # an entry with other storage was already replaced for a noise that was entered earlier
            if entry is not None and clean is not None and local(entry).data_ptr() == local(parameter).data_ptr():
                state_dict[prefix + name] = with_local(parameter, clean)

    def __reduce__(self) -> tuple[type[_CleanEntries], tuple[()]]:  # in a copied or loaded module, the hook does nothing
        return _CleanEntries, ()


def find_parameters(module: nn.Module, params: str | Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Returns the selected parameters, a shared parameter by its first name.

    Args:
        module: The module.
        params: A name pattern or a list of patterns; ``*`` matches any characters. Default: all trained parameters with at
            least two dimensions.

    Raises:
        ValueError: If a pattern matches no parameter, with a list of the parameters, or a parameter has no shape yet.

    Example:
        >>> list(find_parameters(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        ['0.weight']
        >>> list(find_parameters(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "*.bias"))
        ['0.bias', '1.bias']
    """
    named = {plain_name(name): p for name, p in module.named_parameters() if p.is_floating_point() or p.is_complex()}
    trained = {name: p for name, p in named.items() if p.requires_grad and (p.ndim >= 2 or is_lazy(p))}
    found = trained if params is None else match(named, params, "parameter")
    if not found:
        names = ", ".join(map(repr, named))
        raise ValueError(f"no trained parameter has two dimensions; type params=…; parameters are: {names}")
    for name, parameter in found.items():
        if is_lazy(parameter):
            raise ValueError(f"{name!r} has no shape before the first forward pass; type module(inputs) before trainer.fit(…)")
    return found


@contextmanager
def _own_writes(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keeps the writes of a noise out of the count of :func:`_version`."""
    before = [count_writes(parameter) for parameter in parameters]
    yield
    for parameter, count in zip(parameters, before, strict=True):
        _WRITES[parameter] = _WRITES.get(parameter, 0) + count_writes(parameter) - count


def _version(parameter: nn.Parameter) -> int:
    """Returns how often anything but a noise has written to the parameter."""
    return count_writes(parameter) - _WRITES.get(parameter, 0)


def _groups(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yields parameters in groups, of which none but a single large tensor takes more than 4 MiB in float32."""
    group, elements = [], 0
    for parameter in parameters:
        if group and elements + parameter.numel() > 2**20:
            yield group
            group, elements = [], 0
        group.append(parameter)
        elements += parameter.numel()
    if group:
        yield group


def check_embeddings_are_dense(module: nn.Module) -> None:
    """Raises a TypeError if an embedding that is trained will have sparse gradients."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and part.weight.requires_grad:
            raise TypeError(
                f"noise needs dense gradients, but the gradient of {name + '.weight'!r} is sparse; "
                f"type nn.{type(part).__name__}(…, sparse=False)"
            )


def check_dense(name: str, gradient: Tensor) -> None:
    """Raises a TypeError if the gradient of a parameter is sparse."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"noise needs dense gradients, but the gradient of {name!r} is {gradient.layout}; "
            "type nn.Embedding(…, sparse=False)"
        )


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _depends_on(y: Tensor, x: Tensor) -> bool:
    return torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0] is not None


def _filter_norm(w: Tensor) -> Tensor:
    return column(torch.linalg.vector_norm(w.flatten(1), dim=1), w) if w.ndim > 1 else w.abs()
