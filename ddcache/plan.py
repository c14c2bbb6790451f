"""What stage one would take: rows, bytes, forward passes and time, before any of it is done."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ddcache.cache.layout import GroupRecord, group_of_teacher, shard_range
from ddcache.cache.writer import CacheWriter
from ddcache.extract import check_teacher, inspect_teacher, load_source, missing_shards, passes_of, rows_a_shard
from ddcache.teachers import Teacher, load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from ddcache.config import Pipeline, TeacherConfig
    from ddcache.extract import Pass
    from ddcache.sources import Rows, Source


@dataclass(frozen=True)
class TeacherPlan:
    """What extracting one teacher takes.

    Attributes:
        rows: tap -> rows of its array: samples, or entities where it is keyed by one.
        nbytes: tap -> bytes of its chunks, exact for raw chunks.
        files: number of chunk files.
        forward_passes: samples and entities that its passes run over.
        remaining: how many of these are not cached yet.
        seconds: expected time of what remains, from one timed batch a pass.
        seconds_per_epoch: expected time of running the teacher live for an epoch of the training rows.
    """

    rows: dict[str, int]
    nbytes: dict[str, int]
    files: int
    forward_passes: int
    remaining: int
    seconds: float
    seconds_per_epoch: float


@dataclass(frozen=True)
class Plan:
    """What `extract` would take.

    Attributes:
        teachers: teacher -> its part.
        free_bytes: free space of the disk that holds the cache.
        epochs: epochs a student is trained for.
    """

    teachers: dict[str, TeacherPlan]
    free_bytes: int
    epochs: int

    @property
    def nbytes(self) -> int:
        """Bytes of all taps."""
        return sum(sum(t.nbytes.values()) for t in self.teachers.values())

    @property
    def files(self) -> int:
        """Chunk files of all taps."""
        return sum(t.files for t in self.teachers.values())

    @property
    def seconds(self) -> float:
        """Expected time of what remains."""
        return sum(t.seconds for t in self.teachers.values())

    @property
    def seconds_per_student(self) -> float:
        """Expected time that live teachers would take while one student is trained."""
        return self.epochs * sum(t.seconds_per_epoch for t in self.teachers.values())

    @property
    def break_even(self) -> float:
        """Students after which extracting has cost less than running the teachers live."""
        return self.seconds / self.seconds_per_student if self.seconds_per_student else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the plan and its sums as JSON values."""
        names = ("nbytes", "files", "seconds", "seconds_per_student", "break_even")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def plan_extraction(pipeline: Pipeline, source: Source | None = None) -> Plan:
    """Tell what `extract` would do; runs two batches of each pass, writes nothing.

    Raises:
        ConfigError: as `extract`.
        StaleCacheError: as `extract`.
    """
    source = source or load_source(pipeline)
    writer = CacheWriter.read_only(pipeline.cache)
    teachers = {name: _plan_teacher(writer, source, name, config) for name, config in pipeline.teachers.items()}
    return Plan(teachers, _free_bytes(pipeline.cache), pipeline.train.epochs)


def _plan_teacher(writer: CacheWriter, source: Source, name: str, config: TeacherConfig) -> TeacherPlan:
    check_teacher(writer, name, config, inspect_teacher(name, config, source.samples))
    key = group_of_teacher(name)
    group = writer.group(key) or GroupRecord(state="partial", fingerprint={}, facts={}, arrays={})
    teacher = load_teacher(name, config)
    trained_on = source.samples.rows("train", "transfer", "calibration")
    rows, nbytes = {}, {}
    files = passes = remaining = 0
    seconds = seconds_per_epoch = 0.0
    for one in passes_of(config, source.samples):
        shapes, each = _time_batch(teacher, source, one)
        shard_rows = rows_a_shard(config, group, one, shapes)
        count = len(one.domain.representatives)
        shards = -(-count // shard_rows)
        for tap, shape in shapes.items():
            rows[tap] = count
            nbytes[tap] = shards * shard_rows * int(np.prod(shape)) * np.dtype(config.taps[tap].dtype).itemsize
        files += shards * len(one.taps)
        passes += count
        left = _remaining(writer, key, group, one)
        remaining += left
        seconds += left * each
        used = trained_on if one.domain.row_map is None else np.unique(one.domain.row_map[trained_on])
        seconds_per_epoch += len(used) * each
    return TeacherPlan(rows, nbytes, files, passes, remaining, seconds, seconds_per_epoch)


def _time_batch(teacher: Teacher, source: Source, one: Pass) -> tuple[dict[str, tuple[int, ...]], float]:
    """Return tap -> item shape, and the seconds a row of a batch takes once the first one has warmed up."""

    def run(rows: Rows) -> dict[str, tuple[int, ...]]:
        inputs = teacher.inputs(source.read(rows), one.domain.keyed_by)
        features = teacher.features(inputs, list(one.taps), len(rows))
        return {tap: (1, *value.shape[1:]) for tap, value in features.items()}

    batch = one.domain.representatives[: teacher.config.batch_size]
    shapes = run(batch)
    begun = time.perf_counter()
    run(batch)
    return shapes, (time.perf_counter() - begun) / len(batch)


def _remaining(writer: CacheWriter, key: str, group: GroupRecord, one: Pass) -> int:
    if any(tap not in group.arrays for tap in one.taps):
        return len(one.domain.representatives)
    record = group.arrays[one.taps[0]]
    ranges = (shard_range(record, shard) for shard in missing_shards(writer, key, group, one.taps))
    return sum(stop - start for start, stop in ranges)


def _free_bytes(path: Path) -> int:
    """Return the free space of the disk that holds a folder, or its nearest parent that exists."""
    folder = path.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
