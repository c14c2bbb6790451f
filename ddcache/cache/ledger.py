"""The ledger: one immutable record a committed shard, written after the shard's bytes.

What has no record does not exist: a reader never serves it, and the next `extract` makes it.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from ddcache.cache.layout import canonical_json, crc32c
from ddcache.errors import CacheError

if TYPE_CHECKING:
    from ddcache.cache.store import Store

Floats = npt.NDArray[np.float64]


class ShardRecord(BaseModel):
    """A committed shard: its rows, the checksum of its chunk, and statistics of its values per channel.

    Attributes:
        shard: number of the shard.
        start: its first row.
        stop: the row after its last.
        nbytes: size of the chunk's file.
        crc32c: CRC-32C of the bytes of these rows, without what fills the last chunk up.
        nonfinite: how many values are NaN or infinite.
        count: values a channel that the statistics rest on.
        mean: mean per channel; empty where the array is no feature.
        variance: population variance per channel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: int
    start: int
    stop: int
    nbytes: int
    crc32c: str
    nonfinite: int = 0
    count: int = 0
    mean: tuple[float, ...] = ()
    variance: tuple[float, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """Mean and variance per channel, float64, over `count` values a channel."""

    count: int
    mean: Floats
    variance: Floats


_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("nbytes", pa.int64()),
        ("crc32c", pa.string()),
        ("nonfinite", pa.int64()),
        ("count", pa.int64()),
        ("mean", pa.list_(pa.float64())),
        ("variance", pa.list_(pa.float64())),
    ]
)


def ledger_key(group: str, array: str) -> str:
    """Return the folder of an array's records; the compacted form has `.parquet` after it."""
    return f"{group}/ledger/{array}"


def write_record(store: Store, group: str, array: str, record: ShardRecord) -> None:
    """Commit a shard whose bytes are on the disk already."""
    body = record.model_dump(mode="json")
    document = json.dumps({"crc32c": crc32c(canonical_json(body)), "record": body}, sort_keys=True)
    store.put(f"{ledger_key(group, array)}/{record.shard:08d}.json", document.encode())


def read_records(store: Store, group: str, array: str) -> dict[int, ShardRecord]:
    """Return the committed shards of an array by number.

    Raises:
        CacheError: a record is damaged.
    """
    key = ledger_key(group, array)
    records = _read_compacted(store, f"{key}.parquet") if store.size(f"{key}.parquet") is not None else {}
    for name in store.names(key):
        record = _parse_record(store.get(f"{key}/{name}"), f"{key}/{name}")
        records[record.shard] = record
    return records


def compact(store: Store, group: str, array: str) -> None:
    """Put all records of an array into one checksummed Parquet file, then remove the single ones."""
    key = ledger_key(group, array)
    if not store.names(key):
        return
    records = read_records(store, group, array)
    rows = [records[shard].model_dump() for shard in sorted(records)]
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    checksum = crc32c(canonical_json(rows))
    pq.write_table(table.replace_schema_metadata({"crc32c": checksum}), sink, compression="zstd")
    store.put(f"{key}.parquet", sink.getvalue())
    store.delete(key)


def shard_statistics(block: npt.NDArray[np.generic]) -> tuple[int, Floats, Floats]:
    """Return (count, mean, variance) per channel of a block of float rows (n, views, *feature).

    The channel axis is the last one, or the first feature axis of a map (C, H, W).
    """
    rows = block.reshape(-1, *block.shape[2:])
    axis = 1 if rows.ndim == 4 else rows.ndim - 1
    by_channel = np.moveaxis(rows, axis, -1).reshape(-1, rows.shape[axis]) if rows.ndim > 1 else rows[:, None]
    mean = by_channel.mean(axis=0, dtype=np.float64)
    # E[x²] - E[x]² cancels badly, but two passes over float64 copies of a whole shard would double its memory.
    variance = by_channel.var(axis=0, dtype=np.float64)
    return len(by_channel), mean, variance


def merge_statistics(records: dict[int, ShardRecord]) -> Statistics | None:
    """Combine the statistics of shards (Chan, Golub & LeVeque 1979); None where there are none."""
    parts = [records[s] for s in sorted(records) if records[s].count]
    if not parts:
        return None
    counts = np.array([p.count for p in parts], dtype=np.float64)[:, None]
    means = np.array([p.mean for p in parts])
    variances = np.array([p.variance for p in parts])
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return Statistics(int(total), mean, variance)


def _parse_record(document: bytes, where: str) -> ShardRecord:
    try:
        content = json.loads(document)
        body = content["record"]
        if content["crc32c"] != crc32c(canonical_json(body)):
            raise CacheError(f"{where}: the checksum of this ledger record does not fit: it is damaged")
        return ShardRecord.model_validate(body)
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise CacheError(f"{where}: not a ledger record: {type(error).__name__}") from error


def _read_compacted(store: Store, key: str) -> dict[int, ShardRecord]:
    try:
        table = pq.read_table(io.BytesIO(store.get(key)))
        rows = [ShardRecord.model_validate(row) for row in table.to_pylist()]
        checksum = (table.schema.metadata or {}).get(b"crc32c", b"").decode()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise CacheError(f"{key}: not a compacted ledger: {type(error).__name__}") from error
    if checksum != crc32c(canonical_json([row.model_dump() for row in rows])):
        raise CacheError(f"{key}: the checksum of this ledger does not fit: it is damaged")
    return {row.shard: row for row in rows}
