"""Stage one: run the frozen teachers over the source and commit their features shard by shard."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddcache.cache.layout import (
    INPUTS,
    RESERVED_TAPS,
    ArrayRecord,
    GroupRecord,
    RowDomain,
    choose_shard_rows,
    group_of_teacher,
    row_domain,
    shard_count,
    shard_range,
)
from ddcache.cache.writer import ArraySpec, CacheWriter, library_versions, open_writer, require_same
from ddcache.errors import ConfigError, SourceError, TeacherError
from ddcache.prefetch import prefetch
from ddcache.progress import Reporter, Silent
from ddcache.sources import Rows, Samples, Source, SubsetSource
from ddcache.teachers import ModelInputs, Teacher, call_factory, load_teacher, tap_fingerprint

if TYPE_CHECKING:
    from ddcache.config import Pipeline, TeacherConfig

PREFETCH = 2
"""Batches that are read and preprocessed ahead of the forward pass."""
PENDING_COMMITS = 4
"""Blocks, each a shard of one tap, that may wait for the disk."""


@dataclass
class ExtractReport:
    """What one call of `extract_features` did.

    Attributes:
        seconds: wall time.
        forward_passes: teacher -> samples (or entities) run through it now.
        shards_written: shards committed now, over all arrays.
        shards_kept: shards that were there already.
        nbytes: bytes written now.
    """

    seconds: float = 0.0
    forward_passes: dict[str, int] = field(default_factory=dict)
    shards_written: int = 0
    shards_kept: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Pass:
    """The taps of a teacher that share a row domain, and so one forward pass."""

    domain: RowDomain
    taps: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """What every step of one extraction works with."""

    writer: CacheWriter
    source: Source
    report: ExtractReport
    report_to: Reporter


def extract_features(
    pipeline: Pipeline, *, rebuild: Sequence[str] = (), source: Source | None = None, report_to: Reporter | None = None
) -> ExtractReport:
    """Make the cache of a pipeline complete: all of its teachers, over all samples.

    What is committed already is kept; only what is missing is computed.

    Args:
        pipeline: the checked pipeline file.
        rebuild: teachers whose cached features are thrown away first.
        source: the pipeline's source if it is loaded already.
        report_to: shows the progress.

    Raises:
        ConfigError: a factory, module name, entity column or name in `rebuild` is wrong; nothing was written.
        StaleCacheError: the cache was made from other samples, weights or settings; nothing was written.
        TeacherError: a teacher raised or gave values that can't be kept; what was committed before stays.
        CacheError: the cache can't be written, or another process is writing it.
    """
    begun = time.perf_counter()
    report = ExtractReport(forward_passes=dict.fromkeys(pipeline.teachers, 0))
    source = source or load_source(pipeline)
    if unknown := sorted(set(rebuild) - set(pipeline.teachers)):
        raise ConfigError(f"--rebuild: expected teachers among {list(pipeline.teachers)}, found {unknown}")
    # A look at every teacher before any work, so that a typo in the last one doesn't cost the first one's hours.
    # One at a time, since together they may not fit into memory.
    fingerprints = {name: inspect_teacher(name, config, source.samples) for name, config in pipeline.teachers.items()}
    with open_writer(pipeline.cache) as writer:
        writer.begin(source.samples, source.digests())
        for name, config in pipeline.teachers.items():
            if name not in rebuild:
                check_teacher(writer, name, config, fingerprints[name])
        for name in rebuild:  # only now: a refusal must leave everything as it was
            writer.delete_group(group_of_teacher(name))
        job = _Job(writer, source, report, report_to or Silent())
        _write_inputs(job)
        for name, config in pipeline.teachers.items():
            _extract_teacher(job, name, config, fingerprints[name])
    report.seconds = time.perf_counter() - begun
    return report


def load_source(pipeline: Pipeline) -> Source:
    """Call the source's factory.

    Raises:
        ConfigError: the factory does not exist or does not take its arguments.
        SourceError: it raised, or what it returned is no Source.
    """
    source = call_factory(pipeline.source, "source", SourceError)
    if not isinstance(getattr(source, "samples", None), Samples) or not callable(getattr(source, "read", None)):
        raise SourceError(f"source: expected {pipeline.source.factory} to return a Source, found {type(source)}")
    if pipeline.task.target not in source.samples.targets:
        raise ConfigError(
            f"task.target: the source has no target {pipeline.task.target!r}; it has {sorted(source.samples.targets)}"
        )
    result: Source = source
    return result


def prepare(pipeline: Pipeline, source: Source | None = None) -> None:
    """Call the pipeline's `prepare`, if it has one, with the source's train and transfer rows only."""
    if pipeline.prepare is None:
        return
    seen = SubsetSource(source or load_source(pipeline), "train", "transfer")
    call_factory(pipeline.prepare, "prepare", TeacherError, source=seen)


def inspect_teacher(name: str, config: TeacherConfig, samples: Samples) -> dict[str, Any]:
    """Load a teacher, check its taps and columns, and return its fingerprint and facts; no forward pass.

    Raises:
        ConfigError: something the pipeline file names does not exist.
    """
    for tap in config.taps:
        if tap in RESERVED_TAPS:
            raise ConfigError(f"teachers.{name}.taps.{tap}: this name is taken by the store; choose another")
        for column in config.key_of(tap):
            if column not in samples.entities:
                raise ConfigError(
                    f"teachers.{name}.taps.{tap}.keyed_by: the source has no entity column {column!r}; "
                    f"it has {sorted(samples.entities)}"
                )
    teacher = load_teacher(name, config)
    return {
        "fingerprint": teacher.fingerprint(),
        "facts": {"role": config.role, "parameters": teacher.parameters(), "versions": library_versions()},
    }


def check_teacher(writer: CacheWriter, name: str, config: TeacherConfig, found: dict[str, Any]) -> None:
    """Refuse cached features that this teacher and these taps would not give now.

    Raises:
        StaleCacheError: naming each field that differs.
    """
    group = writer.group(group_of_teacher(name))
    if group is None:
        return
    cached = {"teacher": group.fingerprint, "taps": {}}
    now: dict[str, Any] = {"teacher": found["fingerprint"], "taps": {}}
    for tap in config.taps:
        if tap in group.arrays:
            cached["taps"][tap] = group.arrays[tap].fingerprint
            now["taps"][tap] = tap_fingerprint(config, tap)
    require_same(
        cached,
        now,
        f"the cached features of teacher {name!r} in {writer.store.name} were made from something else",
        f"extract them anew with `ddcache extract --rebuild {name}`, or give this pipeline another cache",
    )


def passes_of(config: TeacherConfig, samples: Samples) -> list[Pass]:
    """Group the taps of a teacher by row domain."""
    keys = dict.fromkeys(config.key_of(tap) for tap in config.taps)
    return [Pass(row_domain(samples, key), tuple(t for t in config.taps if config.key_of(t) == key)) for key in keys]


def _extract_teacher(job: _Job, name: str, config: TeacherConfig, found: dict[str, Any]) -> None:
    """Commit what is missing of one teacher; load it only if something is."""
    key = group_of_teacher(name)
    group = job.writer.open_group(key, found["fingerprint"], found["facts"])
    passes = passes_of(config, job.source.samples)
    if all(not missing_shards(job.writer, key, group, p.taps, job.report) for p in passes):
        if group.state != "complete":
            job.writer.finish(key)
        return
    teacher = load_teacher(name, config)
    require_same(
        {"weights": found["fingerprint"]["weights"]},
        {"weights": teacher.fingerprint()["weights"]},
        f"teachers.{name}: its factory {config.factory} returned other weights the second time it was called",
        "load fixed weights there, or seed their initialisation",
    )
    for one in passes:
        group = _create_arrays(job, key, group, teacher, one)
        _run_pass(job, key, group, teacher, one)
    job.writer.finish(key)


def missing_shards(
    writer: CacheWriter, key: str, group: GroupRecord, taps: Sequence[str], report: ExtractReport | None = None
) -> dict[int, list[str]]:
    """Return shard -> taps that have no record of it; shard 0 where a tap has no array yet."""
    missing: dict[int, list[str]] = {}
    for tap in taps:
        if tap not in group.arrays:
            missing.setdefault(0, []).append(tap)
            continue
        committed = writer.committed(key, tap, group.arrays[tap])
        if report is not None:
            report.shards_kept += len(committed)
        for shard in range(shard_count(group.arrays[tap])):
            if shard not in committed:
                missing.setdefault(shard, []).append(tap)
    return dict(sorted(missing.items()))


def _create_arrays(job: _Job, key: str, group: GroupRecord, teacher: Teacher, one: Pass) -> GroupRecord:
    """Create the arrays of a pass that are not there; their shapes come from a forward pass of two samples."""
    if new := [tap for tap in one.taps if tap not in group.arrays]:
        rows = one.domain.representatives[:2]
        inputs = teacher.inputs(job.source.read(rows), one.domain.keyed_by)
        features = teacher.features(inputs, new, len(rows))
        job.report.forward_passes[teacher.name] += len(rows)
        shapes = {tap: (1, *value.shape[1:]) for tap, value in features.items()}
        shard_rows = rows_a_shard(teacher.config, group, one, shapes)
        specs = {
            tap: ArraySpec(
                shapes[tap],
                teacher.config.taps[tap].dtype,
                shard_rows,
                one.domain,
                tap_fingerprint(teacher.config, tap),
            )
            for tap in new
        }
        group = job.writer.create_arrays(key, specs)
    if one.domain.row_map is not None:
        group = _write_row_map(job.writer, key, group, one.domain.name, one.domain.row_map)
    return group


def rows_a_shard(config: TeacherConfig, group: GroupRecord, one: Pass, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return rows a shard, the same for all taps of a pass, so that a shard is one unit of work."""
    if present := [group.arrays[tap].shard_rows for tap in one.taps if tap in group.arrays]:
        return present[0]
    rows = len(one.domain.representatives)
    if config.shard_rows is not None:
        return min(config.shard_rows, rows)
    row_bytes = max(int(np.prod(shape)) * np.dtype(config.taps[tap].dtype).itemsize for tap, shape in shapes.items())
    return choose_shard_rows(rows, row_bytes, config.batch_size)


def _write_row_map(writer: CacheWriter, key: str, group: GroupRecord, domain: str, row_map: Rows) -> GroupRecord:
    name = f"rows/{domain}"
    if name not in group.arrays:
        every = RowDomain((), np.arange(len(row_map)), None)
        group = writer.create_arrays(key, {name: ArraySpec((), "int64", max(1, len(row_map)), every, {})})
    if not writer.committed(key, name, group.arrays[name]):
        writer.commit(key, name, group.arrays[name], 0, row_map)
    return group


def _run_pass(job: _Job, key: str, group: GroupRecord, teacher: Teacher, one: Pass) -> None:
    """Compute and commit every missing shard of a pass."""
    missing = missing_shards(job.writer, key, group, one.taps)
    any_record = group.arrays[one.taps[0]]
    todo = sum(stop - start for start, stop in (shard_range(any_record, shard) for shard in missing))
    what = f"{teacher.name} by {'+'.join(one.domain.keyed_by)}" if one.domain.keyed_by else teacher.name
    with job.report_to.track(what, todo) as advance, _background_commits(job, key) as commit:
        for shard, taps in missing.items():
            start, stop = shard_range(any_record, shard)
            blocks = _compute(teacher, job.source, one.domain, taps, group.arrays, start, stop, advance)
            job.report.forward_passes[teacher.name] += stop - start
            for tap, block in blocks.items():
                commit(tap, group.arrays[tap], shard, block)


def _compute(
    teacher: Teacher,
    source: Source,
    domain: RowDomain,
    taps: list[str],
    arrays: dict[str, ArrayRecord],
    start: int,
    stop: int,
    advance: Callable[[int], None],
) -> dict[str, npt.NDArray[Any]]:
    """Run the teacher over the rows [start, stop) of a domain and return tap -> (rows, *item_shape)."""
    blocks = {tap: np.empty((stop - start, *arrays[tap].item_shape), arrays[tap].dtype) for tap in taps}
    # Batches begin at the shard's first row, so a shard's bytes don't depend on where a run was interrupted.
    size = teacher.config.batch_size
    batches = [domain.representatives[at : min(at + size, stop)] for at in range(start, stop, size)]

    def read(rows: Rows) -> tuple[Rows, ModelInputs]:
        return rows, teacher.inputs(source.read(rows), domain.keyed_by)

    at = 0
    with contextlib.closing(prefetch(read, batches, PREFETCH)) as ready:
        for rows, inputs in ready:
            keys = source.samples.keys[rows]
            try:
                features = teacher.features(inputs, taps, len(rows))
            except TeacherError as error:
                raise TeacherError(f"{error} (samples {keys[0]!s} to {keys[-1]!s})") from error
            for tap, value in features.items():
                where = f"teachers.{teacher.name}.taps.{tap}"
                block = blocks[tap][at : at + len(rows), 0]
                if value.shape != block.shape:
                    raise TeacherError(
                        f"{where}: expected shape {block.shape} as in the first batch, found {tuple(value.shape)} at "
                        f"samples {keys[0]!s} to {keys[-1]!s}; pool outputs of varying length"
                    )
                encode(value, block, keys, where)
            at += len(rows)
            advance(len(rows))
    return blocks


def encode(value: Tensor, out: npt.NDArray[Any], keys: npt.NDArray[Any], where: str) -> None:
    """Convert a batch of features into the stored dtype.

    Args:
        value: (B, *feature), what the tap gave.
        out: (B, *feature) in the stored dtype, filled.
        keys: (B,) keys of the samples, for messages.
        where: the field that messages name.

    Raises:
        TeacherError: a value is NaN or infinite, or too large for float16.
    """
    torch.from_numpy(out).copy_(value)
    if np.isfinite(out).all():
        return
    bad = ~np.isfinite(out).reshape(len(out), -1).all(axis=1)
    sample = int(np.flatnonzero(bad)[0])
    largest = value[sample].float().abs().max().item()
    if np.isfinite(largest):
        raise TeacherError(
            f"{where}: a value of magnitude {largest:g} at sample {keys[sample]!s} does not fit {out.dtype}; "
            f"set dtype: float32 for this tap"
        )
    raise TeacherError(f"{where}: the teacher gave NaN or infinity at sample {keys[sample]!s}")


def _write_inputs(job: _Job) -> None:
    """Keep the student's inputs beside the features, so that training reads one store."""
    writer, source = job.writer, job.source
    group = writer.open_group(INPUTS, {}, {})
    rows = np.arange(len(source.samples), dtype=np.int64)
    if not group.arrays:
        first = source.read(rows[:1])
        row_bytes = max(tensor.nbytes for tensor in first.values())
        shard_rows = choose_shard_rows(len(rows), row_bytes, 1)
        domain = row_domain(source.samples, ())
        specs = {
            name: ArraySpec(tuple(tensor.shape[1:]), tensor.numpy().dtype.name, shard_rows, domain, {})
            for name, tensor in first.items()
        }
        group = writer.create_arrays(INPUTS, specs)
    missing = missing_shards(writer, INPUTS, group, list(group.arrays), job.report)
    any_record = next(iter(group.arrays.values()))
    with job.report_to.track("inputs", len(missing)) as advance, _background_commits(job, INPUTS) as commit:
        for shard, names in missing.items():
            start, stop = shard_range(any_record, shard)
            tensors = source.read(rows[start:stop])
            for name in names:
                commit(name, group.arrays[name], shard, tensors[name].numpy())
            advance(1)
    if missing or group.state != "complete":
        writer.finish(INPUTS)


Commit = Callable[[str, ArrayRecord, int, npt.NDArray[Any]], None]


@contextlib.contextmanager
def _background_commits(job: _Job, key: str) -> Iterator[Commit]:
    """Commit on another thread, so that the forward pass doesn't wait for the disk.

    At most `PENDING_COMMITS` blocks wait, which bounds the memory; leaving the block waits for all of them.
    """
    pending: deque[Future[None]] = deque()

    with ThreadPoolExecutor(1, thread_name_prefix="ddcache-commit") as pool:

        def commit(name: str, record: ArrayRecord, shard: int, block: npt.NDArray[Any]) -> None:
            while len(pending) >= PENDING_COMMITS:
                pending.popleft().result()
            pending.append(pool.submit(job.writer.commit, key, name, record, shard, block))
            job.report.shards_written += 1
            job.report.nbytes += block.nbytes

        yield commit
        while pending:
            pending.popleft().result()
