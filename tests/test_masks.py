"""Masks fit their tensors or are refused, and documents of packed rows are taken apart and put together."""

from __future__ import annotations

import pytest
import torch

from lightning_noise import masks, noise

DEVICE = torch.get_default_device()


def spans(*lengths: int, of: int) -> torch.Tensor:
    return torch.arange(of) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize(
    ("mask", "shape", "expected"),
    [
        (spans(2, 3, of=4), (2, 4), lambda mask: mask),
        (spans(2, 3, of=4), (2, 4, 5), lambda mask: mask[:, :, None].expand(2, 4, 5)),
        (spans(2, 3, of=4), (2, 5, 4), lambda mask: mask[:, None].expand(2, 5, 4)),
        (spans(2, 3, of=4).long(), (2, 4, 5), lambda mask: (mask > 0)[:, :, None].expand(2, 4, 5)),
        (spans(2, 3, of=4).float()[:, None], (2, 4, 4), lambda mask: (mask > 0).expand(2, 4, 4)),
        (spans(2, 3, of=4)[:, :, None], (2, 4, 4), lambda mask: mask.expand(2, 4, 4)),
        (torch.tensor([True, False]), (2, 3), lambda mask: mask[:, None].expand(2, 3)),
        (torch.tensor([1, 0]), (2,), lambda mask: mask > 0),
        (torch.ones(2, 6, 7, dtype=torch.bool), (2, 3, 6, 7), lambda mask: mask[:, None].expand(2, 3, 6, 7)),
    ],
)
def test_a_mask_covers_the_first_axes_or_the_first_and_the_last(mask, shape, expected):
    aligned = masks.align_mask(mask, torch.zeros(shape))
    assert aligned.dtype == torch.bool
    assert aligned.is_contiguous()
    assert torch.equal(aligned, expected(mask))


@pytest.mark.parametrize(
    ("mask", "shape", "message"),
    [
        (spans(2, 3, of=4), (2, 4, 4), r"ambiguous for float32 \(2, 4, 4\); add the missing axis.*unsqueeze\(-1\)"),
        (spans(2, 3, of=4), (2, 5, 6), r"first axes of the input, or the first and the last, got bool \(2, 4\)"),
        (spans(2, 3, of=4), (3, 4), "first axes of the input"),
        (spans(2, 3, of=4)[None], (2, 4), "first axes of the input"),
        (spans(2, 3, of=4)[:, None, None], (2, 4, 3), r"type mask=lambda batch: …, such as of shape \(2, 4\)"),
        (torch.tensor([[2], [3]]), (2, 4), "if these are lengths"),
        (torch.tensor([2, 3]), (2, 4), r'torch\.arange\(T, device=.*< batch\["lengths"\]\[:, None\]'),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, shape, message):
    with pytest.raises(ValueError, match=message):
        masks.align_mask(mask, torch.zeros(shape))


def test_a_mask_of_a_single_position_is_no_column_of_lengths():
    assert masks.align_mask(torch.tensor([[1], [0]]), torch.zeros(2, 1, 3)).tolist() == [[[True] * 3], [[False] * 3]]


def test_a_mask_is_a_leaf_or_a_function_of_the_batch():
    batch = {"x": torch.zeros(2, 3), "mask": torch.ones(2, 3), "lengths": torch.tensor([1, 3])}
    assert masks.find_mask(batch, None) is None
    assert masks.find_mask(batch, "mask") is batch["mask"]
    found = masks.find_mask(batch, lambda batch: torch.arange(3) < batch["lengths"][:, None])
    assert found is not None
    assert torch.equal(found, spans(1, 3, of=3))
    with pytest.raises(ValueError, match="no leaf 'masks' in the batch; type 'mask'; leaves are: 'x'"):
        masks.find_mask(batch, "masks")
    with pytest.raises(TypeError, match=r"mask=… must be a function that returns a tensor, got .* returns list"):
        masks.find_mask(batch, lambda batch: [1, 1])  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("find", [masks.find_mask, masks.find_masks])
@pytest.mark.parametrize("mask", [["mask"], torch.ones(2, 3)], ids=["a list", "a tensor"])
def test_what_is_neither_a_leaf_nor_a_function_is_refused(find, mask):
    with pytest.raises(TypeError, match="a leaf of the batch, such as mask='mask', or a function of the batch, got"):
        find({"x": torch.zeros(2, 3), "mask": torch.ones(2, 3)}, mask)


def test_what_is_neither_masked_nor_nan_is_valid():
    x = torch.tensor([[1.0, torch.nan, torch.inf]])
    assert masks.valid_positions(x).tolist() == [[True, False, True]]
    assert masks.valid_positions(x, torch.tensor([[False, True, True]])).tolist() == [[False, False, True]]
    assert masks.valid_positions(torch.tensor([[1, 2]])).tolist() == [[True, True]]
    assert masks.valid_positions(torch.tensor([complex(0, torch.nan), 1j])).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("padding", [-11.5129, -3.0, 0.0])
def test_padding_is_found_at_the_end_of_each_series_in_any_precision(padding, dtype):
    x = torch.arange(1, 13, device=DEVICE).view(2, 6).to(dtype)
    x[0, 1] = x[0, 4:] = x[1, :] = torch.tensor(padding, dtype=dtype)  # a value within the series is no padding
    assert masks.before_padding(x, padding).tolist() == [[True] * 4 + [False] * 2, [False] * 6]
    assert torch.equal(masks.before_padding(x.T, padding, dim=0), masks.before_padding(x, padding).T)


def test_a_mask_of_padding_is_made_from_the_tensor():
    with pytest.raises(TypeError, match=r"got 'x'; type mask=lambda batch: masks.before_padding\(batch\['x'\]\)"):
        masks.before_padding("x")  # type: ignore[arg-type]


LENGTHS = torch.tensor([[2, 3, 1], [4, 0, 0], [0, 6, 0], [0, 0, 0]])
NUMBERS = torch.tensor([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, -4, -4], [2, 2, 2, 2, 2, 2], [-4, -4, -4, -4, -4, -4]])


def test_documents_are_lengths_or_position_ids():
    x = torch.zeros(4, 6, 2)
    masks.check_documents(LENGTHS, x)
    assert torch.equal(masks.number_documents(LENGTHS, x), NUMBERS)
    ids = masks.position_ids(NUMBERS)
    masks.check_documents(ids, x)
    assert torch.equal(masks.position_ids(masks.number_documents(ids, x)), ids)


def test_the_length_of_a_document_counts_its_valid_positions():
    lengths = masks.document_lengths(NUMBERS)
    assert lengths.tolist() == [[2, 2, 3, 3, 3, 1], [4, 4, 4, 4, 0, 0], [6] * 6, [0] * 6]
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 3] = mask[2, 0] = False
    assert masks.document_lengths(NUMBERS, mask).tolist() == [[2, 2, 2, 2, 2, 1], [4, 4, 4, 4, 0, 0], [5] * 6, [0] * 6]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.tensor([[1, 1, 1, 2, 2, 2]]), r"type documents=lambda batch: masks\.position_ids\(batch\[…\]\)"),
        (torch.tensor([[4, 5]]), "sum to at most 6 in each row, got sums from 9 to 9"),
        (torch.tensor([[4, -1]]), "must be at least 0"),
        (torch.tensor([0, 4, 6]), r"got int64 \(3,\) for float32 \(1, 6\); .*batch\[\"cu_seqlens\"\]\.diff\(\)\[None\]"),
        (torch.ones(1, 6), r"documents must be position ids of shape \(B, T\)"),
        (torch.ones(2, 6, dtype=torch.int64), r"documents must be position ids of shape \(B, T\)"),
    ],
)
def test_documents_that_do_not_fit_are_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        masks.check_documents(documents, torch.zeros(1, 6))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2)])
def test_packed_rows_are_taken_apart_and_put_together(shape):
    x = torch.arange(torch.Size(shape).numel(), device=DEVICE).view(shape)
    packing = masks.Packing.of(NUMBERS)
    documents = packing.unpack(x)
    assert documents.shape == (7, 6, *shape[2:])
    assert packing.rows.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert torch.equal(documents[1, :3], x[0, 2:5])
    assert not documents[1, 3:].any()
    assert torch.equal(packing.pack(documents, x), x)


@pytest.mark.parametrize(
    "member", [noise.Drift(dim=-2), noise.SNR(), noise.Scaling(dim=-2), noise.ColoredNoise(dim=-2)], ids=repr
)
def test_a_document_gets_the_noise_of_a_series_of_its_own(member, generator):
    n = 2000
    x = torch.ones(n, 9, 1, dtype=torch.float64)
    x[:, 4] = torch.nan
    numbers = masks.number_documents(torch.tensor([[3, 4]]).expand(n, 2), x)[..., None].clone()
    y = masks.in_documents(member)(x, 0.5, generator=generator, mask=numbers)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[:, 7:], x[:, 7:])
    for begin, end in ((0, 3), (3, 7)):
        error = (y - x)[:, begin:end, 0]
        error = error[~error.isnan()].view(n, 3)
        match member:
            case noise.Drift():  # five standard errors of a variance
                expected = 0.25 * torch.tensor([1 / 3, 2 / 3, 1], dtype=torch.float64)
                assert ((error.square().mean(0) / expected - 1).abs() <= 5 * (2 / n) ** 0.5).all()
            case noise.Scaling():
                torch.testing.assert_close(error, error[:, :1].expand(n, 3))
            case _:
                power = error.square().mean(1)
                torch.testing.assert_close(power, torch.full_like(power, 0.25), rtol=1e-9, atol=0)


def test_a_document_has_the_level_of_its_row(generator):
    x = torch.zeros(2, 6)
    numbers = masks.number_documents(torch.tensor([[2, 4], [3, 3]]), x)
    levels = torch.tensor([0.0, 1.0])
    y = masks.in_documents(noise.Drift())(x, levels, generator=generator, mask=numbers)
    assert torch.equal(y[0], x[0])
    assert y[1].all()
