"""Noise in the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_noise.batch import describe, select_one
from lightning_noise.callbacks.activations import Call, OutputCallback, find_modules, name_modules
from lightning_noise.callbacks.adaptive import AnyLevel
from lightning_noise.loop.internals import original_module
from lightning_noise.noise import Uniform
from lightning_noise.perturb.outputs import check_output

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["EmbeddingNoise"]


class EmbeddingNoise(OutputCallback):
    r"""Adds uniform noise to the embeddings of tokens in training (NEFTune).

    .. math:: e' = e + \frac{\alpha}{\sqrt{L d}} u, \quad u \sim \mathcal{U}(-1, 1)

    An ``nn.Embedding`` returns the embeddings :math:`e` of shape :math:`(B, L, d)`. The level is :math:`\alpha`, in the units
    of the embeddings; the paper uses 5 to 15. :math:`L` is the number of tokens of a row without padding, and padding gets no
    noise. So the noise of a row has the mean square norm :math:`\alpha^2 / 3` for any :math:`L`, :math:`d` and padding.
    ``mask`` marks the tokens. Without a mask, the ``padding_idx`` of the embedding marks the padding; without both, all
    positions are tokens. A row of padding gets no noise. In embeddings of shape :math:`(B, d)`, each row is a token.

    The noise acts, and is logged, as in :class:`ActivationNoise`.

    Args:
        level: The amount :math:`\alpha`: a number, a schedule, a callable or an :class:`~lightning_noise.AdaptiveLevel`.
        modules: The name of the embedding, a pattern or a list of patterns. Default: the only ``nn.Embedding``.
        mask: Which leaf of the batch marks the tokens, of shape :math:`(B, L)`: 1 or true at tokens, 0 or false at padding, the
            opposite of ``key_padding_mask`` in PyTorch. If the embedding is also called on other tokens, remove the mask and
            give the embedding a ``padding_idx``.
        seed: The seed of the draws. Default: the seed of ``seed_everything``, or 0.
        name: The name in log keys and messages.

    Raises:
        TypeError: If a selected module returns no embeddings.
        ValueError: If ``modules`` is not set and the module has no single ``nn.Embedding``, if the mask does not fit or the
            embedding is called on other tokens, or as in :class:`ActivationNoise`.

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
        super().__init__(level, seed=seed, name=name)
        self.modules = modules
        self.mask = mask

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
        if self.mask is not None:
            select_one(batch, self.mask, "mask")

    def perturb_call(self, call: Call) -> Any:
        x = call.output
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            raise TypeError(
                f"expected embeddings of shape (B, L, d) or (B, d), but {call.name!r} returned {describe(x)}; "
                "type modules=… to select an nn.Embedding"
            )
        check_output(x, call.key, call.name)
        tokens = self._tokens(call).unsqueeze(-1)
        size = (tokens.flatten(1).sum(1) * x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        # a row without tokens gets an infinite level, but torch.where keeps nothing of its noise
        y = call.key.apply(Uniform(), x, call.active.level * size.rsqrt())
        return torch.where(tokens, y, x)

    def _tokens(self, call: Call) -> Tensor:
        """Returns the mask of the tokens, of shape (B, L) or (B,)."""
        shape, device = call.output.shape[:-1], call.output.device
        if self.mask is None:
            embedding = original_module(call.module)
            if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
                return call.inputs[0] != embedding.padding_idx
            return torch.ones(shape, dtype=torch.bool, device=device)
        ids = call.active.ids.setdefault(call.name, call.inputs[0])
        if call.index > 0 and not torch.equal(ids, call.inputs[0]):
            raise ValueError(
                f"{call.name!r} embeds other tokens in a later call, but the mask {self.mask!r} fits the first call only; "
                "remove mask=… and type nn.Embedding(…, padding_idx=…)"
            )
        mask = select_one(call.active.batch, self.mask, "mask")
        if mask.shape != shape:
            raise ValueError(
                f"the mask {self.mask!r} is {describe(mask)}, but {call.name!r} embeds tokens of shape {tuple(shape)}; "
                "type modules=… if the mask belongs to another embedding"
            )
        return mask.to(device) != 0
