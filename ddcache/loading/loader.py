"""Batches of cached features, in a global order that a seed fixes, read ahead of the training loop."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddcache.cache.layout import INPUTS
from ddcache.cache.reader import Cache, Rows
from ddcache.cache.samples import SPLITS
from ddcache.errors import ConfigError
from ddcache.loading.gather import Block, Wanted, gather
from ddcache.loading.plan import EpochPlan, Shuffle, plan_epoch
from ddcache.prefetch import prefetch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SUPERBATCH_BYTES = 8 * 2**20
"""Batches are gathered together until they are about this large: a Dask task costs 0.1 to 0.5 ms."""
MOST_AHEAD = 8
"""Superbatches that are read ahead at most, however large `prefetch_bytes` is."""


@dataclass(frozen=True)
class Batch:
    """B samples.

    Attributes:
        rows: (B,) int64, rows of the sample table.
        keys: (B,) numpy array of the samples' keys.
        inputs: name -> (B, *item), the student's inputs.
        targets: name -> (B,) float32 (NaN: unlabelled) or int64 (-1: unlabelled).
        features: teacher -> tap -> (P, *feature) in the stored dtype, the P samples that the teacher has.
        present: teacher -> (B,) bool, which samples the teacher has.
        parts: split -> which samples of the batch are of it.
    """

    rows: Tensor
    keys: npt.NDArray[Any]
    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    features: Mapping[str, Mapping[str, Tensor]]
    present: Mapping[str, Tensor]
    parts: Mapping[str, slice]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def part(self, split: str) -> Batch:
        """Return the samples of one split.

        Raises:
            KeyError: the loader was not asked for this split.
        """
        where = self.parts[split]
        before = {t: int(mask[: where.start].sum()) for t, mask in self.present.items()}
        within = {t: int(mask[where].sum()) for t, mask in self.present.items()}
        return Batch(
            rows=self.rows[where],
            keys=self.keys[where],
            inputs={n: tensor[where] for n, tensor in self.inputs.items()},
            targets={n: tensor[where] for n, tensor in self.targets.items()},
            features={
                t: {tap: tensor[before[t] : before[t] + within[t]] for tap, tensor in taps.items()}
                for t, taps in self.features.items()
            },
            present={t: mask[where] for t, mask in self.present.items()},
            parts={split: slice(0, where.stop - where.start)},
        )

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> Batch:
        return replace(
            self,
            rows=function(self.rows),
            inputs={n: function(tensor) for n, tensor in self.inputs.items()},
            targets={n: function(tensor) for n, tensor in self.targets.items()},
            features={t: {n: function(x) for n, x in taps.items()} for t, taps in self.features.items()},
            present={t: function(mask) for t, mask in self.present.items()},
        )


class FeatureLoader:
    """Iterate over the batches of an epoch; each `for` loop over the loader is one epoch.

    The order is a function of (seed, epoch) alone: the same for any world size and any number of threads. A loop that
    ends moves on to the next epoch; `set_epoch` chooses one.

    Args:
        cache: an open cache, or its folder.
        batch_size: samples a batch and rank, where `split` is one name.
        split: a split, or a mapping split -> samples a batch. Each batch then has that many of each; the first one
            sets the length of the epoch and the others cycle, reshuffled each time.
        teachers: which teachers' features to read; None reads all in the cache.
        taps: teacher -> which of its taps to read; None, or a teacher that is not named, reads all.
        shuffle: `global` for one permutation of all rows, `none` for the order of the cache.
        seed: of the permutation.
        rank: this process among `world_size`.
        world_size: number of processes that share an epoch.
        drop_last: leave out the last batch if it is not full, and those that not every rank would have.
        prefetch_bytes: how much is read ahead; at least one superbatch (about 8 MiB, or one batch if larger).
        threads: threads that gather; None for one a processor.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        ConfigError: an argument is out of range or names something that is not there.
        CacheError: a teacher or tap is not in the cache.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        batch_size: int = 256,
        *,
        split: str | Mapping[str, int] = "train",
        teachers: Sequence[str] | None = None,
        taps: Mapping[str, Sequence[str]] | None = None,
        shuffle: Shuffle = "global",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        prefetch_bytes: int = 256 * 2**20,
        threads: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.cache = cache if isinstance(cache, Cache) else Cache.open(os.fspath(cache))
        self._sizes = {split: batch_size} if isinstance(split, str) else dict(split)
        self._rows = _rows_of_splits(self.cache, self._sizes)
        if shuffle not in ("global", "none"):
            raise ConfigError(f"shuffle: expected 'global' or 'none', found {shuffle!r}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: expected 0 to {world_size - 1} (world_size - 1), found {rank}")
        self.shuffle: Shuffle = shuffle
        self.seed, self.rank, self.world_size, self.drop_last = seed, rank, world_size, drop_last
        self.pin_memory = pin_memory
        self._threads = threads or os.cpu_count() or 1
        self._prefetch_bytes = prefetch_bytes
        self._wanted = _wanted_arrays(self.cache, teachers, taps)
        self._targets = {
            name: torch.from_numpy(column.astype(np.float32) if column.dtype.kind == "f" else column)
            for name, column in self.cache.samples.targets.items()
        }
        self.epoch = 0
        self._done = 0
        self._resume_at = 0

    def __len__(self) -> int:
        """Return the number of batches an epoch has for this rank."""
        return len(self._plan(0).of_rank(self.rank, self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next loop."""
        self.epoch, self._done, self._resume_at = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, after the batch that was yielded last."""
        return {
            "epoch": self.epoch,
            "batches_done": self._done,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "sizes": dict(self._sizes),
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which `state_dict` was called, in the next loop.

        Raises:
            ConfigError: the state is of a loader with another order.
        """
        own = self.state_dict()
        for name in ("seed", "shuffle", "sizes", "world_size"):
            if state[name] != own[name]:
                raise ConfigError(f"loader state: expected {name} {own[name]!r}, found {state[name]!r}")
        self.epoch, self._resume_at = state["epoch"], state["batches_done"]
        self._done = self._resume_at

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch; the next loop has the next epoch."""
        plan = self._plan(self.epoch)
        mine = list(plan.of_rank(self.rank, self.world_size))[self._resume_at :]
        self._done, self._resume_at = self._resume_at, 0
        batch_bytes = max(1, sum(self._sizes.values()) * self._wanted.row_bytes)
        together = max(1, min(SUPERBATCH_BYTES, self._prefetch_bytes) // batch_bytes)
        ahead = max(1, min(MOST_AHEAD, self._prefetch_bytes // (together * batch_bytes)))
        superbatches = [mine[at : at + together] for at in range(0, len(mine), together)]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="ddcache-gather") as pool:

            def read(indices: list[int]) -> list[Batch]:
                return self._superbatch(plan, indices, pool)

            with contextlib.closing(prefetch(read, superbatches, ahead)) as ready:
                for batches in ready:
                    for batch in batches:
                        self._done += 1
                        yield batch
        self.set_epoch(self.epoch + 1)

    def _plan(self, epoch: int) -> EpochPlan:
        return plan_epoch(
            self._rows,
            self._sizes,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            world_size=self.world_size,
            drop_last=self.drop_last,
        )

    def _superbatch(self, plan: EpochPlan, indices: list[int], pool: ThreadPoolExecutor) -> list[Batch]:
        parts = [plan.batch(index) for index in indices]
        rows = [np.concatenate(list(part.values())) for part in parts]
        block = gather(self._wanted, np.concatenate(rows), pool)
        batches, start = [], 0
        for part, own in zip(parts, rows, strict=True):
            batches.append(self._batch(part, own, block.narrow(start, len(own))))
            start += len(own)
        return batches

    def _batch(self, part: Mapping[str, Rows], rows: Rows, block: Block) -> Batch:
        index = torch.from_numpy(rows)
        ends = np.cumsum([len(r) for r in part.values()]).tolist()
        batch = Batch(
            rows=index,
            keys=self.cache.samples.keys[rows],
            inputs=block.inputs,
            targets={name: column[index] for name, column in self._targets.items()},
            features=block.features,
            present={teacher: torch.ones(len(rows), dtype=torch.bool) for teacher in block.features},
            parts={name: slice(end - len(part[name]), end) for name, end in zip(part, ends, strict=True)},
        )
        return batch.pin_memory() if self.pin_memory else batch


def _rows_of_splits(cache: Cache, sizes: Mapping[str, int]) -> dict[str, Rows]:
    rows = {}
    for name, size in sizes.items():
        if name not in SPLITS:
            raise ConfigError(f"split: expected one of {list(SPLITS)}, found {name!r}")
        if size < 1:
            raise ConfigError(f"split {name!r}: expected at least one sample a batch, found {size}")
        rows[name] = cache.samples.rows(name)
        if not len(rows[name]):
            raise ConfigError(f"split {name!r}: the cache {cache.path} has no sample of it")
    return rows


def _wanted_arrays(cache: Cache, teachers: Sequence[str] | None, taps: Mapping[str, Sequence[str]] | None) -> Wanted:
    taps = taps or {}
    names = list(cache.teachers) if teachers is None else list(teachers)
    if unknown := sorted(set(taps) - set(names)):
        raise ConfigError(f"taps: expected teachers among {names}, found {unknown}")
    features = {}
    for name in names:
        if name not in cache.teachers:
            raise ConfigError(f"teachers: the cache {cache.path} has {list(cache.teachers)}, not {name!r}")
        features[name] = {tap: cache.tap(name, tap) for tap in taps.get(name, cache.teachers[name].taps)}
    return Wanted({name: cache.array(INPUTS, name) for name in cache.inputs}, features)
