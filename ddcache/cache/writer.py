"""Writing a cache: bytes first, then the record that vouches for them, `complete` last."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from ddcache.cache import ledger
from ddcache.cache.layout import (
    INPUTS,
    SAMPLES,
    ArrayRecord,
    GroupRecord,
    RootRecord,
    RowDomain,
    array_document,
    canonical_json,
    chunk_key,
    crc32c,
    group_document,
    parse_group,
    shard_count,
    shard_range,
)
from ddcache.cache.ledger import ShardRecord
from ddcache.cache.store import Store, open_store
from ddcache.errors import CacheError, StaleCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ddcache.cache.samples import Samples

_PLAIN_GROUP = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=1).encode()


@dataclass(frozen=True)
class ArraySpec:
    """An array to be: one item a row of its domain."""

    item_shape: tuple[int, ...]
    dtype: str
    shard_rows: int
    domain: RowDomain
    fingerprint: Mapping[str, Any]


class CacheWriter:
    """One process's right to write a cache; use `open_writer`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def read_only(cls, path: Path) -> CacheWriter:
        """Return a writer that is only asked what is there, without the lock."""
        return cls(open_store(path))

    def begin(self, samples: Samples, input_digests: Mapping[str, str]) -> None:
        """Write the sample table of a new cache, or check that an old one has these very samples.

        Raises:
            StaleCacheError: the cache holds other samples; the table of differences is in the message.
        """
        digests = {**samples.digests(), **{f"input.{n}": d for n, d in input_digests.items()}}
        if self.store.size("zarr.json") is not None:
            root: RootRecord = parse_group(self.store.get("zarr.json"), RootRecord, "zarr.json")
            cached = {"samples": root.samples, **root.digests}
            require_same(
                cached,
                {"samples": len(samples), **digests},
                f"the cache {self.store.name} holds other samples than the source gives",
                "give the changed source a cache of its own (field `cache`), or delete this one",
            )
            return
        sink = io.BytesIO()
        pq.write_table(samples.to_arrow(), sink, compression="zstd")
        table = sink.getvalue()
        self.store.put(SAMPLES, table)
        self.store.put("teachers/zarr.json", _PLAIN_GROUP)
        root = RootRecord(
            samples=len(samples), digests=digests, samples_crc32c=crc32c(table), versions=library_versions()
        )
        self.store.put("zarr.json", group_document(root))

    def group(self, key: str) -> GroupRecord | None:
        """Return the record of a group, None if there is none yet."""
        document = f"{key}/zarr.json"
        if self.store.size(document) is None:
            return None
        record: GroupRecord = parse_group(self.store.get(document), GroupRecord, document)
        return record

    def open_group(self, key: str, fingerprint: Mapping[str, Any], facts: Mapping[str, Any]) -> GroupRecord:
        """Return the record of a group, which is created if there is none; the caller has compared fingerprints."""
        record = self.group(key)
        if record is None:
            record = GroupRecord(state="partial", fingerprint=as_json(fingerprint), facts=as_json(facts), arrays={})
            self._put_group(key, record)
        return record

    def create_arrays(self, group: str, specs: Mapping[str, ArraySpec]) -> GroupRecord:
        """Add arrays to a group that doesn't have them, none of their rows committed yet; return its new record."""
        record = self.group(group)
        assert record is not None
        arrays = dict(record.arrays)
        for name, spec in specs.items():
            rows = len(spec.domain.representatives)
            document = array_document(rows, spec.item_shape, spec.dtype, spec.shard_rows)
            # What a killed run or a damaged record left under this name must not be taken for committed rows.
            self.store.delete(f"{group}/{name}")
            self.store.delete(ledger.ledger_key(group, name))
            self.store.delete(f"{ledger.ledger_key(group, name)}.parquet")
            if "/" in name:  # a row map: its folder is a group, so that zarr-python lists it
                self.store.put(f"{group}/{name.rpartition('/')[0]}/zarr.json", _PLAIN_GROUP)
            self.store.put(f"{group}/{name}/zarr.json", document)
            arrays[name] = ArrayRecord(
                item_shape=spec.item_shape,
                dtype=spec.dtype,
                rows=rows,
                shard_rows=spec.shard_rows,
                keyed_by=spec.domain.keyed_by,
                fingerprint=as_json(spec.fingerprint),
                metadata_crc32c=crc32c(document),
            )
        record = record.model_copy(update={"arrays": arrays, "state": "partial"})
        self._put_group(group, record)
        return record

    def committed(self, group: str, name: str, record: ArrayRecord) -> dict[int, ShardRecord]:
        """Return the committed shards of an array; one whose chunk is gone or cut short doesn't count."""
        return {
            shard: committed
            for shard, committed in ledger.read_records(self.store, group, name).items()
            if self.store.size(chunk_key(f"{group}/{name}", record, shard)) == committed.nbytes
        }

    def commit(self, group: str, name: str, record: ArrayRecord, shard: int, block: npt.NDArray[Any]) -> None:
        """Write the rows of one shard, then its ledger record.

        Args:
            group: key of the group.
            name: name of the array.
            record: the array's record.
            shard: number of the shard.
            block: (rows of the shard, *item_shape) in the array's dtype.
        """
        start, stop = shard_range(record, shard)
        assert block.shape == (stop - start, *record.item_shape), (block.shape, record)
        data = _chunk_bytes(block, record)
        self.store.put(chunk_key(f"{group}/{name}", record, shard), data)
        count, mean, variance = 0, np.empty(0), np.empty(0)
        if block.dtype.kind == "f" and group != INPUTS:
            count, mean, variance = ledger.shard_statistics(block)
        ledger.write_record(
            self.store,
            group,
            name,
            ShardRecord(
                shard=shard,
                start=start,
                stop=stop,
                nbytes=data.nbytes,
                # Of the rows alone: a last chunk that later gains rows still fits the record it has until then.
                crc32c=crc32c(data[: block.nbytes]),
                count=count,
                mean=tuple(mean.tolist()),
                variance=tuple(variance.tolist()),
            ),
        )

    def finish(self, group: str) -> None:
        """Mark a group complete.

        Raises:
            CacheError: a shard is missing; a defect of the caller.
        """
        record = self.group(group)
        assert record is not None
        for name, array in record.arrays.items():
            if missing := set(range(shard_count(array))) - set(self.committed(group, name, array)):
                raise CacheError(f"{group}/{name}: {len(missing)} shards are not committed; run extract again")
            ledger.compact(self.store, group, name)
        if record.state != "complete":
            self._put_group(group, record.model_copy(update={"state": "complete"}))

    def delete_group(self, key: str) -> None:
        """Remove a teacher with all of its features."""
        self.store.delete(key)

    def _put_group(self, key: str, record: GroupRecord) -> None:
        self.store.put(f"{key}/zarr.json", group_document(record))


@contextlib.contextmanager
def open_writer(path: Path) -> Iterator[CacheWriter]:
    """Open a cache for writing and keep other writers out until the block ends.

    Raises:
        CacheError: another process is writing it, or the folder can't be written.
    """
    store = open_store(path)
    with store.lock():
        yield CacheWriter(store)


def require_same(cached: Mapping[str, Any], now: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuse a stale record with a table of the fields that differ.

    Raises:
        StaleCacheError: some field differs.
    """
    differences = list(_differences(dict(cached), dict(now), ""))
    if not differences:
        return
    width = max(len(field) for field, _, _ in differences)
    lines = [f"  {field:<{width}}  cached: {_shorten(old)}  now: {_shorten(new)}" for field, old, new in differences]
    raise StaleCacheError(f"{what}:\n" + "\n".join(lines) + f"\n{remedy}")


def _differences(old: Any, new: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for field in sorted(old.keys() | new.keys()):
            path = f"{where}.{field}" if where else field
            yield from _differences(old.get(field, "(absent)"), new.get(field, "(absent)"), path)
    elif old != new:
        yield where, old, new


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:12]}…{text[-6:]}"


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a mapping looks like after a way through JSON, so that tuples and lists compare equal."""
    result: dict[str, Any] = json.loads(canonical_json(value))
    return result


def library_versions() -> dict[str, str]:
    """Return the versions that are recorded (never compared)."""
    return {"ddcache": metadata.version("ddcache"), "torch": torch.__version__, "zarr": metadata.version("zarr")}


def _chunk_bytes(block: npt.NDArray[Any], record: ArrayRecord) -> npt.NDArray[np.uint8]:
    """Return a chunk's bytes: C order, little-endian, the last chunk filled up with zeros as Zarr asks."""
    dtype = np.dtype(record.dtype).newbyteorder("<")
    if len(block) == record.shard_rows:
        chunk = np.ascontiguousarray(block, dtype=dtype)
    else:
        chunk = np.zeros((record.shard_rows, *record.item_shape), dtype=dtype)
        chunk[: len(block)] = block
    return chunk.reshape(-1).view(np.uint8)
