"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8, bundled with the library, so nothing is downloaded."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from ddcache import ArraySource, Samples, SourceError

UNLABELLED = -1


def digits(seed: int = 0, train: int = 300, transfer: int = 600, calibration: int = 100, val: int = 150) -> ArraySource:
    """Return the digits: few of them labelled for training, many more that only the teachers label.

    Args:
        seed: of the split; every split has the digits in about equal parts.
        train: samples with labels.
        transfer: samples whose labels are hidden.
        calibration: samples with labels that no teacher sees.
        val: samples that choose the checkpoint. The rest, 647 of 1,797, is `test`.

    Returns:
        input `image`, (1, 8, 8) float32 from 0 to 1; target `digit`, int64, -1 in `transfer`.

    Raises:
        SourceError: the sizes leave no test samples.
    """
    images, labels = load_digits(return_X_y=True)
    sizes = {"train": train, "transfer": transfer, "calibration": calibration, "val": val}
    if min(sizes.values()) < 0 or sum(sizes.values()) >= len(labels):
        raise SourceError(f"digits: expected sizes that leave test samples of {len(labels)}, found {sizes}")
    splits = np.full(len(labels), "test", dtype="<U11")
    order = _stratified_order(labels, np.random.default_rng(seed))
    begin = 0
    for split, size in sizes.items():
        splits[order[begin : begin + size]] = split
        begin += size
    return ArraySource(
        Samples(
            keys=np.array([f"digit-{number:04d}" for number in range(1, len(labels) + 1)]),
            splits=splits,
            targets={"digit": np.where(splits == "transfer", UNLABELLED, labels).astype(np.int64)},
        ),
        {"image": (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)},
    )


def _stratified_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return all rows in an order of which every stretch holds the labels in about equal parts."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(place, kind="stable")
