"""Stage two: train students from the cache; no teacher is run.

A run is one student x method x seed in a folder of its own: `metrics.jsonl` (one line an epoch), `student.safetensors`
(a plain state dict, best epoch by validation) and `run.json`, which is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from ddcache.cache.layout import canonical_json
from ddcache.cache.reader import Cache
from ddcache.distill import (
    Distiller,
    NoDistillation,
    TapSpec,
    Task,
    TeacherSpec,
    build_distiller,
    parse_method,
)
from ddcache.errors import ConfigError, TrainError
from ddcache.files import write_whole
from ddcache.loading import Batch, FeatureLoader
from ddcache.progress import Reporter, Silent
from ddcache.statistics import METRICS, metric_value
from ddcache.students import EXPORTED, StudentHooks, check_student, export_student, load_student, predict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ddcache.config import MethodConfig, Pipeline

_log = logging.getLogger("ddcache")


class RunRecord(BaseModel):
    """What a finished run was and what came of it.

    Attributes:
        student: name of the student.
        method: name of the method.
        settings: the method's settings that differ from their defaults.
        seed: of initial weights, order and dropout.
        identity: digest of all that the result depends on; a run with the same one is not run again.
        parameters: of the student.
        distiller_parameters: of the distillation module, which is thrown away.
        epochs: how many there were.
        best_epoch: the one whose student is exported, from 1.
        val: the task's metric on the validation rows at that epoch.
        gate: teacher -> mean weight of the gate on the validation rows; null where the method has none.
        seconds: wall time of the training loop.
        loader_seconds: how much of it the loop waited for the loader.
        forward_passes: samples run through a teacher: 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str
    method: str
    settings: dict[str, Any]
    seed: int
    identity: str
    parameters: int
    distiller_parameters: int
    epochs: int
    best_epoch: int
    val: float
    gate: dict[str, float] | None
    seconds: float
    loader_seconds: float
    forward_passes: int = 0


@dataclass(frozen=True)
class Run:
    """One run to do: a student, a method and a seed."""

    student: str
    method: MethodConfig
    seed: int


@dataclass(frozen=True)
class TrainReport:
    """What one call of `train_students` did.

    Attributes:
        runs: every run asked for, in order.
        trained: how many of them were trained now; the others were finished already.
    """

    runs: tuple[RunRecord, ...]
    trained: int


def train_students(
    pipeline: Pipeline,
    *,
    students: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    report_to: Reporter | None = None,
) -> TrainReport:
    """Train every student with every method and seed that is not finished yet.

    Args:
        pipeline: the checked pipeline file.
        students: only these; all if empty.
        methods: only these, by the names in the file; all if empty.
        seeds: only these; all if empty.
        report_to: shows the progress.

    Raises:
        ConfigError: a name is not in the pipeline file, or a student's modules don't fit.
        CacheError: the cache is missing, partial or damaged.
        TrainError: a loss is not finite.
    """
    report_to = report_to or Silent()
    todo = select_runs(pipeline, students, methods, seeds)
    cache = Cache.open(pipeline.cache)
    cache.require(pipeline.teachers)
    if not len(cache.samples.rows("calibration")) and any("calibration" in _splits_of(t.method) for t in todo):
        _log.warning(
            "there is no calibration split: the gate learns on training rows, which is right only for teachers that "
            "were not fitted on them"
        )
    runs, trained = [], 0
    for one in todo:
        folder = run_folder(pipeline, one.student, one.method.name, one.seed)
        identity = _identity(pipeline, cache, one)
        done = _finished(folder)
        if done is None or done.identity != identity:
            done = _train_run(pipeline, cache, one, identity, folder, report_to)
            trained += 1
        runs.append(done)
    return TrainReport(tuple(runs), trained)


def check_training(pipeline: Pipeline) -> None:
    """Build every student and every method's module once, so that a typo doesn't show only after extracting.

    Raises:
        ConfigError: a setting, a student's `hidden` or `head`, or a teacher that a method can't use.
        TrainError: a student's factory raised.
    """
    # What a tap's shape will be is known only once its teacher has run, and no check here depends on it.
    teachers = [
        TeacherSpec(name, {tap: TapSpec((1,)) for tap in config.taps if tap != config.output_tap}, config.output_tap)
        for name, config in pipeline.teachers.items()
    ]
    with torch.random.fork_rng():
        for method in pipeline.methods:
            build_distiller(method.name, method.settings, 1, teachers, _task(pipeline))
        for name, config in pipeline.students.items():
            StudentHooks(name, config, load_student(name, config))


def select_runs(pipeline: Pipeline, students: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of a pipeline, or those of the students, methods and seeds that are named.

    Raises:
        ConfigError: a name is not in the pipeline file.
    """
    by_name = {method.name: method for method in pipeline.methods}
    for what, chosen, known in (
        ("student", students, list(pipeline.students)),
        ("method", methods, list(by_name)),
        ("seed", seeds, list(pipeline.train.seeds)),
    ):
        if unknown := [c for c in chosen if c not in known]:
            raise ConfigError(f"--{what}: expected among {known}, as in the pipeline file, found {unknown}")
    return [
        Run(student, by_name[method], seed)
        for student in (students or pipeline.students)
        for method in (methods or by_name)
        for seed in (seeds or pipeline.train.seeds)
    ]


def finished_runs(pipeline: Pipeline, cache: Cache) -> dict[tuple[str, str, int], RunRecord]:
    """Return (student, method, seed) -> record of every run of a pipeline.

    Raises:
        TrainError: a run is not finished, or was trained from other features or settings than there are now.
    """
    runs = {}
    for one in select_runs(pipeline, (), (), ()):
        folder = run_folder(pipeline, one.student, one.method.name, one.seed)
        record = read_run(folder)
        if record.identity != _identity(pipeline, cache, one):
            raise TrainError(f"{folder} was trained from other features or settings; run ddcache train")
        runs[one.student, one.method.name, one.seed] = record
    return runs


def run_folder(pipeline: Pipeline, student: str, method: str, seed: int) -> Path:
    """Return the folder of a run; `:` in a method's name becomes `-`."""
    return pipeline.runs / student / method.replace(":", "-") / f"seed-{seed}"


def read_run(folder: Path) -> RunRecord:
    """Return the record of a finished run.

    Raises:
        TrainError: it is not finished, or its record is damaged.
    """
    path = folder / "run.json"
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise TrainError(f"{folder} has no finished run; run ddcache train") from error
    except (OSError, ValidationError) as error:
        raise TrainError(f"{path} cannot be read: {type(error).__name__}; remove it and run ddcache train") from error


def teacher_specs(cache: Cache, teachers: Sequence[str]) -> list[TeacherSpec]:
    """Return what a distiller must know of each teacher, with the statistics that were taken while extracting."""
    return [
        TeacherSpec(
            name,
            {
                tap: _tap_spec(cache, name, tap)
                for tap in cache.teachers[name].taps
                if tap != cache.teachers[name].output_tap
            },
            cache.teachers[name].output_tap,
        )
        for name in teachers
    ]


def _task(pipeline: Pipeline) -> Task:
    return Task(pipeline.task.kind, pipeline.task.target, pipeline.task.temperature)


def _tap_spec(cache: Cache, teacher: str, tap: str) -> TapSpec:
    shape = cache.tap(teacher, tap).record.item_shape[1:]
    statistics = cache.statistics(teacher, tap)
    if statistics is None:
        return TapSpec(shape)
    mean, std = torch.from_numpy(statistics.mean).float(), torch.from_numpy(statistics.variance).sqrt().float()
    return TapSpec(shape, mean, std)


def _train_run(
    pipeline: Pipeline, cache: Cache, one: Run, identity: str, folder: Path, report_to: Reporter
) -> RunRecord:
    """Train one student and leave its folder finished."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = pipeline.train
    device = torch.device(config.device)
    # The global generator, not one of our own: initialisers and dropout of the user's modules draw from it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(one.seed)
        student = load_student(one.student, pipeline.students[one.student]).to(device)
        few = {n: t.to(device) for n, t in cache.read_inputs(cache.samples.rows("train")[:4]).items()}
        hidden_dim = check_student(one.student, pipeline.students[one.student], student, few)
        torch.manual_seed(one.seed)
        distiller = build_distiller(
            one.method.name,
            one.method.settings,
            hidden_dim,
            teacher_specs(cache, list(pipeline.teachers)),
            _task(pipeline),
        ).to(device)
        loader = FeatureLoader(
            cache,
            split=_batch_parts(cache, distiller, config.batch_size),
            teachers=list(distiller.reads),
            taps=distiller.reads,
            seed=one.seed,
            pin_memory=device.type == "cuda",
        )
        validation = cache.samples.labelled_rows("val", pipeline.task.target)
        if not len(validation):
            raise ConfigError("the source has no labelled 'val' rows; the best checkpoint is chosen on them")
        inputs = {n: tensor.to(device) for n, tensor in cache.read_inputs(validation).items()}
        targets = cache.samples.targets[pipeline.task.target][validation]

        def validate() -> float:
            return metric_value(pipeline.task.metric, predict(student, inputs).numpy(), targets)

        label = f"{one.student} {one.method.name} seed {one.seed}"
        with report_to.track(label, config.epochs * len(loader)) as advance:
            result = fit(pipeline, one.student, student, distiller, loader, validate, advance, folder / "metrics.jsonl")
        student.load_state_dict(result.best_state)
        gate = _mean_gate(pipeline, one.student, student, distiller, inputs)
    export_student(student, folder)
    record = RunRecord(
        student=one.student,
        method=one.method.name,
        settings=one.method.settings,
        seed=one.seed,
        identity=identity,
        parameters=sum(p.numel() for p in student.parameters()),
        distiller_parameters=sum(p.numel() for p in distiller.parameters()),
        epochs=config.epochs,
        best_epoch=result.best_epoch,
        val=result.best_value,
        gate=gate,
        seconds=result.seconds,
        loader_seconds=result.loader_seconds,
    )
    write_whole(folder / "run.json", record.model_dump_json(indent=1).encode())
    return record


@dataclass
class FitResult:
    """What a training loop gives: the best epoch by validation, its weights, and where the time went."""

    best_epoch: int
    best_value: float
    best_state: dict[str, Tensor]
    seconds: float
    loader_seconds: float


class Batches(Protocol):
    """What the training loop iterates over: one epoch each time, `len` batches."""

    def __len__(self) -> int:
        """Return the number of batches an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the next epoch."""


def fit(
    pipeline: Pipeline,
    name: str,
    student: nn.Module,
    distiller: Distiller,
    loader: Batches,
    validate: Callable[[], float],
    advance: Callable[[int], None],
    metrics: Path,
) -> FitResult:
    """The training loop: AdamW and one cycle for the student and the distiller, the best epoch by validation.

    Raises:
        TrainError: a loss is NaN or infinite.
    """
    config = pipeline.train
    device = torch.device(config.device)
    groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "lr": config.lr}]
    if own := list(distiller.parameters()):
        groups.append({"params": own, "lr": config.distiller_lr})
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=[group["lr"] for group in groups], total_steps=config.epochs * len(loader)
    )
    sign = 1.0 if METRICS[pipeline.task.metric].higher_is_better else -1.0
    best: FitResult | None = None
    begun, waited = time.perf_counter(), 0.0
    with StudentHooks(name, pipeline.students[name], student) as hooks, metrics.open("w", encoding="utf-8") as log:
        for epoch in range(1, config.epochs + 1):
            student.train()
            distiller.train()
            sums: dict[str, float] = {}
            epoch_begun = time.perf_counter()
            for batch, wait in _timed(loader):
                waited += wait
                batch = batch.to(device, non_blocking=True)
                terms = distiller.terms(hooks.state(batch.inputs), batch)
                loss = torch.stack(list(terms.values())).sum()
                if not torch.isfinite(loss):
                    shown = ", ".join(f"{n} {t.item():g}" for n, t in terms.items())
                    raise TrainError(f"{metrics.parent}: the loss is not finite in epoch {epoch}: {shown}; lower lr")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                for term, value in terms.items():
                    sums[term] = sums.get(term, 0.0) + value.item()
                advance(1)
            score = validate()
            means = {term: total / len(loader) for term, total in sums.items()}
            line = {
                "epoch": epoch,
                "loss": sum(means.values()),
                "terms": means,
                "val": score,
                "seconds": time.perf_counter() - epoch_begun,
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            if best is None or sign * score > sign * best.best_value:
                state = {n: t.detach().clone() for n, t in student.state_dict().items()}
                best = FitResult(epoch, score, state, 0.0, 0.0)
    if best is None:
        raise TrainError(f"{metrics.parent}: no epoch gave a validation {pipeline.task.metric}")
    best.seconds, best.loader_seconds = time.perf_counter() - begun, waited
    return best


def _mean_gate(
    pipeline: Pipeline, name: str, student: nn.Module, distiller: Distiller, inputs: Mapping[str, Tensor]
) -> dict[str, float] | None:
    weights = getattr(distiller, "gate_weights", None)
    if weights is None:
        return None
    student.eval()
    with torch.no_grad(), StudentHooks(name, pipeline.students[name], student) as hooks:
        mean = weights(hooks.state(inputs).hidden).mean(0)
    return {teacher.name: float(g) for teacher, g in zip(distiller.teachers, mean, strict=True)}


def _batch_parts(cache: Cache, distiller: Distiller, batch_size: int) -> dict[str, int]:
    """Return split -> samples a batch: calibration in proportion to its size, transfer as many as train."""
    sizes = {split: len(cache.samples.rows(split)) for split in ("train", *distiller.splits)}
    parts = {"train": batch_size}
    if sizes.get("transfer"):
        parts["transfer"] = batch_size
    if sizes.get("calibration"):
        parts["calibration"] = max(1, round(batch_size * sizes["calibration"] / sizes["train"]))
    return parts


def _splits_of(method: MethodConfig) -> tuple[str, ...]:
    cls, _ = parse_method(method.name)
    return cls.splits


def _timed(loader: Batches) -> Iterator[tuple[Batch, float]]:
    """Yield each batch with the seconds that it was waited for."""
    batches = iter(loader)
    while True:
        begun = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.perf_counter() - begun


def _finished(folder: Path) -> RunRecord | None:
    if not (folder / "run.json").exists() or not (folder / EXPORTED).exists():
        return None
    try:
        return read_run(folder)
    except TrainError:
        return None


def _identity(pipeline: Pipeline, cache: Cache, one: Run) -> str:
    """Digest what the result of a run depends on: samples, features, student, method, settings, training."""
    cls, teacher = parse_method(one.method.name)
    taught_by = [teacher] if teacher else [] if cls is NoDistillation else list(pipeline.teachers)
    facts = {
        "samples": cache.root.digests,
        "teachers": {
            name: [cache.teachers[name].fingerprint, {n: r.fingerprint for n, r in cache.teachers[name].taps.items()}]
            for name in taught_by
        },
        "task": pipeline.task.model_dump(mode="json"),
        "student": pipeline.students[one.student].model_dump(mode="json"),
        "method": one.method.model_dump(mode="json"),
        "train": pipeline.train.model_dump(mode="json", exclude={"seeds"}),
        "seed": one.seed,
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()
