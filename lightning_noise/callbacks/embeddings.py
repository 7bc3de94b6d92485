"""Noise in the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_noise._checks import plain
from lightning_noise.batch import describe, select_one
from lightning_noise.callbacks.activations import Call, OutputCallback, find_modules, name_modules
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.loop.internals import original_module
from lightning_noise.loop.perturbation import Context, Perturbation
from lightning_noise.masks import Mask, find_mask
from lightning_noise.noise import Uniform
from lightning_noise.perturb.doubts import OTHER_MASK, tokens_doubt, values_doubt
from lightning_noise.perturb.outputs import check_output
from lightning_noise.rng import Key

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["EmbeddingNoise", "split_documents"]


class EmbeddingNoise(OutputCallback):
    r"""Adds uniform noise to the embeddings of tokens in training (NEFTune).

    .. math:: e' = e + \frac{\alpha}{\sqrt{L d}} u, \quad u \sim \mathcal{U}(-1, 1)

    An ``nn.Embedding`` returns the embeddings :math:`e` of shape :math:`(B, L, d)`. The level is :math:`\alpha`, in the units
    of the embeddings; the paper uses 5 to 15. :math:`L` is the number of tokens of a row without padding, and padding gets no
    noise. So the noise of a row has the mean square norm :math:`\alpha^2 / 3` for any :math:`L`, :math:`d` and padding.
    ``mask`` marks the tokens. Without a mask, the ``padding_idx`` of the embedding marks the padding; without both, all
    positions are tokens. A row of padding gets no noise. In embeddings of shape :math:`(B, d)`, each row is a token. If a row
    packs several documents, ``documents`` tells their lengths, and :math:`L` is the length of the document of each token.

    The noise acts, and is logged, as in :class:`ActivationNoise`.

    Args:
        level: The amount :math:`\alpha`: a number, a schedule, a callable or an :class:`~lightning_noise.AdaptiveLevel`.
        modules: The name of the embedding, a pattern or a list of patterns. Default: the only ``nn.Embedding``.
        mask: Which leaf of the batch marks the tokens, or a function of the batch, of shape :math:`(B, L)`: 1 or true at
            tokens, 0 or false at padding, the opposite of ``key_padding_mask`` in PyTorch. If the embedding is also called on
            other tokens, remove the mask and give the embedding a ``padding_idx``.
        documents: Which leaf of the batch, or which function of the batch, tells how rows are packed: position ids of shape
            :math:`(B, L)`, which count from 0 in each document, or the lengths of the documents, of shape :math:`(B, n)` and
            filled up with zeros. Positions after the last document are padding.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages.

    Raises:
        TypeError: If a selected module returns no embeddings.
        ValueError: If ``modules`` is not set and the module has no single ``nn.Embedding``, if the mask or the
            documents do not fit, the embedding is called on other tokens, or as in :class:`ActivationNoise`.

    References:
        NEFTune: Noisy Embeddings Improve Instruction Finetuning (Jain et al., 2023), https://arxiv.org/abs/2310.05914

    Example:
        >>> callback = EmbeddingNoise(5.0, mask="attention_mask")
        >>> callback.name
        'embedding'
    """

    severities = (2.5, 5.0, 10.0, 15.0, 30.0)
    unit = "alpha"
    dimension = "alpha of NEFTune"

    def __init__(
        self,
        level: AnyLevel | None = None,
        *,
        modules: str | Sequence[str] | None = None,
        mask: Mask | None = None,
        documents: Mask | None = None,
        seed: int | None = None,
        name: str = "embedding",
    ):
        super().__init__(level, seed=seed, name=name)
        self.modules = plain(modules)
        self.mask = mask
        self.documents = documents
        self._are_documents_checked = self._is_mask_checked = self._has_looked = False

    def select_modules(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        if self.modules is not None:
            return find_modules(pl_module, self.modules)
        named = name_modules(pl_module)
        found = {name: module for name, module in named.items() if isinstance(original_module(module), nn.Embedding)}
        if len(found) != 1:
            names = ", ".join(map(repr, found)) or "none"
            raise ValueError(
                f"expected a single nn.Embedding, got: {names}; type modules=… to name the embedding of the tokens"
            )
        return found

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        find_mask(batch, self.mask)
        self._find_documents(batch)
        self._are_documents_checked = self._is_mask_checked = False
        self._look(pl_module, batch)

    def perturb(self, context: Context, batch: Any, level: float, key: Key, perturbation: Perturbation) -> Iterator[Any]:
        if not self._has_looked:
            self._look(context.module, batch)  # a probe
        yield from super().perturb(context, batch, level, key, perturbation)

    def _look(self, pl_module: LightningModule, batch: Any) -> None:
        """Warns if the batch marks padding that neither a mask nor an embedding knows."""
        self._has_looked = True
        if self.mask is not None or self.documents is not None:
            return
        found = map(original_module, self.select_modules(pl_module).values())
        knows_padding = any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in found)
        if not knows_padding and (doubt := tokens_doubt(batch)) is not None:
            rank_zero_warn(f"{self.name!r}: {doubt}")

    def perturb_call(self, call: Call) -> Any:
        x = call.output
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            raise TypeError(
                f"expected embeddings of shape (B, L, d) or (B, d), but {call.name!r} returned {describe(x)}; "
                "type modules=… to select an nn.Embedding"
            )
        check_output(x, call.key, call.name)
        tokens, lengths = self._tokens(call)
        size = (lengths * x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        u = call.key.apply(Uniform(), torch.zeros_like(x, dtype=size.dtype), 1.0)
        # padding gets an infinite level, but torch.where keeps nothing of its noise
        y = u.mul_((call.active.level * size.rsqrt()).unsqueeze(-1)) + x
        return torch.where(tokens.unsqueeze(-1), y.to(x.dtype), x)

    def _tokens(self, call: Call) -> tuple[Tensor, Tensor]:
        """Returns which positions are tokens, and the length of the document of each, of shape (B, L) or (B,)."""
        tokens = self._unpadded(call)
        if self.documents is None:
            return tokens, tokens if tokens.ndim == 1 else tokens.sum(1, keepdim=True)
        self._check_ids(call, "documents")
        documents = self._find_documents(call.active.batch).to(tokens.device)
        if not self._are_documents_checked:  # their values are looked at once, because that waits for the device
            _check_documents(documents, tokens)
            self._are_documents_checked = True
        return split_documents(documents, tokens)

    def _find_documents(self, batch: Any) -> Any:
        if isinstance(self.documents, int | str):
            return select_one(batch, self.documents, "documents")
        return self.documents(batch) if self.documents is not None else None

    def _unpadded(self, call: Call) -> Tensor:
        shape, device = call.output.shape[:-1], call.output.device
        if self.mask is None:
            embedding = original_module(call.module)
            if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
                return call.inputs[0] != embedding.padding_idx
            return torch.ones(shape, dtype=torch.bool, device=device)
        self._check_ids(call, "mask")
        mask: Any = find_mask(call.active.batch, self.mask)
        if mask.shape != shape:
            raise ValueError(
                f"the mask {self.mask!r} is {describe(mask)}, but {call.name!r} embeds tokens of shape {tuple(shape)}; "
                "type modules=… if the mask belongs to another embedding, or a function of the batch, such as "
                'mask=lambda batch: torch.arange(L, device=batch["lengths"].device) < batch["lengths"][:, None] for lengths'
            )
        tokens = mask.to(device) > 0
        if not self._is_mask_checked:  # as of the documents, the values are looked at once
            self._check_mask(call, tokens)
        return tokens

    def _check_mask(self, call: Call, tokens: Tensor) -> None:
        """Warns if a mask marks padding as tokens, or marks no position."""
        self._is_mask_checked = True
        ids = call.inputs[0]
        if ids.shape != tokens.shape:  # of a module that embeds something else
            return
        if (doubt := values_doubt(f"the input of {call.name!r}", ids[tokens], OTHER_MASK)) is not None:
            rank_zero_warn(f"{self.name!r}: {doubt}")

    def _check_ids(self, call: Call, argument: str) -> None:
        ids = call.active.ids.setdefault(call.name, call.inputs[0])
        if call.index > 0 and not torch.equal(ids, call.inputs[0]):
            raise ValueError(
                f"{call.name!r} embeds other tokens in a later call, but the {argument} {getattr(self, argument)!r} fits the "
                f"first call only; remove {argument}=… and type nn.Embedding(…, padding_idx=…)"
            )


def split_documents(documents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which positions are tokens of a document, and how many tokens the document of each position has.

    Args:
        documents: Position ids of shape (B, L), which count from 0 in each document, or lengths of documents, of shape (B, n).
        tokens: Which positions are not padding, of shape (B, L).

    Example:
        >>> tokens = torch.ones(1, 5, dtype=torch.bool)
        >>> split_documents(torch.tensor([[0, 1, 2, 0, 1]]), tokens)[1]
        tensor([[3, 3, 3, 2, 2]])
        >>> split_documents(torch.tensor([[3, 1]]), tokens)
        (tensor([[ True,  True,  True,  True, False]]), tensor([[3, 3, 3, 1, 0]]))
    """
    if documents.shape == tokens.shape:
        index = (documents == 0).cumsum(1)
    else:
        ends = documents.cumsum(1)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape).contiguous()
        index = torch.searchsorted(ends, positions, right=True)
        tokens = tokens & (positions < ends[:, -1:])
    counts = index.new_zeros(len(tokens), tokens.shape[1] + documents.shape[1] + 1)
    return tokens, counts.scatter_add_(1, index, tokens.to(index.dtype)).gather(1, index)


def _check_documents(documents: Tensor, tokens: Tensor) -> None:
    wanted = (
        f"for tokens of shape {tuple(tokens.shape)}, documents must be position ids of the same shape that count from 0 in "
        "each document, or lengths of documents of shape (B, n)"
    )
    is_integer = not (documents.is_floating_point() or documents.is_complex() or documents.dtype == torch.bool)
    if tokens.ndim != 2 or not is_integer or documents.ndim != 2 or len(documents) != len(tokens):
        raise ValueError(f"{wanted}, got {describe(documents)}")
    if documents.shape == tokens.shape:
        counts_on = documents == pad(documents, (1, -1), value=-1) + 1
        if not ((documents == 0) | counts_on | ~tokens).all():
            raise ValueError(f"{wanted}, got other values; if these are ids of documents, type a function that returns lengths")
    elif (documents < 0).any() or (documents.sum(1) > tokens.shape[1]).any():
        raise ValueError(f"{wanted}, got lengths of more than {tokens.shape[1]} tokens in a row")
