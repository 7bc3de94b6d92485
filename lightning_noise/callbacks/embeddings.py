"""Noise in the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_noise.batch import describe, select_one
from lightning_noise.callbacks.activations import Call, OutputCallback, name_modules
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.loop.internals import original_module
from lightning_noise.noise import Uniform
from lightning_noise.perturb.outputs import check_output

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["EmbeddingNoise"]


class EmbeddingNoise(OutputCallback):
    r"""Adds uniform noise to the embeddings of tokens, in training: NEFTune.

    .. math:: e' = e + \frac{\alpha}{\sqrt{L d}} u, \quad u \sim \mathcal{U}(-1, 1)

    The embeddings :math:`e` of shape :math:`(B, L, d)` are what an ``nn.Embedding`` returns. The level is :math:`\alpha`, in
    their units; the paper uses 5 to 15. :math:`L` is the number of tokens of each row without its padding, which gets no noise,
    so that the noise of a row has the mean square norm :math:`\alpha^2 / 3` for any :math:`L`, :math:`d` and padding. What is
    padding is said by the mask, or else by the ``padding_idx`` of the embedding; with neither, all positions count. A row of
    padding alone gets no noise. Where the embeddings are of shape :math:`(B, d)`, each row is one token.

    It acts from the start of the training step to the end of the backward pass, never in validation, test and prediction. At
    level 0 nothing is done. The draws differ from process to process. Of hooks and compiled models the same holds as for
    :class:`ActivationNoise`.

    It logs ``noise/<name>/level``.

    Args:
        level: The amount :math:`\alpha`: a number, a schedule, a callable or an adaptive level.
        modules: The name of the embedding, a pattern of names, or a list of these; left out, the only ``nn.Embedding``.
        mask: Which leaf of the batch, of shape :math:`(B, L)`, is 1 or true at tokens and 0 or false at padding: an index, a
            key or a dotted path. It is the opposite of the ``key_padding_mask`` of PyTorch, and for an embedding that is
            called for the tokens of the mask alone; else give the embedding a ``padding_idx``.
        seed: The seed of the draws; left out, that of ``seed_everything``, or else 0.
        name: The name in the log, which also separates the draws of two callbacks; two of one name are an error.

    Raises:
        TypeError: A module that is selected returns no embeddings.
        ValueError: It must be said which embedding it is, the mask does not fit or would be used for several calls, or as for
            :class:`ActivationNoise`.

    References:
        NEFTune: Noisy Embeddings Improve Instruction Finetuning (Jain et al., 2023), https://arxiv.org/abs/2310.05914

    Example:
        >>> callback = EmbeddingNoise(5.0, mask="attention_mask")
        >>> callback.name
        'embedding'
    """

    def __init__(
        self,
        level: AnyLevel | None = None,
        *,
        modules: str | Sequence[str] | None = None,
        mask: int | str | None = None,
        seed: int | None = None,
        name: str = "embedding",
    ):
        super().__init__(level, modules=modules, seed=seed, name=name)
        self.mask = mask

    def selected(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        if self.modules is not None:
            return super().selected(pl_module)
        found = {
            name: module
            for name, module in name_modules(pl_module).items()
            if isinstance(original_module(module), nn.Embedding)
        }
        if len(found) != 1:
            names = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"which module is the embedding? Say modules=…; of nn.Embedding there are: {names}")
        return found

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        if self.mask is not None:
            select_one(batch, self.mask, "mask")

    def noisy(self, call: Call) -> Any:
        x = call.output
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            raise TypeError(f"the embeddings must be of shape (B, L, d), but {call.name!r} returned {describe(x)}")
        check_output(x, call.key, call.name)
        tokens = self._tokens(call)
        lengths = tokens.unsqueeze(-1).flatten(1).sum(1)
        size = (lengths * x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        # infinite in a row without tokens, of which nothing is used
        y = call.key.apply(Uniform(), x, call.force.level * size.rsqrt())
        return torch.where(tokens.unsqueeze(-1), y, x)

    def _tokens(self, call: Call) -> Tensor:
        """Returns a mask of the tokens, of the shape of the embeddings without their last axis."""
        shape, device = call.output.shape[:-1], call.output.device
        embedding = original_module(call.module)
        if self.mask is not None:
            ids = call.force.ids.setdefault(call.name, call.inputs[0])
            if call.index > 0 and not torch.equal(ids, call.inputs[0]):
                raise ValueError(
                    f"{call.name!r} is called for other tokens, too, and {self.mask!r} is the mask of its first call alone; "
                    "leave mask out and give the embedding a padding_idx"
                )
            mask = select_one(call.force.batch, self.mask, "mask")
            if mask.shape != shape:
                raise ValueError(
                    f"the mask {self.mask!r} is {describe(mask)}, but {call.name!r} embeds tokens of shape {tuple(shape)}; "
                    "say modules=… if the mask belongs to another embedding"
                )
            return mask.to(device) != 0
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            return call.inputs[0] != embedding.padding_idx
        return torch.ones(shape, dtype=torch.bool, device=device)
