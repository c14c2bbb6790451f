"""Scores every exported student and every teacher on the same test rows, without a forward pass of a teacher.

Students are scored by what training exported, teachers by their cached outputs.

Shape legend: n test rows, S seeds.
"""

from __future__ import annotations

import io
import json
import statistics as python_statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError

from ddcache.cache.reader import Cache
from ddcache.cache.samples import SPLITS
from ddcache.errors import ConfigError, TrainError
from ddcache.files import write_whole
from ddcache.statistics import (
    METRICS,
    RESAMPLES,
    Floats,
    Gap,
    metric_of_scores,
    per_sample_scores,
    recovered_gaps,
)
from ddcache.students import load_exported, predict
from ddcache.train import finished_runs, run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt
    from torch import Tensor, nn

    from ddcache.config import Pipeline
    from ddcache.train import RunRecord

ALONE = "none"
LATENCY_BATCH = 256
LATENCY_REPEATS = 30


@dataclass(frozen=True)
class TeacherScore:
    """A teacher on the test rows, by its cached output.

    Attributes:
        name: its name.
        role: `foundation` or `expert`.
        score: the task's metric; None for a teacher without an output tap.
        parameters: how many it has.
        forward_passes: samples (or entities) that were run through it to fill the cache, once for all students.
        nbytes: bytes of its cached features.
    """

    name: str
    role: str
    score: float | None
    parameters: int
    forward_passes: int
    nbytes: int


@dataclass(frozen=True)
class RunScore:
    """One exported student on the test rows.

    Attributes:
        seed: its seed.
        score: the task's metric on the test rows.
        val: on the validation rows, at the epoch that was kept.
        best_epoch: that epoch, from 1.
        epochs: how many there were.
        seconds: of training.
    """

    seed: int
    score: float
    val: float
    best_epoch: int
    epochs: int
    seconds: float


@dataclass(frozen=True)
class MethodScore:
    """A student trained by one method, over all seeds.

    Attributes:
        student: its name.
        method: its name; `none` is the student alone.
        seeds: the seeds.
        scores: the metric on the test rows, one a seed.
        mean: of the scores.
        std: their standard deviation (n - 1); None for a single seed.
        gap_best: the gap recovered against the best teacher.
        gap_foundation: the gap recovered against the foundation teacher; None where there is none.
        parameters: of the exported student.
        compression: parameters of the foundation teacher (the largest one if there is none) over the student's.
        latency_ms: median time of a forward pass of one batch of 256 on the CPU; measured once a student, because
            methods leave students of the same shape.
        gate: teacher -> mean weight of the gate on the validation rows, over seeds; None where the method has none.
        runs: the single runs.
    """

    student: str
    method: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    mean: float
    std: float | None
    gap_best: Gap
    gap_foundation: Gap | None
    parameters: int
    compression: float
    latency_ms: float
    gate: dict[str, float] | None
    runs: tuple[RunScore, ...]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_students` found.

    Attributes:
        pipeline: its name.
        task: `regression` or `classification`.
        target: the target that is predicted.
        metric: a key of `ddcache.statistics.METRICS`.
        higher_is_better: whether more of it is better.
        samples: labelled test rows that everything was scored on.
        splits: split -> samples in the cache.
        teachers: in the pipeline's order.
        students: one entry a student and method, in the pipeline's order.
        best_teacher: the teacher with the best test score; None if no teacher has an output.
        foundation: the foundation teacher, if any.
        resamples: of the bootstrap.
        threads: that torch used for the latencies.
        saved_passes: forward passes of teachers that the runs would have needed at least, with live teachers: each
            epoch each labelled training row through each teacher that the method asks.
    """

    pipeline: str
    task: str
    target: str
    metric: str
    higher_is_better: bool
    samples: int
    splits: Mapping[str, int]
    teachers: tuple[TeacherScore, ...]
    students: tuple[MethodScore, ...]
    best_teacher: str | None
    foundation: str | None
    resamples: int
    threads: int
    saved_passes: int

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def evaluate_students(pipeline: Pipeline) -> Evaluation:
    """Score all students and teachers of a pipeline; write `evaluation.json` and `evaluation.parquet` to its runs.

    Raises:
        CacheError: the cache is missing or partial.
        ConfigError: there are no labelled test rows, or outputs don't fit the task.
        TrainError: a run is missing or damaged; the first one is named.
    """
    cache = Cache.open(pipeline.cache)
    cache.require(pipeline.teachers)
    runs = finished_runs(pipeline, cache)
    rows, targets = _test_rows(pipeline, cache)
    teacher_scores = _score_teachers(pipeline, cache, rows, targets)
    teachers = _describe_teachers(pipeline, cache, teacher_scores)
    inputs = cache.read_inputs(rows)
    students = [
        score
        for student in pipeline.students
        for score in _score_student(pipeline, student, runs, inputs, targets, teachers, teacher_scores)
    ]
    evaluation = Evaluation(
        pipeline=pipeline.name,
        task=pipeline.task.kind,
        target=pipeline.task.target,
        metric=pipeline.task.metric,
        higher_is_better=METRICS[pipeline.task.metric].higher_is_better,
        samples=len(rows),
        splits={split: n for split in SPLITS if (n := len(cache.samples.rows(split)))},
        teachers=teachers,
        students=tuple(students),
        best_teacher=_best(pipeline.task.metric, teachers),
        foundation=pipeline.foundation,
        resamples=RESAMPLES,
        threads=torch.get_num_threads(),
        saved_passes=_saved_passes(pipeline, cache, runs),
    )
    _write(evaluation, pipeline.runs)
    return evaluation


def _test_rows(pipeline: Pipeline, cache: Cache) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    target = pipeline.task.target
    if target not in cache.samples.targets:
        raise ConfigError(f"task.target: the source has no target {target!r}; it has {sorted(cache.samples.targets)}")
    rows = cache.samples.labelled_rows("test", target)
    if not len(rows):
        raise ConfigError("the source has no labelled 'test' rows; students and teachers are scored on them")
    return rows, cache.samples.targets[target][rows]


def _score_teachers(
    pipeline: Pipeline, cache: Cache, rows: npt.NDArray[np.int64], targets: npt.NDArray[Any]
) -> dict[str, Floats]:
    """Return teacher -> per-sample scores, (n,), of the teachers that have an output."""
    scores = {}
    for name in pipeline.teachers:
        tap = cache.teachers[name].output_tap
        if tap is not None:
            outputs = cache.read(name, tap, rows).float().numpy()
            scores[name] = _score(pipeline, outputs, targets, f"teachers.{name}.taps.{tap}")
    return scores


def _describe_teachers(pipeline: Pipeline, cache: Cache, scores: Mapping[str, Floats]) -> tuple[TeacherScore, ...]:
    found = []
    for name in pipeline.teachers:
        info = cache.teachers[name]
        score = float(metric_of_scores(pipeline.task.metric, scores[name])) if name in scores else None
        found.append(TeacherScore(name, info.role, score, info.parameters, info.forward_passes, info.nbytes))
    return tuple(found)


def _score_student(
    pipeline: Pipeline,
    student: str,
    runs: Mapping[tuple[str, str, int], RunRecord],
    inputs: Mapping[str, Tensor],
    targets: npt.NDArray[Any],
    teachers: tuple[TeacherScore, ...],
    teacher_scores: Mapping[str, Floats],
) -> list[MethodScore]:
    """Score one student by all methods and seeds."""
    seeds = pipeline.train.seeds
    scores_nS: dict[str, Floats] = {}
    latency_ms = None
    for method in pipeline.methods:
        columns = []
        for seed in seeds:
            module = _load(pipeline, student, run_folder(pipeline, student, method.name, seed))
            outputs = predict(module, inputs).numpy()
            columns.append(_score(pipeline, outputs, targets, f"students.{student}"))
            latency_ms = _latency_ms(module, inputs) if latency_ms is None else latency_ms
        scores_nS[method.name] = np.stack(columns, axis=1)
    assert latency_ms is not None
    metric = pipeline.task.metric
    gaps = recovered_gaps(metric, scores_nS[ALONE], scores_nS, teacher_scores) if ALONE in scores_nS else {}
    best = _best(metric, teachers)
    parameters = {teacher.name: teacher.parameters for teacher in teachers}
    largest = parameters[pipeline.foundation] if pipeline.foundation else max(parameters.values())

    def gap(method: str, teacher: str) -> Gap:
        if ALONE not in scores_nS:
            return Gap(None, reason=f"the student alone (method {ALONE!r}) is not among the methods")
        return gaps.get((method, teacher), Gap(None, reason=f"{teacher} has no output to be scored by"))

    found = []
    for method_name, columns_nS in scores_nS.items():
        scores = tuple(float(value) for value in metric_of_scores(metric, columns_nS))
        records = [runs[student, method_name, seed] for seed in seeds]
        found.append(
            MethodScore(
                student=student,
                method=method_name,
                seeds=seeds,
                scores=scores,
                mean=float(np.mean(scores)),
                std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                gap_best=gap(method_name, best) if best else Gap(None, reason="no teacher has an output"),
                gap_foundation=gap(method_name, pipeline.foundation) if pipeline.foundation else None,
                parameters=records[0].parameters,
                compression=largest / records[0].parameters,
                latency_ms=latency_ms,
                gate=_mean_gate(records),
                runs=tuple(
                    RunScore(r.seed, score, r.val, r.best_epoch, r.epochs, r.seconds)
                    for r, score in zip(records, scores, strict=True)
                ),
            )
        )
    return found


def _load(pipeline: Pipeline, student: str, folder: Path) -> nn.Module:
    try:
        return load_exported(student, pipeline.students[student], folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainError(
            f"{folder}: the exported student cannot be loaded into {student!r} ({type(error).__name__}: {error}); "
            f"remove the folder and run ddcache train"
        ) from error


def _score(pipeline: Pipeline, outputs: npt.NDArray[Any], targets: npt.NDArray[Any], where: str) -> Floats:
    try:
        return per_sample_scores(pipeline.task.metric, outputs, targets)
    except ValueError as error:
        raise ConfigError(f"{where}: the output does not fit a {pipeline.task.kind}: {error}") from error


def _best(metric: str, teachers: tuple[TeacherScore, ...]) -> str | None:
    scored = {teacher.name: teacher.score for teacher in teachers if teacher.score is not None}
    if not scored:
        return None
    choose = max if METRICS[metric].higher_is_better else min
    return choose(scored, key=lambda name: scored[name])


def _mean_gate(records: list[RunRecord]) -> dict[str, float] | None:
    gates = [record.gate for record in records if record.gate is not None]
    if not gates:
        return None
    return {teacher: float(np.mean([gate[teacher] for gate in gates])) for teacher in gates[0]}


@torch.inference_mode()
def _latency_ms(module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Return the median time of a forward pass of one batch, after a few to warm up."""
    size = len(next(iter(inputs.values())))
    batch = {name: tensor[torch.arange(LATENCY_BATCH) % size] for name, tensor in inputs.items()}
    seconds = []
    for _ in range(LATENCY_REPEATS + 3):
        begun = time.perf_counter()
        predict(module, batch)
        seconds.append(time.perf_counter() - begun)
    return python_statistics.median(seconds[3:]) * 1e3


def _saved_passes(pipeline: Pipeline, cache: Cache, runs: Mapping[tuple[str, str, int], RunRecord]) -> int:
    labelled = len(cache.samples.labelled_rows("train", pipeline.task.target))
    asked = {
        method.name: 0 if method.name == ALONE else 1 if ":" in method.name else len(pipeline.teachers)
        for method in pipeline.methods
    }
    return sum(record.epochs * labelled * asked[method] for (_, method, _), record in runs.items())


def _write(evaluation: Evaluation, folder: Path) -> None:
    """Write the JSON and, with a row a student x method x seed, the Parquet; each appears whole or not at all."""
    table = pa.Table.from_pylist(
        [
            {
                "pipeline": evaluation.pipeline,
                "student": score.student,
                "method": score.method,
                "metric": evaluation.metric,
                "parameters": score.parameters,
                "compression": score.compression,
                "latency_ms": score.latency_ms,
                **asdict(run),
            }
            for score in evaluation.students
            for run in score.runs
        ]
    )
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    write_whole(folder / "evaluation.parquet", parquet.getvalue())
    write_whole(folder / "evaluation.json", (json.dumps(evaluation.to_json(), indent=1) + "\n").encode())
