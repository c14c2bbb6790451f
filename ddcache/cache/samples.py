"""The sample table: which samples there are, in which order, and what is known of each.

It is the spine of a cache. Row `r` of every dense array belongs to row `r` of this table, so its digest is part
of what a cache is compared by.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ddcache.errors import CacheError, SourceError
from ddcache.names import parse_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SPLITS = ("train", "transfer", "calibration", "val", "test")
UNLABELLED = -1
"""The integer target of a sample without a label; a float target uses NaN. Parquet holds both as null."""

_RESERVED = ("row", "key", "split")
_ROLE = b"ddcache.role"


@dataclass(frozen=True)
class Samples:
    """One row a sample, in the order of the cache.

    Args:
        keys: (n,) int64 or str; stable and unique.
        splits: (n,) str, each one of `SPLITS`.
        targets: name -> (n,) float (NaN: unlabelled) or int64 (-1: unlabelled).
        entities: name -> (n,) int64 or str, for teachers that are keyed by an entity.

    Raises:
        SourceError: lengths differ, a key occurs twice, a split or a name is not allowed.
    """

    keys: npt.NDArray[Any]
    splits: npt.NDArray[np.str_]
    targets: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    entities: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normalise dtypes and refuse what could misalign rows later."""
        keys = _parse_column("keys", self.keys, allow_float=False)
        splits = np.asarray(self.splits, dtype=np.str_)
        targets = {n: _parse_column(f"target {n!r}", c, allow_float=True) for n, c in self.targets.items()}
        entities = {n: _parse_column(f"entity {n!r}", c, allow_float=False) for n, c in self.entities.items()}
        for name in (*targets, *entities):
            _parse_column_name(name)
        if both := sorted(targets.keys() & entities.keys()):
            raise SourceError(f"expected targets and entities to have different names, found {both} in both")
        for what, column in {"splits": splits, **targets, **entities}.items():
            if column.shape != keys.shape:
                raise SourceError(f"expected one value of {what} a key, {keys.shape}, found {column.shape}")
        unique, counts = np.unique(keys, return_counts=True)
        if len(unique) != len(keys):
            again = [k.item() for k in unique[counts > 1][:3]]
            raise SourceError(
                f"expected every key once, found {len(keys) - len(unique)} repeats, for example {again}; "
                f"keys tie features to samples, so make them unique"
            )
        if unknown := sorted(set(np.unique(splits).tolist()) - set(SPLITS)):
            raise SourceError(f"expected splits among {list(SPLITS)}, found {unknown}")
        for name, column in targets.items():
            if column.dtype.kind == "i" and column.size and column.min() < UNLABELLED:
                raise SourceError(
                    f"target {name!r}: expected integers from 0 ({UNLABELLED} where there is no label), "
                    f"found {column.min()}"
                )
        for name, value in (("keys", keys), ("splits", splits), ("targets", targets), ("entities", entities)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.keys)

    def rows(self, *splits: str) -> npt.NDArray[np.int64]:
        """Return the rows of these splits, ascending, (n,) int64."""
        return np.flatnonzero(np.isin(self.splits, splits)).astype(np.int64)

    def labelled_rows(self, split: str, target: str) -> npt.NDArray[np.int64]:
        """Return the rows of a split that have a label, ascending, (n,) int64."""
        rows = self.rows(split)
        return rows[is_labelled(self.targets[target][rows])]

    def take(self, rows: npt.NDArray[np.int64]) -> Samples:
        """Return the table of just these rows, in this order."""
        return Samples(
            keys=self.keys[rows],
            splits=self.splits[rows],
            targets={n: c[rows] for n, c in self.targets.items()},
            entities={n: c[rows] for n, c in self.entities.items()},
        )

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 for each column: `keys`, `splits`, `target.<name>`, `entity.<name>`."""
        columns = {"keys": self.keys, "splits": self.splits}
        columns |= {f"target.{n}": c for n, c in sorted(self.targets.items())}
        columns |= {f"entity.{n}": c for n, c in sorted(self.entities.items())}
        return {name: digest_array(column) for name, column in columns.items()}

    def to_arrow(self) -> pa.Table:
        """Return the table with columns row, key, split, then entities and targets (null: unlabelled)."""
        columns: list[tuple[str, pa.Array, bytes]] = [
            ("row", pa.array(np.arange(len(self), dtype=np.int64)), b"row"),
            ("key", pa.array(self.keys), b"key"),
            ("split", pa.array(self.splits.tolist(), pa.string()), b"split"),
        ]
        columns += [(name, pa.array(column), b"entity") for name, column in sorted(self.entities.items())]
        columns += [
            (name, pa.array(column, mask=~is_labelled(column)), b"target")
            for name, column in sorted(self.targets.items())
        ]
        schema = pa.schema([pa.field(name, array.type, metadata={_ROLE: role}) for name, array, role in columns])
        return pa.table([array for _, array, _ in columns], schema=schema)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Samples:
        """Read what `to_arrow` wrote; a table of another shape raises `CacheError`."""
        try:
            row = table.column("row").to_numpy()
            if not np.array_equal(row, np.arange(len(table))):
                raise CacheError("samples.parquet: expected column 'row' to count from 0, found another order")
            roles = {f.name: (f.metadata or {}).get(_ROLE, b"").decode() for f in table.schema}
            return cls(
                keys=_to_numpy(table.column("key")),
                splits=np.asarray(table.column("split").to_pylist(), dtype=np.str_),
                targets={n: _to_numpy(table.column(n)) for n, role in roles.items() if role == "target"},
                entities={n: _to_numpy(table.column(n)) for n, role in roles.items() if role == "entity"},
            )
        except (KeyError, pa.ArrowException, SourceError, UnicodeDecodeError) as error:
            raise CacheError(f"samples.parquet: {error}") from error


def is_labelled(target: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which samples have a label, (n,) bool: neither NaN nor `UNLABELLED`."""
    known: npt.NDArray[np.bool_] = ~np.isnan(target) if target.dtype.kind == "f" else target != UNLABELLED
    return known


def digest_array(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of an array's dtype, shape and values; strings count by their UTF-8 form."""
    sha = hashlib.sha256()
    if array.dtype.kind == "U":
        # The width of a numpy string dtype depends on the longest value, so hash values, each ended by a NUL.
        sha.update(f"str{array.shape}".encode())
        sha.update(b"".join(value.encode() + b"\0" for value in array.ravel().tolist()))
    else:
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        sha.update(f"{little.dtype.str}{little.shape}".encode())
        sha.update(little.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def _parse_column(what: str, values: Iterable[Any], *, allow_float: bool) -> npt.NDArray[Any]:
    column = np.asarray(values)
    if column.ndim != 1:
        raise SourceError(f"{what}: expected one value a sample, found an array of shape {column.shape}")
    if column.dtype.kind in "iu":
        return column.astype(np.int64)
    if column.dtype.kind == "U":
        return column
    if column.dtype.kind == "f" and allow_float:
        return column.astype(np.float64 if column.dtype.itemsize > 4 else np.float32)
    allowed = "integers, floats" if allow_float else "integers or strings"
    raise SourceError(f"{what}: expected {allowed}, found dtype {column.dtype}")


def _parse_column_name(name: str) -> None:
    try:
        parse_name(name)
    except ValueError as error:
        raise SourceError(f"column name: {error}") from error
    if name in _RESERVED:
        raise SourceError(f"column name: {name!r} is taken by ddcache; use another than {list(_RESERVED)}")


def _to_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return np.asarray(column.to_pylist(), dtype=np.str_)
    if pa.types.is_integer(column.type):
        return column.fill_null(UNLABELLED).to_numpy()  # type: ignore[no-any-return]
    return column.to_numpy()  # type: ignore[no-any-return]
