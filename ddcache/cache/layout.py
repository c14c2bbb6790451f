"""Store format 1: names, metadata documents, and the arithmetic of rows, shards and row domains.

    <cache>/zarr.json                       group; attributes.ddcache = RootRecord
    <cache>/samples.parquet                 the sample table
    <cache>/inputs/zarr.json                group; attributes.ddcache = GroupRecord
    <cache>/inputs/<name>/                  array (rows, *item)
    <cache>/teachers/<teacher>/zarr.json    group; attributes.ddcache = GroupRecord
    <cache>/teachers/<teacher>/<tap>/       array (rows of its domain, views, *feature)
    <cache>/teachers/<teacher>/rows/<key>/  array (samples,) int64: row of each sample in the taps keyed by <key>
    <group>/ledger/<array>/<shard>.json     ShardRecord; compacted to <group>/ledger/<array>.parquet

A shard is the chunk of `shard_rows` whole rows: the unit of work, of commit and of retry.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from pydantic import BaseModel, ConfigDict, ValidationError
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from ddcache.errors import CacheError, ConfigError
from ddcache.names import parse_name

if TYPE_CHECKING:
    from ddcache.cache.samples import Samples

FORMAT = 1
SHARD_BYTES = 64 * 2**20
SHARD_ROWS = 8192
"""At most so many rows a shard unless a batch is larger: what a kill costs is a shard's forward passes."""
SAMPLES = "samples.parquet"
INPUTS = "inputs"
RESERVED_TAPS = ("rows", "ledger", "zarr.json")

Rows = npt.NDArray[np.int64]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RootRecord(_Record):
    """What a whole cache depends on."""

    format: Literal[1] = 1
    samples: int
    digests: dict[str, str]
    samples_crc32c: str
    versions: dict[str, str]


class ArrayRecord(_Record):
    """What one array depends on, and how it is laid out."""

    item_shape: tuple[int, ...]
    dtype: str
    rows: int
    shard_rows: int
    keyed_by: tuple[str, ...]
    fingerprint: dict[str, Any]
    metadata_crc32c: str


class GroupRecord(_Record):
    """A teacher, or the inputs: what its arrays depend on and whether all of them are there."""

    state: Literal["partial", "complete"]
    fingerprint: dict[str, Any]
    facts: dict[str, Any]
    arrays: dict[str, ArrayRecord]


@dataclass(frozen=True)
class RowDomain:
    """Which rows an array has: one a sample, or one a distinct entity.

    Attributes:
        keyed_by: entity columns; () means one row a sample.
        representatives: (rows,) int64, a sample that stands for each row: the first that has the entity.
        row_map: (samples,) int64, the row of each sample; None where it is the identity.
    """

    keyed_by: tuple[str, ...]
    representatives: Rows
    row_map: Rows | None

    @property
    def name(self) -> str:
        """The name of the row map in the store."""
        return ".".join(self.keyed_by)


def row_domain(samples: Samples, keyed_by: tuple[str, ...]) -> RowDomain:
    """Number the distinct tuples of the entity columns in the order in which they first occur.

    That order keeps every row where it is when samples are appended.

    Raises:
        ConfigError: the source has no such entity column.
    """
    if not keyed_by:
        return RowDomain((), np.arange(len(samples), dtype=np.int64), None)
    codes = np.zeros(len(samples), dtype=np.int64)
    for column in keyed_by:
        if column not in samples.entities:
            raise ConfigError(
                f"keyed_by: the source has no entity column {column!r}; it has {sorted(samples.entities)}"
            )
        _, own = np.unique(samples.entities[column], return_inverse=True)
        # Renumber after each column, so that the product never overflows.
        _, codes = np.unique(codes * (own.max(initial=0) + 1) + own, return_inverse=True)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return RowDomain(keyed_by, first[order].astype(np.int64), rank[inverse].astype(np.int64))


def choose_shard_rows(rows: int, row_bytes: int, batch_size: int) -> int:
    """Return rows a shard: at most `SHARD_BYTES` and `SHARD_ROWS`, even over the shards, and whole batches."""
    most = max(1, min(SHARD_ROWS, SHARD_BYTES // max(row_bytes, 1)))
    shards = max(1, -(-rows // most))
    even = max(1, -(-rows // shards))
    return min(-(-even // batch_size) * batch_size, max(rows, 1))


def shard_count(record: ArrayRecord) -> int:
    """Return the number of shards of an array."""
    return -(-record.rows // record.shard_rows)


def shard_range(record: ArrayRecord, shard: int) -> tuple[int, int]:
    """Return the first row of a shard and the row after its last."""
    start = shard * record.shard_rows
    return start, min(start + record.shard_rows, record.rows)


def chunk_key(array: str, record: ArrayRecord, shard: int) -> str:
    """Return the key of a shard's chunk by the default chunk key encoding of Zarr v3."""
    return "/".join([array, "c", str(shard), *("0" for _ in record.item_shape)])


def group_of_teacher(teacher: str) -> str:
    """Return the key of a teacher's group."""
    return f"teachers/{parse_name(teacher)}"


def group_document(record: GroupRecord | RootRecord) -> bytes:
    """Return the `zarr.json` of a group that carries this record."""
    body = record.model_dump(mode="json")
    body["crc32c"] = crc32c(canonical_json(body))
    return json.dumps(
        {"zarr_format": 3, "node_type": "group", "attributes": {"ddcache": body}}, indent=1, sort_keys=True
    ).encode()


def array_document(rows: int, item_shape: tuple[int, ...], dtype: str, shard_rows: int) -> bytes:
    """Return the `zarr.json` of an uncompressed little-endian array, as zarr-python writes it."""
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=(rows, *item_shape),
        chunks=(shard_rows, *(max(1, n) for n in item_shape)),
        dtype=np.dtype(dtype).newbyteorder("<"),
        compressors=None,
        filters=None,
        fill_value=0,
    )
    document = sync(store.get("zarr.json", default_buffer_prototype()))
    assert document is not None
    return document.to_bytes()


def parse_group(document: bytes, model: type[GroupRecord] | type[RootRecord], where: str) -> Any:
    """Read the record in a group's `zarr.json`, which may be damaged or hostile.

    Raises:
        CacheError: it is no group of this format, or its checksum does not fit.
    """
    try:
        body = json.loads(document)["attributes"]["ddcache"]
        if body.get("format", FORMAT) != FORMAT:
            raise CacheError(
                f"{where}: expected store format {FORMAT}, found {body['format']}; it was written by another version "
                f"of ddcache, which can read it"
            )
        checksum = body.pop("crc32c", None)
        if checksum != crc32c(canonical_json(body)):
            raise CacheError(f"{where}: the checksum of its attributes does not fit: it is damaged or was edited")
        return model.model_validate_json(canonical_json(body))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise CacheError(f"{where}: not a ddcache group of format {FORMAT}: {type(error).__name__}") from error


def canonical_json(value: Any) -> bytes:
    """Return one fixed JSON form of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def crc32c(data: bytes | npt.NDArray[np.uint8]) -> str:
    """Return the CRC-32C (Castagnoli) of some bytes, 8 hexadecimal digits."""
    return f"{google_crc32c.value(data):08x}"
