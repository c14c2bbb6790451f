from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddcache.cache.reader import Cache
from ddcache.distill import Task, build_distiller
from ddcache.errors import CacheError, ConfigError, TrainError
from ddcache.extract import extract_features
from ddcache.loading import Batch, FeatureLoader
from ddcache.students import load_exported, load_student, predict
from ddcache.train import fit, read_run, run_folder, teacher_specs, train_students
from tests import tiny
from tests.conftest import file_digests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ddcache.config import Pipeline

Make = "Callable[..., Pipeline]"


class LiveLoader:
    """The slow, obvious reference: the same rows in the same order, the teachers run on every batch."""

    def __init__(self, cached: FeatureLoader) -> None:
        self.cached = cached
        self.source = tiny.source()
        self.net, self.groups = tiny.net().eval(), tiny.groups().eval()

    def __len__(self) -> int:
        return len(self.cached)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Batch]:
        for batch in self.cached:
            inputs = self.source.read(batch.rows.numpy())
            body = self.net.body(inputs["x"])
            features = {
                "big": {"body": body, "output": self.net.head(body)},
                "groups": {"table": self.groups(inputs["group"])},
            }
            yield Batch(batch.rows, batch.keys, inputs, batch.targets, features, batch.present, batch.parts)


@pytest.mark.parametrize("method", ["kd:big", "diversedistill"])
def test_cached_training_equals_live_teacher_training(make: Make, tmp_path: Path, method: str) -> None:
    pipeline = make(teachers__groups__taps={"table": {"module": "table", "dtype": "float32"}})
    extract_features(pipeline)
    cache = Cache.open(pipeline.cache)
    losses = {}
    for kind in ("cached", "live"):
        torch.manual_seed(5)
        student = load_student("small", pipeline.students["small"])
        task = Task("classification", "label")
        distiller = build_distiller(method, {}, 6, teacher_specs(cache, ["big", "groups"]), task)
        loader = FeatureLoader(cache, split={"train": 48, "transfer": 48, "calibration": 12}, seed=2)
        path = tmp_path / f"{kind}.jsonl"
        batches = LiveLoader(loader) if kind == "live" else loader
        fit(pipeline, "small", student, distiller, batches, lambda: 0.0, lambda _n: None, path)
        losses[kind] = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    assert len(losses["live"]) == pipeline.train.epochs
    np.testing.assert_allclose(losses["cached"], losses["live"], rtol=0, atol=1e-5)


def test_a_run_leaves_metrics_weights_and_a_record(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    report = train_students(pipeline)
    assert report.trained == len(report.runs) == 3
    for run in report.runs:
        folder = run_folder(pipeline, run.student, run.method, run.seed)
        assert read_run(folder) == run
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert max(line["val"] for line in lines) == run.val == lines[run.best_epoch - 1]["val"]
        assert all(abs(sum(line["terms"].values()) - line["loss"]) < 1e-6 for line in lines)
        assert run.forward_passes == 0
    by_method = {run.method: run for run in report.runs}
    assert by_method["none"].gate is None
    gate = by_method["diversedistill"].gate
    assert gate is not None
    assert set(gate) == {"big", "groups"}
    assert abs(sum(gate.values()) - 1) < 1e-5
    assert len({run.parameters for run in report.runs}) == 1


def test_the_exported_student_is_the_best_by_validation(make: Make) -> None:
    pipeline = make(methods=["none"], train__epochs=6)
    extract_features(pipeline)
    (run,) = train_students(pipeline).runs
    cache = Cache.open(pipeline.cache)
    rows = cache.samples.rows("val")
    student = load_exported("small", pipeline.students["small"], run_folder(pipeline, "small", "none", 0))
    right = predict(student, cache.read_inputs(rows)).argmax(1).numpy() == cache.samples.targets["label"][rows]
    assert right.mean() == pytest.approx(run.val)


def test_the_exported_student_loads_without_ddcache(make: Make) -> None:
    pipeline = make(methods=["diversedistill"])
    extract_features(pipeline)
    train_students(pipeline)
    path = run_folder(pipeline, "small", "diversedistill", 0) / "student.safetensors"
    plain = load_student("small", pipeline.students["small"])
    assert {n: t.shape for n, t in load_file(path).items()} == {n: t.shape for n, t in plain.state_dict().items()}
    code = f"""
import sys
sys.modules["ddcache"] = None
import torch
from safetensors.torch import load_file
student = torch.nn.ModuleDict({{
    "body": torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU()), "head": torch.nn.Linear(6, 4)}})
student.load_state_dict(load_file({str(path)!r}))
assert student.head(student.body(torch.zeros(3, 8))).shape == (3, 4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_seed_gives_the_same_student_and_another_seed_another(make: Make, tmp_path: Path) -> None:
    pipeline = make(methods=["diversedistill"], train__seeds=[0, 1])
    extract_features(pipeline)
    train_students(pipeline)
    again = make(methods=["diversedistill"], train__seeds=[0, 1], runs=str(tmp_path / "again"))
    train_students(again)

    def weights(p: Pipeline, seed: int) -> bytes:
        return (run_folder(p, "small", "diversedistill", seed) / "student.safetensors").read_bytes()

    assert weights(pipeline, 0) == weights(again, 0)
    assert weights(pipeline, 0) != weights(pipeline, 1)


def test_every_method_starts_from_the_same_student(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def spy(pipeline: Pipeline, name: str, student: torch.nn.Module, *rest: object) -> object:
        started.append({n: t.clone() for n, t in student.state_dict().items()})
        return fit(pipeline, name, student, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("ddcache.train.fit", spy)
    pipeline = make()
    extract_features(pipeline)
    train_students(pipeline)
    assert len(started) == 3
    for state in started[1:]:
        assert all(torch.equal(state[n], started[0][n]) for n in state)


def test_finished_runs_are_kept_and_changed_ones_run_again(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    train_students(pipeline)
    before = file_digests(pipeline.runs)
    assert train_students(pipeline).trained == 0
    assert file_digests(pipeline.runs) == before
    (pipeline.runs / "small/none/seed-0/run.json").unlink()
    assert train_students(pipeline).trained == 1
    assert train_students(make(methods=["none", {"kd:big": {"output_weight": 1.0}}])).trained == 1
    assert train_students(make(train__epochs=2)).trained == 3


def test_a_second_student_reuses_the_cache(make: Make) -> None:
    pipeline = make()
    extract_features(pipeline)
    train_students(pipeline)
    students = {
        "small": {"factory": "tests.tiny:student", "hidden": "body", "head": "head"},
        "wide": {"factory": "tests.tiny:net", "args": {"width": 12}, "hidden": "body", "head": "head"},
    }
    more = make(students=students)
    assert set(extract_features(more).forward_passes.values()) == {0}
    assert train_students(more).trained == 3


def test_only_the_runs_asked_for_are_trained(make: Make) -> None:
    pipeline = make(train__seeds=[0, 1])
    extract_features(pipeline)
    report = train_students(pipeline, methods=["none"], seeds=[1])
    assert [(run.method, run.seed) for run in report.runs] == [("none", 1)]
    with pytest.raises(ConfigError, match="--method"):
        train_students(pipeline, methods=["nome"])


def test_training_needs_a_complete_cache(make: Make) -> None:
    pipeline = make()
    with pytest.raises(CacheError, match="there is no cache"):
        train_students(pipeline)
    extract_features(make(teachers__groups=None))
    with pytest.raises(CacheError, match="'groups' is not cached"):
        train_students(pipeline)


def test_a_cache_without_calibration_rows_is_used_with_one_warning(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = make(source={"factory": "tests.tiny:source", "args": {"calibration": False}})
    extract_features(pipeline)
    train_students(pipeline)
    assert [r.message for r in caplog.records if "calibration" in r.message] == [
        "there is no calibration split: the gate learns on training rows, which is right only for teachers that were "
        "not fitted on them"
    ]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_it_unfinished(make: Make) -> None:
    pipeline = make(methods=["kd:big"], train__lr=1e30)
    extract_features(pipeline)
    with pytest.raises(TrainError, match="the loss is not finite in epoch"):
        train_students(pipeline)
    assert not (run_folder(pipeline, "small", "kd:big", 0) / "run.json").exists()
    with pytest.raises(TrainError, match="no finished run; run ddcache train"):
        read_run(run_folder(pipeline, "small", "kd:big", 0))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"hidden": "bdoy"}, "students.small.hidden: Net has no module 'bdoy'"),
        ({"head": "hed"}, "students.small.head: Net has no module 'hed'"),
        ({"head": "body"}, "students.small: Net raised RuntimeError"),
        ({"hidden": "body.0"}, "expected module 'head' to turn the output of 'body.0' into the student's output"),
    ],
)
def test_a_student_whose_modules_do_not_fit_is_refused(make: Make, student: dict[str, str], message: str) -> None:
    base = {"factory": "tests.tiny:student", "hidden": "body", "head": "head"}
    pipeline = make(students={"small": {**base, **student}})
    extract_features(pipeline)
    with pytest.raises(ConfigError) as caught:
        train_students(pipeline)
    assert message in str(caught.value)
