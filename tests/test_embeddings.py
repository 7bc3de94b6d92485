"""Noise in embeddings is that of the paper, and leaves padding alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from helpers import N_CLASSES, Classifier, fit, make_trainer
from helpers_activations import KEY, hooks, within
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_noise import Key
from lightning_noise.callbacks.embeddings import EmbeddingNoise
from lightning_noise.loop.perturbation import Context

N_WORDS, LENGTH, WIDTH = 20, 7, 6


class Sentences(Dataset):
    """Rows of ids of different lengths, filled up with zeros; the last has none."""

    def __init__(self, n: int = 16):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, N_WORDS, (n, LENGTH), generator=generator)
        lengths = torch.arange(n - 1, -1, -1) % (LENGTH + 1)
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        self.ids *= self.mask
        self.labels = self.ids.sum(1) % N_CLASSES

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


class Tokens(pl.LightningModule):
    """Classifies the mean embedding, and keeps the embeddings."""

    def __init__(self, padding_idx: int | None = None):
        super().__init__()
        self.words = nn.Embedding(N_WORDS, WIDTH, padding_idx=padding_idx)
        self.head = nn.Linear(WIDTH, N_CLASSES)
        self.embedded: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        e = self.words(input=ids)
        self.embedded.append(e.detach())
        return self.head(e.mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["ids"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def added(callback: EmbeddingNoise, padding_idx: int | None = None, **kwargs: Any) -> Tensor:
    """The noise of the first batch of all sentences."""
    module, _ = fit(
        [callback],
        module=lambda: Tokens(padding_idx),
        train=DataLoader(Sentences(), batch_size=16),
        max_epochs=1,
        limit_val_batches=0,
        **kwargs,
    )
    return module.embedded[0] - module.words.weight.detach()[Sentences().ids]


def test_the_embeddings_of_a_fit_get_the_noise_of_the_paper():
    key = Key((3, "embedding", 0, 0), rank=0) / "module" / "words" / 0
    u = torch.empty(16, LENGTH, WIDTH).uniform_(-1, 1, generator=key.generator("cpu"))
    lengths = Sentences().mask.sum(1)
    expected = 5.0 * u / (lengths * WIDTH).clamp_min(1).sqrt()[:, None, None] * Sentences().mask[..., None]
    # the noise is taken from a sum in float32, of numbers of up to 5
    torch.testing.assert_close(added(EmbeddingNoise(5.0, mask="attention_mask", seed=3)), expected, rtol=0, atol=2e-6)


def test_padding_and_rows_without_tokens_get_no_noise():
    mask = Sentences().mask.bool()
    assert not mask[-1].any()
    for delta in (added(EmbeddingNoise(5.0, mask="attention_mask")), added(EmbeddingNoise(5.0), padding_idx=0)):
        assert delta.isfinite().all()
        assert not delta[~mask].any()
        assert delta[mask].all()


def test_the_mask_comes_before_the_padding_idx_and_without_both_all_positions_are_tokens():
    by_mask, by_ids = (
        added(EmbeddingNoise(5.0, mask="attention_mask"), padding_idx=3),
        added(EmbeddingNoise(5.0), padding_idx=0),
    )
    with pytest.warns(UserWarning, match="'ids' is 0 wherever 'attention_mask' marks padding"):
        whole = added(EmbeddingNoise(5.0))
    by_mask[Sentences().ids == 3] = by_ids[Sentences().ids == 3] = (
        0  # the weights of a padding_idx are zeros, so roundings differ
    )
    torch.testing.assert_close(by_mask, by_ids, rtol=0, atol=2e-6)  # noise taken from a sum in float32, of numbers of up to 5
    assert whole.all()
    assert whole.abs().max() <= 5.0 / math.sqrt(LENGTH * WIDTH) + 2e-6


@pytest.mark.parametrize("padded", [LENGTH, 4 * LENGTH])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (LENGTH, 4), (3, 64), (None, 16)])
def test_the_noise_of_a_row_has_a_mean_square_norm_of_a_third_of_the_squared_level(length, width, padded):
    rows, alpha = 4000, 5.0
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, width)}).double()
    tokens = (rows,) if length is None else (rows, padded)  # one token for each row, where there is no axis of tokens
    batch = {"mask": (torch.arange(padded) < (length or 0)).expand(tokens) if length else torch.ones(tokens)}
    ids = torch.randint(N_WORDS, tokens)
    noisy = within(EmbeddingNoise(alpha, mask="mask"), module, lambda: module["words"](ids), batch=batch, level=alpha)
    norms = (noisy - module["words"](ids)).flatten(1).square().sum(1)
    # u^2 has the mean 1/3 and the variance 4/45, and a norm is a mean of n of them; five standard errors
    n = (length or 1) * width
    assert abs(norms.mean() / alpha**2 - 1 / 3) < 5 * math.sqrt(4 / 45 / n / rows)


def test_half_precision_is_perturbed_in_float32_and_rounded_once():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)}).bfloat16()
    ids = Sentences().ids
    half = within(EmbeddingNoise(5.0), module, lambda: module["words"](ids))
    full = within(EmbeddingNoise(5.0), module.float(), lambda: module["words"](ids))
    assert torch.equal(half, full.bfloat16())


def test_the_noise_of_a_probe_is_that_of_the_place_of_a_row():
    module, ids = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)}), Sentences().ids
    callback = EmbeddingNoise(5.0)
    whole = within(callback, module, lambda: module["words"](ids), Key(("probe",), positions=range(16)))
    part = within(callback, module, lambda: module["words"](ids[4:9]), Key(("probe",), positions=range(4, 9)))
    assert torch.equal(part, whole[4:9])


def test_padding_that_nothing_marks_is_noticed():
    batch = next(iter(DataLoader(Sentences(), batch_size=16)))
    module, known = (nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH, padding_idx=each)}) for each in (None, 0))
    with pytest.warns(UserWarning, match="'ids' is 0 wherever 'attention_mask' marks padding, .* type mask='attention_mask'"):
        within(EmbeddingNoise(), module, lambda: module["words"](batch["ids"]), batch=batch)
    within(EmbeddingNoise(mask="attention_mask"), module, lambda: module["words"](batch["ids"]), batch=batch)
    within(EmbeddingNoise(), known, lambda: known["words"](batch["ids"]), batch=batch)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda batch: batch["attention_mask"] == 0, "'words' is 0 everywhere .* for the opposite type mask=lambda batch"),
        (lambda batch: (batch["attention_mask"] - 1) * 1e9, "'words' has no valid element"),  # added to scores of attention
    ],
)
def test_a_mask_that_marks_the_padding_as_tokens_or_nothing_is_noticed(mask, message):
    batch = next(iter(DataLoader(Sentences(), batch_size=16)))
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)})
    with pytest.warns(UserWarning, match=message):
        within(EmbeddingNoise(mask=mask), module, lambda: module["words"](batch["ids"]), batch=batch)


@pytest.mark.parametrize("alike", [torch.arange(24).view(4, 6) % 5 == 2, (torch.arange(6) == 5).expand(4, 6)])
def test_masked_words_and_ends_of_sentences_are_no_padding(alike):
    ids = Sentences().ids[:4, :6].clamp_min(2).masked_fill(alike, 1)
    batch = {"ids": ids, "special_tokens_mask": alike, "labels": ids[:, 0]}
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)})
    within(EmbeddingNoise(), module, lambda: module["words"](ids), batch=batch)  # a warning is an error


def test_a_compiled_embedding_knows_its_padding():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH, padding_idx=0)})
    plain = within(EmbeddingNoise(5.0), module, lambda: module["words"](Sentences().ids))
    module["words"] = torch.compile(module["words"], backend="eager")  # type: ignore[assignment]
    assert torch.equal(within(EmbeddingNoise(5.0), module, lambda: module["words"](Sentences().ids)), plain)


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (EmbeddingNoise(5.0, mask="mask"), ValueError, "no leaf 'mask' in the batch; leaves are: 'ids' int64"),
        (
            EmbeddingNoise(5.0, mask="labels"),
            ValueError,
            r"the mask 'labels' is int64 \(8,\), but 'words' embeds tokens of shape \(8, 7\); type modules=…",
        ),
        (
            EmbeddingNoise(5.0, modules="word"),
            ValueError,
            "no module matches 'word'; type 'words'; modules are: 'words', 'head'",
        ),
        (
            EmbeddingNoise(5.0, modules=["words", "inner"], mask="attention_mask"),
            TypeError,
            r"\(B, L, d\) or \(B, d\), but 'inner' returned int64 \(8, 7\)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, EmbeddingNoise) else None,
)
def test_what_does_not_suit_the_embeddings_is_refused(callback, error, message):
    class Wrapped(Tokens):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, ids):
            return super().forward(self.inner(ids))

    module = Wrapped()
    with pytest.raises(error, match=message):
        fit([callback], module=module, train=DataLoader(Sentences(), batch_size=8), limit_val_batches=0)
    assert not hooks(module)


def test_a_mask_is_for_an_embedding_of_the_same_tokens_alone():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH, padding_idx=0)})
    ids, batch = Sentences().ids, {"mask": Sentences().mask}

    def twice():
        return module["words"](ids), module["words"](ids.flip(0))

    with pytest.raises(
        ValueError,
        match=r"'words' embeds other tokens in a later call, .* mask 'mask' fits the first call only; .*padding_idx=…",
    ):
        within(EmbeddingNoise(5.0, mask="mask"), module, twice, batch=batch)
    one, two = within(
        EmbeddingNoise(5.0, mask="mask"), module, lambda: (module["words"](ids), module["words"](ids)), batch=batch
    )
    assert not torch.equal(one, two), "two encodings of one batch draw twice"
    for noisy, padding in zip(within(EmbeddingNoise(5.0), module, twice), (ids == 0, ids.flip(0) == 0), strict=True):
        assert not noisy[padding].any()
        assert noisy[~padding].any()


def test_each_of_two_batches_of_a_step_has_its_mask():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)})
    ids, mask = Sentences().ids, Sentences().mask
    callback, trainer = EmbeddingNoise(5.0, mask="mask"), make_trainer()
    with callback.perturbation(Context(trainer, module), {"mask": mask}, 5.0, KEY):  # type: ignore[arg-type]
        module["words"](ids)
        with callback.perturbation(Context(trainer, module), {"mask": mask.flip(0)}, 5.0, KEY / "second"):  # type: ignore[arg-type]
            noisy = module["words"](ids.flip(0))
    delta = noisy - module["words"](ids.flip(0))
    assert not delta[mask.flip(0) == 0].any()
    assert delta[mask.flip(0) == 1].all()


def test_it_must_be_said_which_of_several_embeddings_gets_noise():
    class Several(Tokens):
        def __init__(self):
            super().__init__()
            self.positions_of = nn.Embedding(LENGTH, WIDTH)

    with pytest.raises(ValueError, match=r"a single nn\.Embedding, got: 'words', 'positions_of'; type modules=…"):
        EmbeddingNoise(5.0).select_modules(Several())
    assert list(EmbeddingNoise(5.0, modules="words").select_modules(Several())) == ["words"]
    with pytest.raises(ValueError, match=r"a single nn\.Embedding, got: none; type modules=…"):
        EmbeddingNoise(5.0).select_modules(Classifier())


def test_at_level_0_the_embeddings_are_the_clean_ones():
    assert not added(EmbeddingNoise(0.0, mask="attention_mask")).any()


# --- masks and documents


def lengths_mask(batch: Any) -> Tensor:
    return torch.arange(LENGTH) < (batch["ids"] != 0).sum(1, keepdim=True)


def test_a_mask_may_be_a_function_of_the_batch():
    one, two = (added(EmbeddingNoise(5.0, mask=mask, seed=3)) for mask in (lengths_mask, "attention_mask"))
    assert torch.equal(one, two)


PACKED = torch.tensor([[4, 3, 0], [2, 2, 2], [7, 0, 0], [1, 1, 0]])


def positions_of(lengths: Tensor) -> Tensor:
    """Position ids of the documents, and zeros at padding."""
    rows = [torch.cat([torch.arange(int(n)) for n in row]) for row in lengths]
    return torch.stack([F.pad(row, (0, LENGTH - len(row))) for row in rows])


@pytest.mark.parametrize("given", ["lengths", "positions", "function"])
def test_a_packed_row_has_the_noise_of_its_documents_alone(given):
    width, alpha = 500, 5.0
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, width)}).double()
    ids, mask = torch.randint(N_WORDS, (4, LENGTH)), torch.arange(LENGTH) < PACKED.sum(1, keepdim=True)
    batch = {"n": PACKED, "at": positions_of(PACKED), "mask": mask}
    arguments: dict[str, Any] = {
        "lengths": {"documents": "n"},
        "positions": {"documents": "at", "mask": "mask"},
        "function": {"documents": lambda batch: batch["n"]},
    }[given]
    noisy = within(EmbeddingNoise(alpha, **arguments), module, lambda: module["words"](ids), batch=batch, level=alpha)
    squares = (noisy - module["words"](ids)).square().sum(-1)
    assert not squares[~mask].any()
    for row, lengths in zip(squares, PACKED.tolist(), strict=True):
        for document, n in zip(row[: sum(lengths)].split([n for n in lengths if n]), filter(None, lengths), strict=True):
            # as for a row of the document alone; five standard errors of a mean of squares
            assert abs(document.sum() / alpha**2 - 1 / 3) < 5 * math.sqrt(4 / 45 / n / width)


def test_a_row_of_one_document_has_the_noise_of_a_row_without_documents():
    ids, module = Sentences().ids, nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)})
    batch = {"mask": Sentences().mask, "n": Sentences().mask.sum(1, keepdim=True)}
    callbacks = EmbeddingNoise(5.0, mask="mask"), EmbeddingNoise(5.0, documents="n")
    one, two = (within(callback, module, lambda: module["words"](ids), batch=batch) for callback in callbacks)
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), "got other values; if these are ids of documents, type a function"),
        (torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), "got other values"),
        (torch.tensor([[5, 3]]), "got lengths of more than 7 tokens in a row"),
        (torch.tensor([7]), r"got int64 \(1,\)"),
        (torch.ones(1, LENGTH), r"got float32 \(1, 7\)"),
    ],
    ids=["ids", "from 1", "too long", "one axis", "floats"],
)
def test_documents_that_do_not_fit_are_refused_with_what_they_must_be(documents, message):
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)})
    callback = EmbeddingNoise(5.0, documents=lambda batch: batch["documents"])
    with pytest.raises(ValueError, match=rf"for tokens of shape \(1, 7\), documents must be position ids .*{message}"):
        within(
            callback,
            module,
            lambda: module["words"](torch.ones(1, LENGTH, dtype=torch.long)),
            batch={"documents": documents},
        )


def test_lengths_as_a_mask_are_refused_with_the_function_to_type():
    module = nn.ModuleDict({"words": nn.Embedding(N_WORDS, WIDTH)})
    batch = {"lengths": torch.tensor([3, 7])}
    with pytest.raises(ValueError, match=r"such as mask=lambda batch: torch\.arange\(L.*for lengths"):
        within(
            EmbeddingNoise(5.0, mask="lengths"),
            module,
            lambda: module["words"](torch.ones(2, LENGTH, dtype=torch.long)),
            batch=batch,
        )
