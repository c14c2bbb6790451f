"""Fetching rows of several arrays at once, as Dask tasks over memory-mapped chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from dask.base import compute
from dask.delayed import delayed
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from ddcache.cache.reader import Rows, StoredArray


@dataclass(frozen=True)
class Wanted:
    """The arrays that batches are made of.

    Attributes:
        inputs: name -> array.
        features: teacher -> tap -> array.
    """

    inputs: Mapping[str, StoredArray]
    features: Mapping[str, Mapping[str, StoredArray]]

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample over all arrays."""
        arrays = [*self.inputs.values(), *(a for taps in self.features.values() for a in taps.values())]
        return sum(array.row_bytes for array in arrays)


@dataclass(frozen=True)
class Block:
    """Rows of all wanted arrays, in the order asked for.

    Attributes:
        inputs: name -> (n, *item).
        features: teacher -> tap -> (n, *feature).
    """

    inputs: Mapping[str, Tensor]
    features: Mapping[str, Mapping[str, Tensor]]

    def narrow(self, start: int, length: int) -> Block:
        """Return a stretch of the block, without a copy."""
        return Block(
            {name: tensor[start : start + length] for name, tensor in self.inputs.items()},
            {
                teacher: {tap: tensor[start : start + length] for tap, tensor in taps.items()}
                for teacher, taps in self.features.items()
            },
        )


def gather(wanted: Wanted, samples: Rows, pool: ThreadPoolExecutor) -> Block:
    """Fetch some samples from every array: one Dask task an array, on the threads of `pool`.

    Raises:
        CacheError: a row is not cached or its chunk is damaged; names teacher, tap and rows.
    """
    arrays: list[StoredArray] = list(wanted.inputs.values())
    for taps in wanted.features.values():
        arrays += taps.values()
    fetch = delayed(fetch_rows, pure=False, traverse=False)
    results: Sequence[Any] = compute(
        *(fetch(array, samples) for array in arrays), scheduler="threads", pool=pool, optimize_graph=False
    )
    tensors = iter(results)
    inputs = {name: next(tensors) for name in wanted.inputs}
    # View 0 of each feature: (rows, views, *feature) -> (rows, *feature).
    features = {teacher: {tap: next(tensors)[:, 0] for tap in taps} for teacher, taps in wanted.features.items()}
    return Block(inputs, features)


def fetch_rows(array: StoredArray, samples: Rows) -> Tensor:
    """Return the items of an array for some samples, (n, *item_shape)."""
    out = np.empty((len(samples), *array.record.item_shape), dtype=np.dtype(array.record.dtype))
    array.gather(array.rows_of(samples), out)
    return torch.from_numpy(out)
