"""Sources: keyed samples with model inputs, targets, entity columns and splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddcache.cache.samples import SPLITS, UNLABELLED, Samples, digest_array, is_labelled
from ddcache.errors import SourceError
from ddcache.names import parse_name

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SPLITS", "UNLABELLED", "ArraySource", "Samples", "Source", "SubsetSource", "is_labelled"]

Rows = npt.NDArray[np.int64]


class Source(Protocol):
    """What a pipeline's `source` factory returns."""

    @property
    def samples(self) -> Samples:
        """The sample table, in the order of the cache."""

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """Return the model inputs of these rows: name -> (len(rows), ...) tensor on the CPU.

        Called from a background thread; the same rows must always give the same tensors.
        """

    def digests(self) -> dict[str, str]:
        """Return digests of the inputs by name, so that a cache of other inputs is refused.

        May be empty where reading everything is too dear; the sample table is always compared.
        """


class ArraySource:
    """A source whose inputs are arrays in memory (or memory-mapped).

    Args:
        samples: the sample table, n rows.
        inputs: name -> (n, ...) numpy array or tensor.

    Raises:
        SourceError: an input's first axis is not n long, or its name can't be a part of a path.
    """

    def __init__(self, samples: Samples, inputs: Mapping[str, npt.NDArray[Any] | Tensor]) -> None:
        self._samples = samples
        self._inputs: dict[str, Tensor] = {}
        for name, values in inputs.items():
            try:
                parse_name(name)
            except ValueError as error:
                raise SourceError(f"input name: {error}") from error
            tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
            if tensor.ndim == 0 or len(tensor) != len(samples):
                raise SourceError(
                    f"input {name!r}: expected {len(samples)} rows, one a sample, found shape {tuple(tensor.shape)}"
                )
            self._inputs[name] = tensor

    @property
    def samples(self) -> Samples:
        """The sample table."""
        return self._samples

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """Return copies of the inputs at these rows."""
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return {name: tensor.index_select(0, index) for name, tensor in self._inputs.items()}

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every input array."""
        return {name: digest_array(tensor.numpy()) for name, tensor in sorted(self._inputs.items())}


class SubsetSource:
    """The part of a source that belongs to some splits; `prepare` is handed one, so that it can't see the rest."""

    def __init__(self, source: Source, *splits: str) -> None:
        if unknown := sorted(set(splits) - set(SPLITS)):
            raise SourceError(f"expected splits among {list(SPLITS)}, found {unknown}")
        self._source = source
        self._rows = source.samples.rows(*splits)
        self._samples = source.samples.take(self._rows)

    @property
    def samples(self) -> Samples:
        """The sample table of these splits only, rows numbered from 0."""
        return self._samples

    def read(self, rows: Rows) -> dict[str, Tensor]:
        """Return the inputs at these rows of the subset."""
        return self._source.read(self._rows[rows])

    def digests(self) -> dict[str, str]:
        """Return the digests of the whole source's inputs."""
        return self._source.digests()
