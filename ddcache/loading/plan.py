"""Which rows each batch of an epoch has: a pure function of seed, epoch and rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping

Rows = npt.NDArray[np.int64]
Shuffle = Literal["global", "none"]


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one epoch, over all ranks.

    Attributes:
        orders: split -> rows in the order in which the epoch visits them. The first split is visited once; the
            others are as long as its batches need, each pass over them in a new order.
        sizes: split -> rows a batch.
        batches: number of batches of the epoch, over all ranks.
    """

    orders: Mapping[str, Rows]
    sizes: Mapping[str, int]
    batches: int

    def batch(self, index: int) -> dict[str, Rows]:
        """Return the rows of a batch by split; the last batch may have fewer rows of the first split."""
        return {name: self.orders[name][index * size : (index + 1) * size] for name, size in self.sizes.items()}

    def of_rank(self, rank: int, world_size: int) -> range:
        """Return the batches of a rank: every `world_size`-th, so that the ranks together give the global order."""
        return range(rank, self.batches, world_size)


def plan_epoch(
    rows: Mapping[str, Rows],
    sizes: Mapping[str, int],
    *,
    seed: int,
    epoch: int,
    shuffle: Shuffle = "global",
    world_size: int = 1,
    drop_last: bool = False,
) -> EpochPlan:
    """Plan an epoch.

    Args:
        rows: split -> its rows; the first one sets the length of the epoch.
        sizes: split -> rows a batch, in the same order.
        seed: with `epoch` and the split's position, seeds the permutation (PCG64).
        epoch: number of the epoch.
        shuffle: `global` permutes all rows of a split; `none` keeps their order.
        world_size: number of ranks; the order doesn't depend on it, only how many batches `drop_last` drops.
        drop_last: leave out the last batch if it is not full, and then those that not every rank would have.

    Returns:
        The plan; its memory is 8 bytes a row.
    """
    first, *others = sizes
    full, rest = divmod(len(rows[first]), sizes[first])
    batches = full + (1 if rest and not drop_last else 0)
    if drop_last:
        batches -= batches % world_size
    orders = {first: _order(rows[first], (seed, epoch, 0, 0), shuffle)}
    for position, name in enumerate(others, start=1):
        needed = batches * sizes[name]
        passes = -(-needed // len(rows[name])) if needed else 0
        orders[name] = np.concatenate(
            [np.empty(0, np.int64), *(_order(rows[name], (seed, epoch, position, n), shuffle) for n in range(passes))]
        )[:needed]
    return EpochPlan(orders, dict(sizes), batches)


def _order(rows: Rows, seed: tuple[int, ...], shuffle: Shuffle) -> Rows:
    return rows if shuffle == "none" else np.random.Generator(np.random.PCG64(seed)).permutation(rows)
