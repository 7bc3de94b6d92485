"""Handwritten digits of 8 x 8 pixels, split at random for training, validation and test."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

__all__ = ["SIZES", "make_loaders"]

SIZES = {"train": 1097, "validation": 300, "test": 400}


def make_loaders(seed: int) -> dict[str, DataLoader]:
    """Returns a loader of each split, with pixels in [0, 1].

    Args:
        seed: The seed of the split.
    """
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    dataset = TensorDataset(pixels, torch.tensor(labels))
    splits = random_split(dataset, list(SIZES.values()), torch.Generator().manual_seed(seed))
    return {name: DataLoader(split, batch_size=64, shuffle=name == "train") for name, split in zip(SIZES, splits, strict=True)}
