"""Noise in the inputs of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_noise._checks import check_name, check_numbers, plain
from lightning_noise._tensor import detached
from lightning_noise.batch import Path, Selector, find_inputs, format_path, get
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.callbacks.base import NoiseCallback
from lightning_noise.loop.internals import saved_targets, share_memory
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.masks import Mask, check_documents, find_documents
from lightning_noise.noise import Noise, NoiseFunction, as_noise
from lightning_noise.perturb.doubts import find_doubts
from lightning_noise.perturb.inputs import Clip, check_leaf, check_relative, perturb_batch, snr_db, validate_clip
from lightning_noise.perturb.normalization import Numbers, normalization_of
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["AnyProbe", "InputNoise", "as_probe", "as_probes", "name_noises"]

AnyProbe = Noise | NoiseCallback | NoiseFunction


class InputNoise(NoiseCallback):
    r"""Adds noise to the inputs of each training batch.

    The module receives a batch of the same type with the input :math:`y = \text{noise}(x, \text{level})`. At level 0 it
    receives the original batch object. An input may also be a list of samples, such as images of different sizes. Each of them
    has a draw of its own. The noise acts from the start of the training step to the end of the backward pass, and
    never in validation, test and prediction. Other callbacks see the clean batch, and the tensors of the data set do not
    change. The draws differ between ranks. A ``training_step(dataloader_iter)`` receives noisy batches from its iterator.

    If the input is also the target, as in an autoencoder whose batch is one tensor, the target is noisy, too. To keep the
    target clean, let the data set return the tensor twice. A warning says so if the target of a loss of torch is noisy.

    Let a schedule rise and then hold, as in ``schedules.Linear(0.0, 0.5, until=0.5)``, so that the model learns the task first.
    The mean level matters more than the shape, and an :class:`~lightning_noise.AdaptiveLevel` finds the level.

    The log keys are ``train_noise/<name>/level`` and ``train_noise/<name>/snr_db``, the signal-to-noise ratio of the batch.

    Args:
        noise: The noise, such as :class:`~lightning_noise.noise.Gaussian`.
        level: The amount of noise: a number, a schedule, a callable or an :class:`~lightning_noise.AdaptiveLevel`. Only a
            callback that monitors use needs no level.
        inputs: Which leaves of the batch are inputs: an index, a key, a dotted path such as ``"0.image"``, where ``*`` is every
            element, or a list of these. Default: a bare tensor, the first element of a sequence, or else the only
            floating-point leaf that is named neither as a mask nor as a target. All inputs share the level and the choice of
            samples, but each input has its own draw.
        probability: The probability that a sample gets noise. In held-out data, every sample gets noise.
        per_sample: Whether to draw a level for each sample, uniformly from [0, level].
        relative: ``"std"`` gives the level in units of the standard deviation of each sample. The noise must be additive.
        clip: The bounds ``(low, high)`` of the noisy input. A bound is a number, a list with a number for each channel
            (axis 1 or the last axis), or ``None``.
        mask: Which positions of the input are valid: a leaf of the batch, or a function of the batch, with values above 0 at
            valid positions. It has the shape of the input, of its first axes, as (B, T) of (B, T, C), or of the first axis and
            the last ones, as (B, T) of (B, C, T). A list of samples has a list of masks. Padding stays as it is and counts
            neither for the noise nor for ``relative``. NaN is never valid.
        documents: The documents of packed rows of shape :math:`(B, T, *)`: a leaf of the batch, or a function of the batch,
            with the length of each document of each row, or the position ids. Noises along an axis then take each document as
            a series of its own.
        mean: The mean of the normalization of the data: a number, or a list with a number for each channel, which is axis 1 or
            the last axis. Level and clip are then in the units of the data before the normalization. Default: 0 if ``std`` is
            set.
        std: The standard deviation of the normalization. Default: 1 if ``mean`` is set.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages, unique in the trainer.

    Raises:
        TypeError: If the input is not a dense floating-point tensor. Only :class:`~lightning_noise.noise.SwapNoise` takes
            integers, too, and additive noises take complex numbers.
        ValueError: If an argument is out of range, a path selects nothing, or a list may hold samples or several inputs. The
            message then lists the leaves of the batch.

    Before the first step, a warning says if the input contradicts the arguments. The noise may be more than 45 decibels below
    the data, make counts negative, or spread infinite values. Its axis may look like the channels, and its bounds may cut off
    data. The rows of the input may be the time and not the samples. The input may be the same everywhere, have a channel of
    zeros and ones, or hold a number such as -999 for missing values. A mask or lengths in the batch may mark padding that
    ``mask`` does not name.

    Example:
        >>> from lightning_noise import noise, schedules
        >>> callback = InputNoise(noise.Gaussian(), level=schedules.Linear(0.0, 0.5, until=0.6))
        >>> callback.name
        'input'
    """

    def __init__(
        self,
        noise: Noise | NoiseFunction,
        level: AnyLevel | None = None,
        *,
        inputs: Selector | None = None,
        probability: float = 1.0,
        per_sample: bool = False,
        relative: Literal["std"] | None = None,
        clip: Clip | None = None,
        mask: Mask | None = None,
        documents: Mask | None = None,
        mean: Numbers | None = None,
        std: Numbers | None = None,
        seed: int | None = None,
        name: str = "input",
    ):
        self.noise = as_noise(noise)
        super().__init__(level, noise=self.noise, relative=relative, seed=seed, name=name)
        check_numbers(probability=probability)
        if not 0 <= probability <= 1:
            percent = f"; for {probability:g} % type probability={probability / 100:g}" if probability > 1 else ""
            raise ValueError(f"probability must be in [0, 1], got {probability}{percent}")
        check_relative(self.noise, relative)
        self.inputs = plain(inputs)
        self.probability = probability
        self.per_sample = per_sample
        self.relative: Literal["std"] | None = relative
        self.clip = validate_clip(clip)
        self.mask = mask
        self.documents = documents
        self.mean = plain(mean)
        self.std = plain(std)
        self._normalization = normalization_of(mean, std)
        self._has_looked = False  # at the values of a batch
        self._noisy: list[Tensor] | None = None  # the inputs of a noisy batch, until its loss has been seen
        self._probed: dict[str, Any] = {"largest": None}

    def expect(self, largest: float, **facts: bool) -> None:
        """Prepares a probe for its first batch: the largest level, and facts about the levels that its warnings need."""
        self._probed, self._has_looked = {"largest": largest, **facts}, False

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        largest = self.level if isinstance(self.level, float) else self._largest_level
        self._look(batch, find_inputs(batch, self.inputs), largest)

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        paths = find_inputs(batch, self.inputs, absent=True)
        if context.is_probe and not self._has_looked:
            self._look(batch, paths, **self._probed)
        noisy = perturb_batch(
            batch,
            paths,
            self.noise,
            level,
            key,
            probability=1.0 if context.is_probe else self.probability,  # clean samples would hide the effect
            per_sample=self.per_sample,
            positions=context.positions,
            **self._options,
        )
        if context.is_logged:
            perturbation.stats["snr_db"] = snr_db(batch, noisy, paths, self.mask)
        if not context.is_probe and self._noisy is not None:
            self._noisy = [leaf for path in paths if isinstance(leaf := get(noisy, path), Tensor)]
        yield noisy

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._noisy = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self._noisy:
            return
        noisy, self._noisy = self._noisy, None
        if any(share_memory(detached(target), detached(leaf)) for target in saved_targets(loss) for leaf in noisy):
            rank_zero_warn(
                f"{self.name!r}: the input is also the target of the loss, so the target is noisy, too; for a clean target, "
                "let the data set return the tensor twice, compare with the second, and type inputs=0"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._noisy = None

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "relative": self.relative,
            "clip": self.clip,
            "mask": self.mask,
            "documents": self.documents,
            "normalization": self._normalization,
        }

    def _look(self, batch: Any, paths: list[Path], largest: float | None, **facts: bool) -> None:
        """Raises the error that the noise would raise above level 0, and warns if values contradict the arguments."""
        self._has_looked = True
        for path in paths:
            leaf = get(batch, path)
            check_leaf(leaf, path, self.noise)
            if self.documents is not None:
                _check_documents(batch, leaf, path, self.documents)
        noisy = None
        if self.noise.is_known:  # a function may have side effects
            noisy = perturb_batch(batch, paths, self.noise, largest or 0.01, Key(("trial",)), **self._options)
        has_default = self.inputs is None
        doubts = find_doubts(batch, noisy, paths, self.noise, largest, has_default=has_default, **facts, **self._options)
        for doubt in doubts:
            rank_zero_warn(f"{self.name!r}: {doubt}")


def _check_documents(batch: Any, leaf: Any, path: Path, documents: Mask) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"documents=… needs packed rows, but the input {format_path(path)!r} is a list of samples; remove it")
    found = find_documents(batch, documents)
    if found is not None:
        check_documents(found, leaf)


def name_noises(
    noises: AnyProbe | Sequence[AnyProbe] | Mapping[str, AnyProbe], user: str = "RobustnessMonitor"
) -> dict[str, AnyProbe]:
    """Returns noises by name; ``user`` is the function or class to type them in.

    The name of a noise is its class name in lower case. Callbacks and functions have names of their own.

    Example:
        >>> from lightning_noise import noise
        >>> name_noises([noise.Gaussian(), InputNoise(noise.Uniform(), 0.1, name="even")]).keys()
        dict_keys(['gaussian', 'even'])
    """
    if isinstance(noises, Mapping):
        return {check_name(name): noise for name, noise in noises.items()}
    is_list = isinstance(noises, Sequence) and not isinstance(noises, str)
    probes: list[AnyProbe] = list(noises) if is_list else [noises]  # type: ignore[arg-type,list-item]
    names = [_name(probe, f"{user}({{}}, [{{}}])") for probe in probes]
    if len(set(names)) < len(names):
        raise ValueError(f"noises must have different names, got {names}; give a mapping from name to noise")
    return dict(zip(names, probes, strict=True))


def as_probes(noises: Mapping[str, AnyProbe], **options: Any) -> dict[str, NoiseCallback]:
    """Returns a noise callback for each noise; see :func:`as_probe`."""
    return {name: as_probe(noise, name=name, **options) for name, noise in noises.items()}


def as_probe(
    noise: AnyProbe,
    *,
    inputs: Selector | None = None,
    relative: Literal["std"] | None = None,
    clip: Clip | None = None,
    mask: Mask | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    name: str | None = None,
) -> NoiseCallback:
    """Returns the noise callback with which a monitor evaluates a noise.

    A noise callback is returned as it is. A noise becomes an ``InputNoise`` with the options. The default of ``name`` is the
    name of the callback, or of the noise in lower case.

    Raises:
        ValueError: If held-out data cannot be evaluated under the noise, or an option is given for a noise callback.

    Example:
        >>> from lightning_noise import noise
        >>> as_probe(noise.Gaussian()).name
        'gaussian'
    """
    name = _name(noise) if name is None else name
    options = {"relative": relative, "clip": clip, "mask": mask, "mean": mean, "std": std}
    if isinstance(noise, NoiseCallback):
        probe = noise
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} do not apply to a noise callback; type them in {type(noise).__name__}(…, "
                f"{', '.join(f'{option}=…' for option in given)})"
            )
    else:
        probe = InputNoise(noise, inputs=inputs, name=name, **options)  # type: ignore[arg-type]
    if not probe.can_probe:
        raise ValueError(
            f"{name!r} cannot perturb held-out data: {type(noise).__name__} mixes samples, or changes labels or gradients; "
            "type a noise such as noise.Gaussian()"
        )
    if probe.mixes_samples:
        raise ValueError(
            f"{name!r} cannot perturb held-out data: it mixes samples, so a sample's noise depends on its batch; "
            "type noise.FeatureDropout(rescale=False) to evaluate a table"
        )
    return probe


def _name(probe: AnyProbe, user: str = "RobustnessMonitor({}, [{}])") -> str:
    if isinstance(probe, NoiseCallback):
        return probe.name
    name = as_noise(probe, user).title
    if not name.isidentifier():
        raise ValueError(f"a noise needs a name, got {name}; give a mapping from name to noise")
    return name.lower()
