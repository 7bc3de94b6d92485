"""Noise in parameters, written in place and undone from a copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import compress
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_noise._tensor import at_least_float32, over_norm
from lightning_noise.batch import describe
from lightning_noise.loop.internals import (
    copy_all_,
    hooks_of_weights,
    norms_of,
    parameters_of_layer,
    plain_name,
    preserve_version,
    register_gradient_hook,
    register_state_dict_hook,
    structure_of,
    subtract_all,
    writes_of,
)
from lightning_noise.noise import Noise
from lightning_noise.patterns import match
from lightning_noise.perturb.groups import Group, are_same, groups_of
from lightning_noise.perturb.sharding import check_rows_are_whole, gathering, is_sharded, local, reshard, whole, with_local
from lightning_noise.rng import Key

__all__ = [
    "GradientOf",
    "PerturbedParameters",
    "RelativeTo",
    "Selection",
    "check_dense",
    "check_embeddings_are_dense",
    "find_parameters",
    "unit_of",
    "weight_noise",
]

_ENTERED: WeakSet[PerturbedParameters] = WeakSet()  # the noises that parameters hold now
_NO_SECOND_DERIVATIVES = (
    "gradient='reparametrized' has no second derivatives of noise that is relative to the weights; "
    "type gradient='straight_through', or use a noise such as Speckle()"
)
T = TypeVar("T")
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
    x = at_least_float32(w if w.ndim else w[None])
    if relative == "filter":
        direction = key.apply(noise, torch.zeros_like(x), 1.0)
        y = x + level * direction * scale_of(x[None], direction[None], relative)[0]
    elif relative is not None:
        y = key.apply(noise, x, (level * unit_of(x[None], relative)).flatten().expand(len(x)))
    else:
        y = key.apply(noise, x, level)
    return y.view_as(w).to(w.dtype)


def unit_of(stack: Tensor, relative: RelativeTo) -> Tensor:
    """Returns the standard deviation, the largest absolute value or the norms of the rows of each tensor of a stack.

    The stack has shape (N, *), and the result broadcasts against the stack.
    """
    axes = tuple(range(1, stack.ndim))
    if relative == "std":
        return stack.std(axes, correction=0, keepdim=True)
    if relative == "max":
        return torch.linalg.vector_norm(stack, math.inf, axes, keepdim=True)
    return torch.linalg.vector_norm(stack, 2, axes[1:], keepdim=True) if axes[1:] else stack.abs()


def scale_of(stack: Tensor, direction: Tensor, relative: RelativeTo) -> Tensor:
    """Returns the factor that gives noise of level 1 the unit of the level."""
    unit = unit_of(stack, relative)
    if relative == "filter":
        unit = over_norm(unit, unit_of(direction, relative))
    return unit


class PerturbedParameters:
    """Parameters that hold noise between :meth:`enter` and :meth:`exit`.

    In between, some parameters can be restored for an update, and perturbed by a new draw after the update. The
    ``state_dict()`` of the module and of its parts always returns clean parameters. The weights that pruning computes from
    parameters follow the parameters.

    :func:`find_parameters` and :func:`weight_noise` explain the arguments. The gradient is ``"straight_through"``, at the noisy
    weights, or ``"reparametrized"``, with respect to the clean weights: it is multiplied by the Jacobian of the noise before
    any other hook runs. ``last`` is the selection of an earlier step, which is used again until the parameters change.

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
        last: Selection | None = None,
    ):
        self.module = module
        self.selection = select(module, params, noise, last)
        self.parameters = self.selection.parameters
        self.noise = noise
        self.level = level
        self.relative: RelativeTo | None = relative
        self.is_absolute: bool = relative is None and noise.additive
        # the Jacobian of absolute noise is the identity
        self.reparametrized = gradient == "reparametrized" and not self.is_absolute
        # ranks that share a tensor must see the same noise
        self.key = key.everywhere if self.selection.is_sharded else key
        self.clean: dict[str, Tensor] = {}
        self._copies: dict[Group, Tensor] = {}  # the clean weights of each group
        # the storage that the noise was written to, and how often anything but a noise had written to it
        self._data: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        # the derivatives of noisy weights, from the first gradient of a group to the gradient of each parameter
        self._slopes: dict[str, tuple[Tensor, ...]] = {}
        self._is_curved = relative is not None  # whether the Jacobian depends on the weights
        self._computed = hooks_of_weights(self.selection.parts)
        self._order = 0  # among the noises that parameters hold
        self._updates: dict[str, int] = {}
        self._paused: dict[str, tuple[Any, int]] = {}
        self._handles: list[Any] = []
        if self.selection is not last:
            self._check()

    def _check(self) -> None:
        """Raises an error if a parameter cannot be perturbed in this way."""
        if self.selection.is_sharded and self.reparametrized:
            raise ValueError(
                "gradient='reparametrized' needs whole parameters, but these are sharded over ranks; "
                "type gradient='straight_through'"
            )
        for name, parameter in self.parameters.items():
            if self.relative == "filter":
                check_rows_are_whole(parameter, name)
            if parameter.is_complex() and self.noise.is_known and not self.noise.takes_complex:
                raise TypeError(
                    f"{self.noise.title} needs real numbers, but the parameter {name!r} is {describe(parameter)}; "
                    "type params=… to perturb other parameters"
                )

    def enter(self) -> None:
        """Perturbs all parameters."""
        self._order = 1 + max((other._order for other in _ENTERED), default=0)
        _ENTERED.add(self)
        self._perturb(self.parameters)
        self._handles = [register_state_dict_hook(self.selection.owners, _CleanEntries(self))]
        for group in self.selection.groups if self.reparametrized else ():
            for name in group.names:
                if (parameter := self.parameters[name]).requires_grad:
                    # this noise was written last, so its Jacobian comes first in the backward pass
                    hook = partial(self._multiply_by_jacobian, group, name)
                    self._handles.append(register_gradient_hook(parameter, hook))

    def exit(self) -> None:
        """Restores all parameters. After an interrupt in the middle of this method, it can be called again."""
        if self not in _ENTERED:
            return
        for later in [other for other in _ENTERED if other._order > self._order]:  # an interrupt kept them from ending
            for name in later._names_of(self.parameters.values()):
                later.clean.pop(name, None)
        self._restore(self.parameters)
        for handle in self._handles:
            handle.remove()
        self._copies = {}
        _ENTERED.discard(self)
        reshard(self.selection.gathering)

    def check_untouched(self, parameters: Iterable[nn.Parameter] | None = None, *, by_value: bool = False) -> None:
        """Raises a ValueError if the training step wrote to a noisy parameter. Default: to any.

        torch does not count writes to ``.data``. They are found by value, which draws the noise again.
        """
        by_value = by_value and self.noise.is_known  # a function may count its calls
        names = self._data if parameters is None else [name for name in self._names_of(parameters) if name in self._data]
        held = [self.parameters[name] for name in names]
        doubtful = {
            name
            for name, parameter, writes in zip(names, held, writes_of(held), strict=True)
            if by_value or writes != self._versions[name] or parameter.data_ptr() != self._data[name].data_ptr()
        }
        changed = set(self._find_changed(doubtful)) if doubtful else ()
        for name in (name for name in self.parameters if name in changed):
            raise ValueError(
                f"the training step has written to {name!r} while it held noise; write to weights in "
                "on_train_batch_end, where they are clean, or type params=… to perturb other parameters"
            )

    def perturb(self, parameters: Iterable[nn.Parameter]) -> None:
        """Perturbs the parameters that are clean."""
        self._perturb(self._names_of(parameters))

    def pause(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restores the parameters until :meth:`perturb`.

        If nothing else writes to a parameter in between, autograd does not see the writes. A graph of before the pause can then
        run its backward pass after the pause, as in a closure that does not repeat the forward pass.
        """
        names = [name for name in self._names_of(parameters) if name in self.clean]
        held = [self.parameters[name] for name in names]
        counts = [preserve_version(parameter) for parameter in held]
        self._restore(names)
        self._paused.update(zip(names, zip(counts, writes_of(held), strict=True), strict=True))

    def count_update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Counts an update: the next perturbation is a new draw."""
        for name in self._names_of(parameters):
            if name not in self.clean:
                self._updates[name] = self._updates.get(name, 0) + 1
                self._paused.pop(name, None)

    @torch.no_grad()
    def norms(self) -> tuple[list[str], Tensor, Tensor]:
        """Returns the names of the noisy parameters, and the norms of noise and weights, on this rank."""
        names, noise, weights = [], [], []
        for _, members in self._grouped(self.clean):
            noisy = [at_least_float32(local(self.parameters[name])) for name in members]
            clean = [at_least_float32(self.clean[name]) for name in members]
            names += members
            noise += norms_of(subtract_all(noisy, clean))
            weights += norms_of(clean)
        return names, torch.stack(noise), torch.stack(weights)

    def frozen_norms(self) -> dict[str, Tensor]:
        """Returns the norms of the other parameters that are not trained, on this rank."""
        others = {name: p for name, p in self.module.named_parameters() if p not in self.selection.names and not is_lazy(p)}
        frozen = {name: local(p) for name, p in others.items() if not p.requires_grad and p.is_floating_point()}
        return {name: torch.linalg.vector_norm(at_least_float32(p)) for name, p in frozen.items()}

    def clean_value(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns the part of a noisy parameter on this rank without noise, or ``None`` if the parameter is clean."""
        return self.clean.get(self.selection.names.get(parameter, ""))

    def _names_of(self, parameters: Iterable[nn.Parameter]) -> list[str]:
        """Returns the names of those parameters that this noise perturbs."""
        names = self.selection.names
        return [names[parameter] for parameter in parameters if parameter in names]

    def _grouped(self, names: Collection[str]) -> Iterator[tuple[Group, list[str]]]:
        """Yields the groups, each with those of the names that it has."""
        for group in self.selection.groups if names else ():
            if members := [name for name in group.names if name in names]:
                yield group, members

    @torch.no_grad()
    def _perturb(self, names: Iterable[str]) -> None:
        for group, members in self._grouped({name for name in names if name not in self.clean}):
            parameters = [self.parameters[name] for name in members]
            parts = parameters if group.is_flat else [local(parameter) for parameter in parameters]
            if group not in self._copies:
                self._copies[group] = group.empty(parts[0])
            clean = group.split(self._copies[group], members)
            copy_all_(clean, parts)
            self.clean.update(zip(members, clean, strict=True))
            if parts[0] is parameters[0]:
                self._data.update(zip(members, [parameter.data for parameter in parameters], strict=True))
            self._write(members, self._draw(group, members, self._noisy))
            self._versions.update(zip(members, writes_of(parameters), strict=True))
        self._compute_weights()

    @torch.no_grad()
    def _restore(self, names: Iterable[str]) -> None:
        found = [name for name in names if name in self.clean]
        for name in found:
            data, parameter = self._data.get(name), self.parameters[name]
            if data is not None and data.data_ptr() != parameter.data_ptr():
                parameter.data = data
        self._write(found, [self.clean[name] for name in found])
        for name in found:  # only now, because an interrupt before the write must not lose the clean weights
            self._data.pop(name, None)
            self._slopes.pop(name, None)
            del self.clean[name]
        self._compute_weights()

    def _draw(self, group: Group, names: Sequence[str], draw: Callable[[Group, Key], list[T]]) -> list[T]:
        """Returns what draws of the whole group give to some of its parameters. Each update has its own draw."""
        key, updates = group.key(self.key / "parameter"), [self._updates.get(name, 0) for name in names]
        drawn = {n: draw(group, key / n if n else key) for n in set(updates)}
        return [drawn[n][group.index[name]] for n, name in zip(updates, names, strict=True)]

    def _noisy(self, group: Group, key: Key) -> list[Tensor]:
        """Returns the noisy weights of a group, from the copy of the clean weights."""
        clean = self._copies[group]
        if not group.is_flat:
            return [self._noisy_alone(group, clean, key)]
        if self.relative is None:
            return group.split(key.apply(self.noise, at_least_float32(clean), self.level).to(clean.dtype))
        if len(group.names) == 1 and self.relative != "filter":  # a level for all elements saves a tensor of zeros
            (w,) = group.stacks(at_least_float32(clean))
            level = (self.level * unit_of(w, self.relative)).flatten().expand(len(clean))
            return group.split(key.apply(self.noise, at_least_float32(clean), level).to(clean.dtype))
        noisy = self._direction(group, key)
        for w, direction in zip(group.stacks(at_least_float32(clean)), group.stacks(noisy), strict=True):
            torch.addcmul(w, direction, self.level * scale_of(w, direction, self.relative), out=direction)
        return group.split(noisy.to(clean.dtype))

    def _noisy_alone(self, group: Group, w: Tensor, key: Key) -> Tensor:
        """Returns the noisy weights of a group of one parameter, as a function of the weights."""
        parameter = self.parameters[group.names[0]]
        if is_sharded(parameter) and self.relative in ("std", "max"):  # the unit is that of the whole tensor
            return weight_noise(w, self.noise, self.level * unit_of(whole(parameter).float()[None], self.relative).view(1), key)
        return weight_noise(w, self.noise, self.level, key, self.relative)

    def _direction(self, group: Group, key: Key) -> Tensor:
        """Returns the noise of level 1 for a group, without a unit."""
        return key.apply(self.noise, torch.zeros_like(at_least_float32(self._copies[group])), 1.0)

    def _compute_weights(self) -> None:
        for module, hook in self._computed:
            with torch.enable_grad():
                hook(module, ())

    def _write(self, names: Sequence[str], values: Iterable[Tensor]) -> None:
        """Writes in place: optimizers, replicas and graphs keep the storage. Other noises do not count the write."""
        parameters = [self.parameters[name] for name in names]
        others = [other for other in _ENTERED if other is not self] if len(_ENTERED) > 1 else []
        before = writes_of(parameters) if others else []
        with ExitStack() as paused:
            for name, parameter in zip(names, parameters, strict=True) if self._paused else ():
                count, writes = self._paused.pop(name, (nullcontext(), -1))
                if writes_of([parameter]) == [writes]:  # the bits that graphs of before the pause have saved
                    paused.enter_context(count)
            copy_all_(map(local, parameters) if self.selection.is_sharded else parameters, values)
        for other in others:
            for parameter, count, now in zip(parameters, before, writes_of(parameters), strict=True):
                if (name := other.selection.names.get(parameter)) in other._versions:
                    other._versions[name] += now - count

    @torch.no_grad()
    def _find_changed(self, names: Collection[str]) -> Iterator[str]:
        """Yields the parameters that do not hold their noisy values. Waits for the device once for each group."""
        for group, members in self._grouped(names):
            noisy = self._draw(group, members, self._noisy)
            # not in place, because a noise may return the clean copy itself
            differences = subtract_all(noisy, [self.parameters[name] for name in members])
            norms = norms_of([*noisy, *differences], math.inf)
            largest, difference = torch.stack(norms).double().view(2, -1).cpu()
            # sharpness-aware minimization adds to the weights and subtracts again, which costs a few roundings
            changed = largest.isfinite() & ~(difference <= 8 * torch.finfo(noisy[0].dtype).eps * largest)
            yield from compress(members, changed.tolist())

    def _multiply_by_jacobian(self, group: Group, name: str, gradient: Tensor) -> Tensor | None:
        if name not in self.clean:
            return None
        check_dense(name, gradient)
        twice = torch.is_grad_enabled()  # the backward pass builds a graph, for a gradient of the gradient
        if not group.is_flat:
            return self._multiply_alone(group, gradient, twice)
        if name not in self._slopes:
            members = [member for member in group.names if member in self.clean]
            self._slopes.update(zip(members, self._draw(group, members, self._differentiate), strict=True))
        slope, *direction = self._slopes.pop(name)
        if twice and self._is_curved:
            raise ValueError(_NO_SECOND_DERIVATIVES)
        if not direction:
            return (gradient * slope).to(gradient.dtype)
        along = at_least_float32(gradient) * direction[0]
        if self.relative != "filter":
            along = along.sum()
        elif along.ndim > 1:
            along = along.sum(tuple(range(1, along.ndim)), keepdim=True)
        return torch.addcmul(at_least_float32(gradient), slope, along).to(gradient.dtype)

    def _differentiate(self, group: Group, key: Key) -> list[tuple[Tensor, ...]]:
        """Returns the derivative of each noisy weight; for relative noise that of its scale, and the noise of level 1."""
        clean = at_least_float32(self._copies[group]).detach()
        with torch.enable_grad():
            if self.relative is None:
                noisy = _check_differentiable(key.apply(self.noise, clean.requires_grad_(), self.level))
                (slope,) = torch.autograd.grad(noisy, clean, torch.ones_like(noisy), create_graph=True)
                self._is_curved |= slope.requires_grad and _depends_on(slope, clean)
                return [(part,) for part in group.split(slope.detach())]
            direction = self._direction(group, key)
            stacks = [stack.requires_grad_() for stack in group.stacks(clean)]
            pairs = zip(stacks, group.stacks(direction), strict=True)
            scales = [self.level * scale_of(w, z, self.relative) for w, z in pairs]
            slopes = torch.autograd.grad(scales, stacks, [torch.ones_like(scale) for scale in scales])
        directions = group.split(direction)
        parts = [part for slope in slopes for part in slope.unbind()]
        return [(slope.view_as(z), z) for slope, z in zip(parts, directions, strict=True)]

    def _multiply_alone(self, group: Group, gradient: Tensor, twice: bool) -> Tensor:
        with torch.enable_grad():
            w = self._copies[group].detach().requires_grad_()
            (noisy,) = self._draw(group, group.names, lambda group, key: [self._noisy_alone(group, w, key)])
            (gradient,) = torch.autograd.grad(_check_differentiable(noisy), w, gradient, create_graph=twice)
            # w is a copy, so a second derivative would miss how the Jacobian depends on the weights
            if twice and gradient.requires_grad and _depends_on(gradient, w):
                raise ValueError(_NO_SECOND_DERIVATIVES)
        return gradient


class Selection:
    """The parameters of a module that get noise, by name and in groups."""

    def __init__(self, module: nn.Module, params: str | Sequence[str] | None, noise: Noise):
        self.parts = list(module.modules())
        self.gathering = gathering(self.parts)
        reshard(self.gathering)
        self.state, self.structure = _state_of(module, params, noise)  # what the selection depends on
        self.parameters = find_parameters(module, params)
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.groups = list(groups_of(self.parameters, noise))
        self.is_sharded = any(map(is_sharded, self.names))
        self.owners = [part for part in self.parts if not self.names.keys().isdisjoint(parameters_of_layer(part).values())]


def select(module: nn.Module, params: str | Sequence[str] | None, noise: Noise, last: Selection | None = None) -> Selection:
    """Returns the last selection, or a new one if anything that it depends on has changed."""
    if last is not None:
        reshard(last.gathering)
        state, structure = _state_of(module, params, noise)
        if state == last.state and are_same(structure, last.structure):
            return last
    return Selection(module, params, noise)


def _state_of(module: nn.Module, params: str | Sequence[str] | None, noise: Noise) -> tuple[list[Any], list[Any]]:
    structure, parameters = structure_of(module)
    has_shape = [p.layout == torch.strided and (type(p) is nn.Parameter or not is_lazy(p)) for p in parameters]
    kinds = [
        (p.requires_grad, p.dtype, p.device, shaped and (p.shape, p.stride()))
        for p, shaped in zip(parameters, has_shape, strict=True)
    ]
    return [params, noise.elementwise, noise.independent_rows, *kinds], structure


class _CleanEntries:
    """A hook that puts the clean parameters of a module into its state dict."""

    def __init__(self, noisy: PerturbedParameters | None = None):
        self.noisy = noisy

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            entry, clean = state_dict.get(prefix + name), self.noisy.clean_value(parameter) if self.noisy else None
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
    for name in (name for name, parameter in found.items() if is_lazy(parameter)):
        raise ValueError(f"{name!r} has no shape before the first forward pass; type module(inputs) before trainer.fit(…)")
    return found


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


def _check_differentiable(noisy: Tensor) -> Tensor:
    if not noisy.requires_grad:
        raise ValueError(
            "gradient='reparametrized' needs a differentiable noise, but the noise detaches x; type gradient='straight_through'"
        )
    return noisy


def _depends_on(y: Tensor, x: Tensor) -> bool:
    return torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0] is not None
