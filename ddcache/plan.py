"""What stage one would take: rows, bytes, forward passes and time, before any of it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddcache.cache.layout import GroupRecord, group_of_teacher, shard_range
from ddcache.cache.writer import CacheWriter
from ddcache.config import Pipeline, TeacherConfig
from ddcache.extract import check_teacher, inspect_teacher, load_source, missing_shards, passes_of, rows_a_shard
from ddcache.sources import Source
from ddcache.teachers import load_teacher


@dataclass(frozen=True)
class TeacherPlan:
    """What extracting one teacher takes.

    Attributes:
        forward_passes: samples or entities that its passes run over, all of them.
        remaining: how many of these are not cached yet.
        nbytes: tap -> bytes of its chunks, exact for raw chunks.
        files: number of chunk files.
        seconds: expected time of what remains, from one timed batch a pass.
        seconds_per_epoch: expected time of its forward passes over one epoch of train, transfer and calibration
            rows with the live teacher.
    """

    forward_passes: int
    remaining: int
    nbytes: dict[str, int]
    files: int
    seconds: float
    seconds_per_epoch: float


def plan(pipeline: Pipeline, source: Source | None = None) -> dict[str, TeacherPlan]:
    """Tell what `extract` would do; runs one batch of each pass, writes nothing.

    Raises:
        ConfigError: as `extract`.
        StaleCacheError: as `extract`.
    """
    source = source or load_source(pipeline)
    plans = {}
    for name, config in pipeline.teachers.items():
        inspected = inspect_teacher(name, config, source.samples)
        plans[name] = _plan_teacher(pipeline, source, name, config, inspected)
    return plans


def _plan_teacher(
    pipeline: Pipeline, source: Source, name: str, config: TeacherConfig, inspected: dict[str, Any]
) -> TeacherPlan:
    writer = CacheWriter.read_only(pipeline.cache)
    key = group_of_teacher(name)
    check_teacher(writer, name, config, inspected)
    group = writer.group(key) or GroupRecord(state="partial", fingerprint={}, facts={}, arrays={})
    teacher = load_teacher(name, config)
    trained = len(source.samples.rows("train", "transfer", "calibration"))
    forward = remaining = files = 0
    nbytes: dict[str, int] = {}
    seconds = per_epoch = 0.0
    for one in passes_of(config, source.samples):
        rows = len(one.domain.representatives)
        batch = one.domain.representatives[: config.batch_size]
        begun = time.perf_counter()
        features = teacher.features(
            teacher.inputs(source.read(batch), one.domain.keyed_by), list(one.taps), len(batch)
        )
        each = (time.perf_counter() - begun) / len(batch)
        shapes = {tap: (1, *value.shape[1:]) for tap, value in features.items()}
        shard_rows = rows_a_shard(config, group, one, shapes)
        shards = -(-rows // shard_rows)
        if any(tap not in group.arrays for tap in one.taps):
            left = rows
        else:
            record = group.arrays[one.taps[0]]
            missing = missing_shards(writer, key, group, one.taps)
            left = sum(stop - start for start, stop in (shard_range(record, s) for s in missing))
        for tap, shape in shapes.items():
            nbytes[tap] = shards * shard_rows * int(np.prod(shape)) * np.dtype(config.taps[tap].dtype).itemsize
        forward, remaining, files = forward + rows, remaining + left, files + shards * len(one.taps)
        seconds += each * left
        per_epoch += each * (trained if one.domain.row_map is None else rows)
    return TeacherPlan(forward, remaining, nbytes, files, seconds, per_epoch)
