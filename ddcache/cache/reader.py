"""Reading a cache: committed rows only, every chunk's checksum compared before it is first served."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddcache.cache import ledger
from ddcache.cache.layout import (
    INPUTS,
    SAMPLES,
    ArrayRecord,
    GroupRecord,
    RootRecord,
    chunk_key,
    crc32c,
    group_of_teacher,
    parse_group,
    shard_count,
    shard_range,
)
from ddcache.cache.samples import Samples
from ddcache.cache.store import Store, open_store
from ddcache.errors import CacheError
from ddcache.names import parse_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ddcache.cache.ledger import ShardRecord, Statistics

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TeacherInfo:
    """What a cache knows of a teacher.

    Attributes:
        name: its name.
        role: `foundation` or `expert`.
        parameters: how many parameters its module has.
        taps: tap -> record of its array.
        output_tap: the tap that holds its answer to the task, if any.
        forward_passes: samples (or entities) that were run through it to fill the cache.
        nbytes: bytes of its committed features on the disk.
        complete: whether every row is there.
        fingerprint: what its features depend on.
    """

    name: str
    role: str
    parameters: int
    taps: Mapping[str, ArrayRecord]
    output_tap: str | None
    forward_passes: int
    nbytes: int
    complete: bool
    fingerprint: Mapping[str, Any]


@dataclass
class StoredArray:
    """An array of a cache: the record that describes it and the chunks that are committed."""

    store: Store
    group: str
    name: str
    record: ArrayRecord
    shards: Mapping[int, ShardRecord]
    row_map: Rows | None
    _maps: dict[int, npt.NDArray[Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> str:
        """Where the array lies in the store."""
        return f"{self.group}/{self.name}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.record.item_shape, dtype=np.int64)) * np.dtype(self.record.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the committed chunks."""
        return sum(shard.nbytes for shard in self.shards.values())

    def rows_of(self, samples: Rows) -> Rows:
        """Return the rows of this array that hold these samples."""
        return samples if self.row_map is None else self.row_map[samples]

    def available(self) -> npt.NDArray[np.bool_]:
        """Return which rows of the array are committed, (rows,) bool."""
        mask = np.zeros(self.record.rows, dtype=bool)
        for shard in self.shards:
            start, stop = shard_range(self.record, shard)
            mask[start:stop] = True
        return mask

    def gather(self, rows: Rows, out: npt.NDArray[Any]) -> None:
        """Copy rows of the array, in any order, into `out`, (len(rows), *item_shape) of the array's dtype.

        Raises:
            CacheError: a row is not committed, or a chunk is damaged.
        """
        shard_of_row = rows // self.record.shard_rows
        local = rows - shard_of_row * self.record.shard_rows
        if len(rows) and shard_of_row[0] == shard_of_row[-1] and (shard_of_row == shard_of_row[0]).all():
            np.take(self.chunk(int(shard_of_row[0])), local, axis=0, out=out, mode="clip")
            return
        order = np.argsort(shard_of_row, kind="stable")
        shards, starts = np.unique(shard_of_row[order], return_index=True)
        for shard, where in zip(shards.tolist(), np.split(order, starts[1:]), strict=True):
            out[where] = self.chunk(shard)[local[where]]

    def chunk(self, shard: int) -> npt.NDArray[Any]:
        """Return a committed chunk as a read-only memory map, its checksum compared on first use in this process.

        Raises:
            CacheError: it is not committed, missing, truncated, or its bytes are not those that were written.
        """
        with self._lock:
            if shard not in self._maps:
                self._maps[shard] = self._open_chunk(shard)
            return self._maps[shard]

    def _open_chunk(self, shard: int) -> npt.NDArray[Any]:
        start, stop = shard_range(self.record, shard)
        where = f"{self.key} rows {start} to {stop - 1}"
        if shard not in self.shards:
            raise CacheError(f"{where} of the cache {self.store.name} are not cached yet; run ddcache extract")
        try:
            data = self.store.open(chunk_key(self.key, self.record, shard))
        except CacheError as error:
            raise CacheError(f"{where}: {error}") from error
        expected = self.shards[shard]
        if data.nbytes != expected.nbytes or crc32c(data[: (stop - start) * self.row_bytes]) != expected.crc32c:
            key = chunk_key(self.key, self.record, shard)
            raise CacheError(
                f"{where}: the chunk is damaged: its checksum is not the one in the ledger; remove {key} from "
                f"{self.store.name} and run ddcache extract"
            )
        dtype = np.dtype(self.record.dtype).newbyteorder("<")
        return np.asarray(data).view(dtype).reshape(self.record.shard_rows, *self.record.item_shape)


class Cache:
    """A cache that is open for reading; use `Cache.open`.

    Attributes:
        path: its folder.
        samples: the sample table.
        teachers: teacher -> what the cache knows of it.
        inputs: names of the student inputs that it holds.
    """

    def __init__(self, store: Store, samples: Samples, root: RootRecord) -> None:
        self.store = store
        self.path = Path(store.name)
        self.samples = samples
        self.root = root
        self._arrays: dict[tuple[str, str], StoredArray] = {}

    @classmethod
    def open(cls, path: str | Path) -> Cache:
        """Open a cache.

        Raises:
            CacheError: there is none, or its sample table is damaged.
        """
        store = open_store(path)
        if store.size("zarr.json") is None:
            raise CacheError(f"there is no cache at {path}; make one with ddcache extract")
        root: RootRecord = parse_group(store.get("zarr.json"), RootRecord, f"{path}/zarr.json")
        table = store.get(SAMPLES)
        if crc32c(table) != root.samples_crc32c:
            raise CacheError(f"{path}/{SAMPLES}: its checksum is not the one in zarr.json: it is damaged")
        try:
            samples = Samples.from_arrow(pq.read_table(io.BytesIO(table)))
        except pa.ArrowException as error:
            raise CacheError(f"{path}/{SAMPLES}: {error}") from error
        if len(samples) != root.samples:
            raise CacheError(f"{path}/{SAMPLES}: expected {root.samples} samples, found {len(samples)}")
        return cls(store, samples, root)

    @cached_property
    def teachers(self) -> Mapping[str, TeacherInfo]:
        """Every teacher in the cache, complete or not."""
        names = [
            n for n in self.store.folders("teachers") if self.store.size(f"{group_of_teacher(n)}/zarr.json") is not None
        ]
        return {name: self._teacher_info(name) for name in names}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of the cached student inputs."""
        return tuple(sorted(self._group(INPUTS).arrays)) if self.store.size(f"{INPUTS}/zarr.json") is not None else ()

    def array(self, group: str, name: str) -> StoredArray:
        """Return the array `name` of a group (`inputs` or `teachers/<teacher>`).

        Raises:
            CacheError: there is none; those that are there are named.
        """
        if (group, name) not in self._arrays:
            self._arrays[group, name] = self._open_array(group, name)
        return self._arrays[group, name]

    def tap(self, teacher: str, tap: str) -> StoredArray:
        """Return the array of a teacher's tap.

        Raises:
            CacheError: there is none; those that are there are named.
        """
        if teacher not in self.teachers:
            raise CacheError(
                f"the cache {self.path} has no teacher {teacher!r}; it has {list(self.teachers)}; "
                f"run ddcache extract with a pipeline file that names it"
            )
        return self.array(group_of_teacher(teacher), parse_name(tap))

    def read(self, teacher: str, tap: str, rows: Rows) -> Tensor:
        """Return the features of some samples, view 0, as (len(rows), *feature) in the stored dtype.

        Raises:
            CacheError: a row is not cached, or its chunk is damaged.
        """
        return self._read(self.tap(teacher, tap), rows)[:, 0]

    def read_inputs(self, rows: Rows) -> dict[str, Tensor]:
        """Return the student's inputs of some samples: name -> (len(rows), *item)."""
        return {name: self._read(self.array(INPUTS, name), rows) for name in self.inputs}

    def statistics(self, teacher: str, tap: str) -> Statistics | None:
        """Return mean and variance per channel of a tap over all committed rows; None before the first."""
        return ledger.merge_statistics(dict(self.tap(teacher, tap).shards))

    def require(self, teachers: Mapping[str, Any]) -> None:
        """Check that these teachers are complete.

        Raises:
            CacheError: one is missing or partial.
        """
        for name in teachers:
            if name not in self.teachers or not self.teachers[name].complete:
                state = "only partly cached" if name in self.teachers else "not cached"
                raise CacheError(f"teacher {name!r} is {state} in {self.path}; run ddcache extract")
        if not self.inputs or self._group(INPUTS).state != "complete":
            raise CacheError(f"the inputs are only partly cached in {self.path}; run ddcache extract")

    def info(self) -> dict[str, Any]:
        """Return a summary of JSON values: samples per split, inputs, and per teacher its taps, sizes and state."""
        splits, counts = np.unique(self.samples.splits, return_counts=True)
        return {
            "path": str(self.path),
            "format": self.root.format,
            "samples": len(self.samples),
            "splits": dict(zip(splits.tolist(), counts.tolist(), strict=True)),
            "versions": self.root.versions,
            "inputs": {name: _describe(self.array(INPUTS, name)) for name in self.inputs},
            "teachers": {
                name: {
                    "role": info.role,
                    "complete": info.complete,
                    "parameters": info.parameters,
                    "forward_passes": info.forward_passes,
                    "nbytes": info.nbytes,
                    "weights": info.fingerprint.get("weights"),
                    "taps": {tap: _describe(self.tap(name, tap)) for tap in info.taps},
                }
                for name, info in self.teachers.items()
            },
        }

    def _group(self, key: str) -> GroupRecord:
        record: GroupRecord = parse_group(
            self.store.get(f"{key}/zarr.json"), GroupRecord, f"{self.path}/{key}/zarr.json"
        )
        return record

    def _teacher_info(self, name: str) -> TeacherInfo:
        try:
            group = self._group(group_of_teacher(name))
            taps = {n: record for n, record in group.arrays.items() if "/" not in n}
            domains = {record.keyed_by: record.rows for record in taps.values()}
            return TeacherInfo(
                name=name,
                role=str(group.facts["role"]),
                parameters=int(group.facts["parameters"]),
                taps=taps,
                output_tap=next((n for n, r in taps.items() if r.fingerprint.get("kind") == "output"), None),
                forward_passes=sum(domains.values()),
                nbytes=sum(self.array(group_of_teacher(name), n).nbytes for n in group.arrays),
                complete=group.state == "complete",
                fingerprint=group.fingerprint,
            )
        except (KeyError, ValueError, TypeError) as error:
            raise CacheError(f"teacher {name!r} of {self.path}: damaged attributes ({error!r})") from error

    def _open_array(self, group: str, name: str) -> StoredArray:
        arrays = self._group(group).arrays
        if name not in arrays:
            raise CacheError(f"the cache {self.path} has no array {name!r} in {group}; it has {sorted(arrays)}")
        record = arrays[name]
        for part in (*name.split("/"), *record.keyed_by):
            try:
                parse_name(part)
            except ValueError as error:
                raise CacheError(f"{self.path}/{group}: {error}") from error
        if crc32c(self.store.get(f"{group}/{name}/zarr.json")) != record.metadata_crc32c:
            raise CacheError(f"{self.path}/{group}/{name}/zarr.json is damaged or was edited: another checksum")
        row_map = None
        if record.keyed_by:
            stored = self._open_row_map(group, ".".join(record.keyed_by))
            row_map = np.empty(stored.record.rows, dtype=np.int64)
            stored.gather(np.arange(stored.record.rows), row_map)
            if row_map.shape != (len(self.samples),) or row_map.min() < 0 or row_map.max() >= record.rows:
                raise CacheError(f"{self.path}/{group}/{name}: its row map points outside of it")
        elif record.rows != len(self.samples):
            raise CacheError(
                f"{self.path}/{group}/{name}: expected {len(self.samples)} rows, one a sample, found {record.rows}"
            )
        shards = ledger.read_records(self.store, group, name)
        if extra := [s for s in shards if not 0 <= s < shard_count(record)]:
            raise CacheError(f"{self.path}/{group}/{name}: the ledger names shards {extra[:3]} that can't be")
        return StoredArray(self.store, group, name, record, shards, row_map)

    def _open_row_map(self, group: str, domain: str) -> StoredArray:
        name = f"rows/{domain}"
        arrays = self._group(group).arrays
        if name not in arrays:
            raise CacheError(f"{self.path}/{group}: the row map {name} is missing")
        return StoredArray(
            self.store, group, name, arrays[name], ledger.read_records(self.store, group, name), row_map=None
        )

    @staticmethod
    def _read(array: StoredArray, rows: Rows) -> Tensor:
        rows = array.rows_of(np.asarray(rows, dtype=np.int64))
        if len(rows) and not (rows.min() >= 0 and rows.max() < array.record.rows):
            raise IndexError(f"{array.key}: expected rows from 0 to {array.record.rows - 1}, found {rows.max()}")
        out = np.empty((len(rows), *array.record.item_shape), dtype=np.dtype(array.record.dtype))
        array.gather(rows, out)
        return torch.from_numpy(out)


def _describe(array: StoredArray) -> dict[str, Any]:
    return {
        "shape": [array.record.rows, *array.record.item_shape],
        "dtype": array.record.dtype,
        "keyed_by": list(array.record.keyed_by),
        "shards": f"{len(array.shards)}/{shard_count(array.record)}",
        "nbytes": array.nbytes,
    }
