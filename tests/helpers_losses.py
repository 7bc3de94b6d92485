"""Logits and labels for tests of losses of soft targets."""

from __future__ import annotations

import torch

CLASSES = 7
REDUCTIONS = ("none", "sum", "mean")


def level(value: float = 0.1) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def labels(*shape: int, ignored: bool = False) -> torch.Tensor:
    target = torch.randint(0, CLASSES, shape)
    return target.masked_fill(torch.rand(shape) < 0.3, -100) if ignored else target


def gradient(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


# derived targets: from a batch of (6, 1, 4) positions to the target of the loss, and the same of the logits (6, 1, 4, 7)
IGNORED = 5
MASK = torch.tensor([[[True, False, True, True]]]).expand(6, 1, 4)
DERIVED = {
    "itself, classes second": (lambda y: y, lambda x: x.movedim(-1, 1)),
    "cast and flattened": (lambda y: y.to(torch.int32).long().view(-1), lambda x: x.reshape(-1, 7)),
    "squeezed": (lambda y: torch.squeeze(y, 1), lambda x: x.squeeze(1).movedim(-1, 1)),
    "shifted tokens": (lambda y: y.squeeze(1)[:, 1:].reshape(-1), lambda x: x[:, 0, 1:].reshape(-1, 7)),
    "transposed": (lambda y: y.squeeze(1).T.reshape(-1), lambda x: x[:, 0].transpose(0, 1).reshape(-1, 7)),
    "positions first": (lambda y: y.squeeze(1).t().contiguous().view(-1), lambda x: x[:, 0].transpose(0, 1).reshape(-1, 7)),
    "masked": (lambda y: y[MASK], lambda x: x[MASK]),
    "masked by its own values": (lambda y: y[y != IGNORED], lambda x: x[TARGET != IGNORED]),
    "rows by index": (lambda y: y.index_select(0, torch.tensor([4, 1])), lambda x: x[[4, 1]].movedim(-1, 1)),
    "flattened by keyword": (lambda y: torch.flatten(input=y), lambda x: x.reshape(-1, 7)),
    "unbound": (lambda y: y.unbind(2)[3].squeeze(1), lambda x: x[:, 0, 3]),
    "concatenated": (lambda y: torch.cat([y.view(-1), y.view(-1)]), lambda x: torch.cat([x.reshape(-1, 7)] * 2)),
    "filled": (lambda y: y.masked_fill(~MASK, -100).view(-1), lambda x: x.reshape(-1, 7)),
    "filled by its own values": (lambda y: torch.where(y == IGNORED, -100, y).view(-1), lambda x: x.reshape(-1, 7)),
    "chosen": (lambda y: torch.where(MASK, y, -100).view(-1), lambda x: x.reshape(-1, 7)),
    "written into": (lambda y: _write(y.clone()).view(-1), lambda x: x.reshape(-1, 7)),
    "to its device and back": (lambda y: y.to(torch.zeros(1)).to(y).detach().cpu().flatten(), lambda x: x.reshape(-1, 7)),
}
TARGET = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 5, 2, 3, 4, 6, 5, 1, 0, 2, 2, 5, 1, 4, 3, 6, 6]).view(6, 1, 4)


def _write(target: torch.Tensor) -> torch.Tensor:
    target[target == IGNORED] = -100
    return target


PARTNERS = torch.tensor([3, 0, 1, 5, 2, 4])
