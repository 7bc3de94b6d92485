"""A second use of the labels that the loss needs is found and named, and a metric is not."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from helpers_losses import CLASSES, PARTNERS, labels, level, logits
from torch.utils.checkpoint import checkpoint

from lightning_noise.losses import LabelLoss, MixedLabelLoss, NoisyLabelLoss, SmoothedLabelLoss

MODES = {
    "smoothing": lambda y: SmoothedLabelLoss(y, level()),
    "mixing": lambda y: MixedLabelLoss(y, PARTNERS, torch.tensor(0.3)),
    "other labels": lambda y: NoisyLabelLoss(y, (y + 1) % CLASSES),
}
TABLE = torch.linspace(-1, 1, CLASSES * CLASSES).view(CLASSES, CLASSES)
LEARNED = TABLE.clone().requires_grad_()
WEIGHTS = torch.linspace(0.1, 2.0, CLASSES)
ROWS = torch.arange(6)
ce = F.cross_entropy


def hot(y):
    return F.one_hot(y, CLASSES).float()


def dice(z, y):
    p = z.softmax(1)
    return 1 - (2 * (p * hot(y)).sum(0) / (p + hot(y)).sum(0)).mean()


def subtract_in_place(z, y):
    z = z.clone()
    z[ROWS, y] -= 0.3
    return z


def zeros_with(y, value):
    return torch.zeros(6, CLASSES).scatter_(1, y[:, None], value)


# the name of the function that is named first, and a loss of the logits and the labels
USES = {
    "Dice": ("mul in dice", lambda z, y: ce(z, y) + dice(z, y)),
    "angular margin": ("sub", lambda z, y: ce(16 * (z - 0.3 * F.one_hot(y, CLASSES)), y)),
    "margin in place": ("__getitem__ in subtract_in_place", lambda z, y: ce(subtract_in_place(z, y), y)),
    "margin by scatter": ("add", lambda z, y: ce(z + zeros_with(y, -0.5), y)),
    "margin by where": ("where", lambda z, y: ce(torch.where(y[:, None] == torch.arange(CLASSES), z - 0.3, z), y)),
    "scatter_add": ("scatter_add", lambda z, y: ce(z.scatter_add(1, y[:, None], -torch.ones(6, 1)), y)),
    "centers": ("__getitem__", lambda z, y: ce(z, y) + (z - LEARNED[y]).square().mean()),
    "centers in a buffer": ("sub", lambda z, y: ce(z, y) + (z - TABLE[y]).square().mean()),
    "embedding": ("embedding", lambda z, y: ce(z, y) + (z - F.embedding(y, LEARNED)).square().mean()),
    "index_select": ("index_select", lambda z, y: ce(z, y) + LEARNED.index_select(0, y).mean()),
    "gather": ("gather", lambda z, y: ce(z, y) - z.gather(1, y[:, None]).mean()),
    "take_along_dim": ("take_along_dim", lambda z, y: ce(z, y) - z.take_along_dim(y[:, None], 1).mean()),
    "entry of the label": ("__getitem__", lambda z, y: ce(z, y) - z.log_softmax(1)[ROWS, y].mean()),
    "pairs": ("mul", lambda z, y: ce(z, y) + (torch.cdist(z, z) * (y[:, None] == y)).mean()),
    "chosen pairs": ("__getitem__", lambda z, y: ce(z, y) + torch.cdist(z, z)[y[:, None] == y].mean()),
    "chosen by class": ("where", lambda z, y: ce(z, y) + torch.where(y == 1, z[:, 0], z[:, 1]).mean()),
    "class by class": ("mul", lambda z, y: ce(z, y) + sum((z[:, c] * (y == c).float()).mean() for c in range(CLASSES))),
    "foreground": ("mul", lambda z, y: ce(z, y) + (z[:, 0] * (y > 0).float()).mean()),
    "prototypes": ("__getitem__", lambda z, y: ce(z, y) + sum(z[y == c].sum() for c in y.unique())),
    "einsum": ("einsum", lambda z, y: ce(z, y) + torch.einsum("nk,nk->", z, hot(y))),
    "multi_margin_loss": ("multi_margin_loss", lambda z, y: ce(z, y) + F.multi_margin_loss(z, y)),
    "mse_loss": ("mse_loss", lambda z, y: ce(z, y) + F.mse_loss(z.sigmoid(), hot(y))),
    "l1_loss": ("l1_loss", lambda z, y: ce(z, y) + F.l1_loss(z.sigmoid(), hot(y))),
    "kl_div": ("kl_div", lambda z, y: ce(z, y) + F.kl_div(z.log_softmax(1), hot(y), reduction="sum")),
    "merged labels": ("cross_entropy", lambda z, y: ce(z, y) + ce(z, torch.where(ROWS > 2, y, z.argmax(1)))),
}  # fmt: skip


def unfollowed(mode: str, loss) -> list[str]:
    torch.manual_seed(0)
    z, y = logits(6, CLASSES), labels(6)
    with MODES[mode](y) as found:
        loss(z * 1, y).backward()
    assert found.applied
    return found.unfollowed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", USES)
def test_a_second_use_that_the_loss_needs_is_named_with_its_place(name, mode):
    function, loss = USES[name]
    first = unfollowed(mode, loss)[0]
    assert first.startswith(function + " in" * (" in" not in function))
    assert "test_losses_uses.py:" in first


def also(compute):
    """A step that computes something beside the loss."""
    return lambda z, y: (compute(z, y), ce(z, y))[1]


def metric(name, **options):
    return also(lambda z, y: getattr(torchmetrics, name)(task="multiclass", num_classes=CLASSES, **options)(z, y))


def with_attention(z, y):
    bias = torch.zeros(6, 6).masked_fill((y == 0)[None], -1e4)
    return ce(F.scaled_dot_product_attention(z[None], z[None], z[None], attn_mask=bias)[0], y)


FINE = {
    "plain": ce,
    "accuracy": metric("Accuracy"),
    "F1": metric("F1Score"),
    "confusion matrix": metric("ConfusionMatrix"),
    "AUROC": metric("AUROC"),
    "AUROC in bins": metric("AUROC", thresholds=10),
    "calibration error": metric("CalibrationError"),
    "hinge as a metric": metric("HingeLoss"),
    "accuracy by hand": also(lambda z, y: (z.argmax(1) == y).float().mean()),
    "Dice as a metric": also(dice),
    "probability of the label": also(lambda z, y: z.softmax(1).gather(1, y[:, None]).mean()),
    "logits by class": also(lambda z, y: [z[y == c].mean() for c in range(CLASSES)]),
    "class weights": lambda z, y: ce(z, y, weight=WEIGHTS),
    "class weights of the batch": lambda z, y: ce(z, y, weight=1 / (1 + torch.bincount(y, minlength=CLASSES))),
    "mask": lambda z, y: ce(z, y, reduction="none")[y != -100].mean(),
    "mask of the logits": lambda z, y: ce(z[y != 0], y[y != 0]),
    "mask by product": lambda z, y: (ce(z, y, reduction="none") * (y != 0)).sum() / (y != 0).sum(),
    "mask by filling": lambda z, y: ce(z, y, reduction="none").masked_fill(y == 0, 0).mean(),
    "mask by where": lambda z, y: torch.where(y != 0, ce(z, y, reduction="none"), 0.0).mean(),
    "inverted mask": lambda z, y: ce(z[~(y == 0)], y[~(y == 0)]),
    "labels that are not NaN": lambda z, y: ce(z[y == y], y[y == y]),
    "weights of labels that are not NaN": lambda z, y: (ce(z, y, reduction="none") * ~(y != y)).sum(),
    "positions": lambda z, y: ce(z[(y != 0).nonzero().squeeze(1)], y[(y != 0).nonzero().squeeze(1)]),
    "sorted": lambda z, y: ce(z[y.argsort()], y[y.argsort()]),
    "sorted pair": lambda z, y: ce(z[y.sort().indices], y.sort().values),
    "focal": lambda z, y: ((1 - torch.exp(-ce(z, y, reduction="none"))) ** 2 * ce(z, y, reduction="none")).mean(),
    "distillation": lambda z, y: ce(z, y) + F.kl_div(z.log_softmax(1), TABLE[:6].softmax(1), reduction="sum"),
    "masked distillation": lambda z, y: ce(z, y) + F.mse_loss(z[y != 0], TABLE[:6][y != 0]),
    "one-hot": lambda z, y: ce(z, hot(y)),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, hot(y)),
    "log-probabilities": lambda z, y: F.nll_loss(z.log_softmax(1), y),
    "attention": with_attention,
    "additive mask": lambda z, y: ce(z + (1 - (y != 0).float())[:, None] * -1e4, y),
    "precision of the labels": lambda z, y: ce(z.type_as(y.float()), y),
    "regularization": lambda z, y: ce(z, y) * y.numel() / len(y) + z.square().mean(),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FINE)
def test_a_metric_a_mask_or_an_order_is_no_second_use(name, mode):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No (positive|negative) samples")
        assert unfollowed(mode, FINE[name]) == []


def test_weights_of_the_labels_count_if_they_belong_to_the_true_labels_alone():
    def loss(z, y):
        return (WEIGHTS[y] * ce(z, y, reduction="none")).mean()

    # a smoothed loss times the weight of the label is the loss that torch smooths, times the weight
    assert unfollowed("smoothing", loss) == []
    for mode in ("mixing", "other labels"):
        assert unfollowed(mode, loss)[0].startswith("mul in loss")


def test_a_loss_of_the_samples_of_each_class_counts_if_labels_are_paired():
    def loss(z, y):
        return sum(ce(z[y == c], y[y == c]) for c in range(CLASSES) if (y == c).any())

    assert unfollowed("smoothing", loss) == []
    for mode in ("mixing", "other labels"):  # a sample of a class has no other label to mix or to change to
        assert unfollowed(mode, loss)[0].startswith("__getitem__ in")


def test_a_decoder_that_reads_the_previous_labels_counts_for_mixing_alone():
    y = labels(6, 4)
    for mode, build in MODES.items():
        with build(y) as found:
            embedded = F.embedding(y[:, :-1], LEARNED)
            ce((embedded * (y[:, :-1] != 0).unsqueeze(-1)).movedim(-1, 1), y[:, 1:]).backward()
        assert bool(found.unfollowed) is (mode == "mixing")


def test_the_modes_of_nested_losses_each_find_the_use():
    y, z = labels(6), logits(6, CLASSES)
    for first, second in itertools.permutations(MODES.values(), 2):
        if first is MODES["mixing"] and second is MODES["other labels"]:
            continue  # labels that change at the loss cannot be mixed there
        with first(y) as outer, second(y) as inner:
            (ce(z, y) + dice(z, y)).backward()
        assert outer.unfollowed == inner.unfollowed != []


def test_a_use_in_checkpointed_code_or_before_a_gradient_by_hand_is_found():
    def loss(z, y):
        return ce(z, y) + dice(z, y)

    z, y = logits(6, CLASSES), labels(6)
    for use_reentrant in (False, True):
        with SmoothedLabelLoss(y, level()) as mode:
            checkpoint(loss, z, y, use_reentrant=use_reentrant).backward()
        assert mode.unfollowed[0].startswith("mul in dice")
    with SmoothedLabelLoss(y, level()) as mode:
        torch.autograd.grad(loss(z, y), z)
    assert mode.unfollowed[0].startswith("mul in dice")


def test_a_mode_that_does_not_search_finds_nothing():
    y = labels(6)
    mode: LabelLoss = SmoothedLabelLoss(y, level())
    mode.searches = False
    with mode:
        dice(logits(6, CLASSES), y).backward()
    assert mode.unfollowed == []


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_has_ended_is_freed_without_the_garbage_collector(mode):
    y, z = labels(6), logits(6, CLASSES)
    gc.disable()
    try:
        with MODES[mode](y) as outer, MODES["smoothing"](labels(6)):
            ce(z, y).backward()
        ended = weakref.ref(outer)
        del outer
        assert ended() is None
    finally:
        gc.enable()
