from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ddcache.cache.reader import Cache
from ddcache.errors import ConfigError, TrainError
from ddcache.evaluate import Evaluation, evaluate_students
from ddcache.extract import extract_features
from ddcache.statistics import METRICS, Gap, metric_of_scores, metric_value, per_sample_scores, recovered_gaps
from ddcache.train import run_folder, train_students
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from ddcache.config import Pipeline

METRIC_NAMES = sorted(METRICS)


# --- statistics


@pytest.mark.parametrize(
    ("metric", "predictions", "targets", "expected"),
    [
        ("rmse", [1.0, 2.0, 5.0], [1.0, 4.0, 4.0], np.sqrt(5 / 3)),
        ("rmse", [[1.0], [2.0], [5.0]], [1.0, 4.0, 4.0], np.sqrt(5 / 3)),
        ("mae", [1.0, 2.0, 5.0], [1.0, 4.0, 4.0], 1.0),
        ("accuracy", [[3.0, 1.0], [0.0, 1.0], [2.0, 1.0]], [0, 1, 1], 2 / 3),
    ],
)
def test_metrics_are_what_their_names_say(metric: str, predictions: list, targets: list, expected: float) -> None:
    assert metric_value(metric, np.array(predictions), np.array(targets)) == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "shape"), [("rmse", (3, 2)), ("mae", (2,)), ("accuracy", (3,))])
def test_predictions_of_another_shape_are_refused(metric: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        per_sample_scores(metric, np.zeros(shape), np.zeros(3))


def slow_gap(metric: str, alone: np.ndarray, distilled: np.ndarray, teacher: np.ndarray, resamples: int) -> tuple:
    """Return (recovered, low, high) by one resample after another."""
    n, seeds = alone.shape

    def value(scores: np.ndarray) -> float:
        return float(np.sqrt(scores.mean()) if metric == "rmse" else scores.mean())

    def gap(rows: np.ndarray, columns: np.ndarray) -> float | None:
        a, d = (np.mean([value(s[rows, c]) for c in columns]) for s in (alone, distilled))
        t = value(teacher[rows])
        better = t > a if metric == "accuracy" else t < a
        return (a - d) / (a - t) if better else None

    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(resamples, seeds))
    rows = rng.integers(n, size=(resamples, n))
    gaps = [gap(r, c) for r, c in zip(rows, drawn, strict=True)]
    low = np.sort([-np.inf if g is None else g for g in gaps])[int(np.floor(0.025 * (resamples - 1)))]
    high = np.sort([np.inf if g is None else g for g in gaps])[int(np.ceil(0.975 * (resamples - 1)))]
    return gap(np.arange(n), np.arange(seeds)), low, high


def scores(metric: str, rng: np.random.Generator, level: float, *shape: int) -> np.ndarray:
    """Return per-sample scores; a higher level is a better predictor."""
    if metric == "accuracy":
        return (rng.random(shape) < 0.4 + level).astype(float)
    return rng.random(shape) * (2 - level)


@pytest.mark.parametrize("metric", METRIC_NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_equals_a_slow_loop(metric: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    alone, distilled = scores(metric, rng, 0.0, 60, 3), scores(metric, rng, 0.3, 60, 3)
    teacher = scores(metric, rng, 0.5, 60)
    gap = recovered_gaps(metric, alone, {"d": distilled}, {"t": teacher}, resamples=200)["d", "t"]
    np.testing.assert_allclose((gap.recovered, gap.low, gap.high), slow_gap(metric, alone, distilled, teacher, 200))


def test_resampling_in_parts_covers_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    drawn = []

    class Recorded:
        def integers(self, high: int, size: tuple[int, int]) -> np.ndarray:
            drawn.append(size)
            return rng.integers(high, size=size)

    monkeypatch.setattr("ddcache.statistics._DRAWS_AT_ONCE", 100)
    from ddcache.statistics import _resample_rows

    values = _resample_rows("mae", np.ones((30, 2)), 10, Recorded())  # type: ignore[arg-type]
    assert values.shape == (10, 2)
    np.testing.assert_allclose(values, 1.0)
    assert [size[0] for size in drawn] == [3, 3, 3, 1]


@st.composite
def committees(draw: st.DrawFn) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    metric = draw(st.sampled_from(METRIC_NAMES))
    n, seeds = draw(st.integers(2, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    level = draw(st.floats(0, 0.5))
    return metric, scores(metric, rng, 0.0, n, seeds), scores(metric, rng, level, n, seeds), scores(metric, rng, 0.5, n)


@given(committees())
def test_the_student_alone_recovers_0_and_the_teacher_1(case: tuple) -> None:
    metric, alone, _, teacher = case
    as_teacher = np.repeat(teacher[:, None], alone.shape[1], axis=1)
    gaps = recovered_gaps(metric, alone, {"alone": alone, "teacher": as_teacher}, {"t": teacher}, resamples=50)
    for name, expected in (("alone", 0.0), ("teacher", 1.0)):
        gap = gaps[name, "t"]
        if gap.recovered is None:
            assert gap.reason
        else:
            assert gap.recovered == pytest.approx(expected)
            if gap.low is not None:
                assert (gap.low, gap.high) == pytest.approx((expected, expected))


@given(committees())
def test_a_gap_is_finite_with_ordered_ends_or_says_why_it_is_not(case: tuple) -> None:
    metric, alone, distilled, teacher = case
    gap = recovered_gaps(metric, alone, {"d": distilled}, {"t": teacher}, resamples=50)["d", "t"]
    sign = 1 if METRICS[metric].higher_is_better else -1
    ahead = sign * (metric_of_scores(metric, teacher) - metric_of_scores(metric, alone).mean()) > 0
    assert (gap.recovered is not None) == ahead
    assert (gap.reason is None) == (gap.low is not None) == (gap.high is not None)
    if gap.low is not None:
        assert np.isfinite([gap.recovered, gap.low, gap.high]).all()
        assert gap.low <= gap.high


@given(committees())
def test_a_method_that_is_better_on_every_sample_recovers_at_least_as_much(case: tuple) -> None:
    metric, alone, distilled, teacher = case
    better = np.maximum(distilled, alone) if METRICS[metric].higher_is_better else np.minimum(distilled, alone)
    gaps = recovered_gaps(metric, alone, {"d": distilled, "b": better}, {"t": teacher}, resamples=50)
    worse_gap, better_gap = gaps["d", "t"], gaps["b", "t"]
    if worse_gap.recovered is not None and better_gap.recovered is not None:
        assert better_gap.recovered >= worse_gap.recovered - 1e-9
        assert better_gap.recovered >= -1e-9
        if worse_gap.low is not None:
            assert better_gap.low >= worse_gap.low - 1e-9
            assert better_gap.high >= worse_gap.high - 1e-9


@given(committees(), st.floats(0.1, 10))
def test_the_unit_of_an_error_does_not_matter(case: tuple, unit: float) -> None:
    _, alone, distilled, teacher = case
    first = recovered_gaps("rmse", alone, {"d": distilled}, {"t": teacher}, resamples=20)["d", "t"]
    scaled = [values * unit**2 for values in (alone, distilled, teacher)]
    second = recovered_gaps("rmse", scaled[0], {"d": scaled[1]}, {"t": scaled[2]}, resamples=20)["d", "t"]
    if first.recovered is not None and abs(first.recovered) < 1e3:
        assert second.recovered == pytest.approx(first.recovered)


def test_a_teacher_behind_the_student_gives_no_percentage() -> None:
    right, wrong = np.ones((50, 2)), np.zeros(50)
    gap = recovered_gaps("accuracy", right, {"d": right}, {"t": wrong})["d", "t"]
    assert gap == Gap(None, reason="the teacher is not better than the student alone")


def test_a_lead_within_the_noise_gives_a_share_without_an_interval() -> None:
    alone, teacher = np.zeros((50, 1)), np.zeros(50)
    teacher[0] = 1.0
    gap = recovered_gaps("accuracy", alone, {"d": alone}, {"t": teacher})["d", "t"]
    assert gap.recovered == 0.0
    assert (gap.low, gap.high) == (None, None)
    assert "leads the student alone in only 6" in (gap.reason or "")


# --- evaluate


@pytest.fixture
def trained(make: Callable[..., Pipeline]) -> Pipeline:
    pipeline = make(train__seeds=[0, 1])
    extract_features(pipeline)
    train_students(pipeline)
    return pipeline


def test_scores_are_those_of_the_live_modules_on_the_test_rows(trained: Pipeline) -> None:
    evaluation = evaluate_students(trained)
    source = tiny.source()
    rows = source.samples.rows("test")
    inputs, targets = source.read(rows), source.samples.targets["label"][rows]
    assert evaluation.samples == len(rows)
    with torch.inference_mode():
        live = tiny.net().eval()(inputs["x"]).argmax(1).numpy()
        assert evaluation.teachers[0].score == pytest.approx((live == targets).mean())
        for score in evaluation.students:
            for seed, value in zip(score.seeds, score.scores, strict=True):
                module = tiny.student()
                module.load_state_dict(
                    load_file(run_folder(trained, "small", score.method, seed) / "student.safetensors")
                )
                found = module.eval()(inputs["x"]).argmax(1).numpy()
                assert value == pytest.approx((found == targets).mean())
            assert score.mean == pytest.approx(np.mean(score.scores))
            assert score.std == pytest.approx(np.std(score.scores, ddof=1))


def test_evaluating_runs_no_teacher(trained: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: object) -> None:
        raise AssertionError("a teacher was called")

    monkeypatch.setattr("tests.tiny.net", forbidden)
    monkeypatch.setattr("tests.tiny.groups", forbidden)
    monkeypatch.setattr("tests.tiny.source", forbidden)
    assert len(evaluate_students(trained).students) == 3


def test_teachers_are_described_by_the_cache_and_one_without_output_has_no_score(trained: Pipeline) -> None:
    evaluation = evaluate_students(trained)
    big, groups = evaluation.teachers
    assert (big.name, big.role, big.forward_passes) == ("big", "foundation", 600)
    assert (groups.name, groups.score, groups.forward_passes) == ("groups", None, tiny.GROUPS)
    assert groups.nbytes == Cache.open(trained.cache).teachers["groups"].nbytes
    assert evaluation.best_teacher == evaluation.foundation == "big"
    small = evaluation.students[0]
    assert small.compression == pytest.approx(big.parameters / small.parameters)


def test_saved_passes_count_labelled_training_rows_a_teacher_and_epoch(trained: Pipeline) -> None:
    labelled = len(tiny.source().samples.rows("train"))
    assert evaluate_students(trained).saved_passes == 2 * 3 * labelled * (0 + 1 + 2)


def test_json_and_parquet_hold_the_evaluation(trained: Pipeline) -> None:
    evaluation = evaluate_students(trained)
    assert json.loads((trained.runs / "evaluation.json").read_text()) == evaluation.to_json()
    rows = pq.read_table(trained.runs / "evaluation.parquet").to_pylist()
    found = {(row["student"], row["method"], row["seed"]): row["score"] for row in rows}
    assert found == {(s.student, s.method, r.seed): r.score for s in evaluation.students for r in s.runs}
    assert len(found) == 6
    assert not list(trained.runs.glob(".evaluation*"))


def test_two_evaluations_agree_but_for_the_latency(trained: Pipeline) -> None:
    def content(evaluation: Evaluation) -> dict:
        found = evaluation.to_json()
        for score in found["students"]:
            assert score.pop("latency_ms") > 0
        return found

    assert content(evaluate_students(trained)) == content(evaluate_students(trained))


def test_the_first_missing_run_is_named_with_the_remedy(trained: Pipeline) -> None:
    shutil.rmtree(run_folder(trained, "small", "kd:big", 1))
    with pytest.raises(TrainError, match=r"kd-big/seed-1.*ddcache train"):
        evaluate_students(trained)


def test_a_damaged_student_is_named_with_the_remedy(trained: Pipeline) -> None:
    (run_folder(trained, "small", "none", 0) / "student.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainError, match=r"none/seed-0.*ddcache train"):
        evaluate_students(trained)


def test_without_the_student_alone_every_gap_is_undefined_and_says_why(make: Callable[..., Pipeline]) -> None:
    pipeline = make(methods=["kd:big"])
    extract_features(pipeline)
    train_students(pipeline)
    (score,) = evaluate_students(pipeline).students
    assert score.gap_best.recovered is None
    assert "'none'" in (score.gap_best.reason or "")
    assert score.std is None


def test_a_foundation_without_output_has_no_gap_and_says_why(make: Callable[..., Pipeline]) -> None:
    pipeline = make(teachers__big__role="expert", teachers__groups__role="foundation", methods=["none", "kd:big"])
    extract_features(pipeline)
    train_students(pipeline)
    evaluation = evaluate_students(pipeline)
    assert evaluation.best_teacher == "big"
    assert evaluation.foundation == "groups"
    gap = evaluation.students[1].gap_foundation
    assert gap is not None
    assert gap == Gap(None, reason="groups has no output to be scored by")


def test_without_labelled_test_rows_evaluate_says_so(trained: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddcache.cache.samples.is_labelled", lambda target: np.zeros(len(target), dtype=bool))
    with pytest.raises(ConfigError, match="no labelled 'test' rows"):
        evaluate_students(trained)
