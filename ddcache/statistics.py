"""Metrics, the gap recovered, and its interval: pure functions of per-sample scores.

Every metric is `finish(mean of a score per sample)`, so a resample of the test rows needs means alone.

Shape legend: n test rows, S seeds, R resamples, C columns (one a predictor), k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
_DRAWS_AT_ONCE = 4_000_000  # 32 MB of counts


@dataclass(frozen=True)
class Metric:
    """A way to judge predictions.

    Attributes:
        title: as a table's heading names it.
        higher_is_better: whether it is a success rate rather than an error.
        per_sample: predictions, targets (n,) -> a score per sample, (n,).
        finish: mean score -> the metric's value; elementwise.
    """

    title: str
    higher_is_better: bool
    per_sample: Callable[[npt.NDArray[Any], npt.NDArray[Any]], Floats]
    finish: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Gap:
    """The share of the way from the student alone (0) to a teacher (1) that a distilled student has gone.

    Attributes:
        recovered: the share; None where it is undefined.
        low: lower end of the interval; None where there is none.
        high: upper end.
        reason: why the share or its interval is None.
    """

    recovered: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def _errors(predictions: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Floats:
    if predictions.size != targets.size:
        raise ValueError(f"expected one prediction a sample, {targets.shape}, found shape {predictions.shape}")
    errors: Floats = predictions.reshape(targets.shape).astype(np.float64) - targets
    return errors


def _hits(predictions: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Floats:
    if predictions.ndim != 2 or len(predictions) != len(targets):
        raise ValueError(f"expected logits of shape ({len(targets)}, classes), found {predictions.shape}")
    hits: Floats = (predictions.argmax(1) == targets).astype(np.float64)
    return hits


def _same(mean: Floats) -> Floats:
    return mean


METRICS: dict[str, Metric] = {
    "rmse": Metric("RMSE", False, lambda p, t: _errors(p, t) ** 2, np.sqrt),
    "mae": Metric("MAE", False, lambda p, t: np.abs(_errors(p, t)), _same),
    "accuracy": Metric("accuracy", True, _hits, _same),
}


def per_sample_scores(metric: str, predictions: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Floats:
    """Return a score per sample, (n,) float64, whose mean the metric is made of.

    Args:
        metric: a key of `METRICS`.
        predictions: (n,) or (n, 1) for errors, (n, k) logits for accuracy.
        targets: (n,), all of them labelled.

    Raises:
        ValueError: the shapes don't fit.
    """
    return METRICS[metric].per_sample(predictions, targets)


def metric_of_scores(metric: str, scores: Floats) -> Floats:
    """Return the metric of per-sample scores, (n, …) -> (…)."""
    return METRICS[metric].finish(scores.mean(0))


def metric_value(metric: str, predictions: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
    """Return the metric of predictions; arguments as for `per_sample_scores`."""
    return float(metric_of_scores(metric, per_sample_scores(metric, predictions, targets)))


def recovered_gaps(
    metric: str,
    alone_nS: Floats,
    distilled: Mapping[str, Floats],
    teachers: Mapping[str, Floats],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[tuple[str, str], Gap]:
    """Return the gap recovered by each distilled student against each teacher, with 95 % paired bootstrap intervals.

    A student's value is its mean over seeds, and the gap recovered is (alone - distilled) / (alone - teacher), the
    same for errors and success rates because the signs cancel. A resample draws test rows and seeds with replacement,
    the same ones for the student alone, the distilled student and the teacher; ends are percentiles. A resample in
    which the teacher is not ahead of the student alone has no gap: it counts beyond both ends, and where those are too
    many there is no interval.

    Args:
        metric: a key of `METRICS`.
        alone_nS: per-sample scores of the student alone, one column a seed.
        distilled: method -> per-sample scores, (n, S), the same rows and seeds.
        teachers: teacher -> per-sample scores, (n,).
        resamples: how many.
        seed: of the resampling.

    Returns:
        (method, teacher) -> gap.
    """
    n, seeds = alone_nS.shape
    names = [*distilled, *teachers]
    columns = [alone_nS, *distilled.values(), *(scores_n[:, None] for scores_n in teachers.values())]
    values_C = metric_of_scores(metric, np.concatenate(columns, axis=1))
    rng = np.random.default_rng(seed)
    drawn_RS = rng.integers(seeds, size=(resamples, seeds))
    values_RC = _resample_rows(metric, np.concatenate(columns, axis=1), resamples, rng)

    ends = np.cumsum([column.shape[1] for column in columns])[:-1]
    alone_S, *points = np.split(values_C, ends)
    alone_RS, *draws = np.split(values_RC, ends, axis=1)
    point = dict(zip(names, points, strict=True))
    draw = dict(zip(names, draws, strict=True))

    alone_R = np.take_along_axis(alone_RS, drawn_RS, axis=1).mean(1)
    gaps = {}
    for method in distilled:
        method_R = np.take_along_axis(draw[method], drawn_RS, axis=1).mean(1)
        for teacher in teachers:
            gaps[method, teacher] = _gap(
                METRICS[metric].higher_is_better,
                (float(alone_S.mean()), float(point[method].mean()), float(point[teacher][0])),
                (alone_R, method_R, draw[teacher][:, 0]),
            )
    return gaps


def _resample_rows(metric: str, scores_nC: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return the metric of every column on each resample of the rows, (R, C)."""
    n = len(scores_nC)
    at_once = max(1, _DRAWS_AT_ONCE // n)
    values = []
    for begin in range(0, resamples, at_once):
        size = min(at_once, resamples - begin)
        rows = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts_rn = np.bincount(rows.ravel(), minlength=size * n).reshape(size, n)
        values.append(METRICS[metric].finish(counts_rn.astype(np.float64) @ scores_nC / n))
    return np.concatenate(values)


def _gap(higher_is_better: bool, point: tuple[float, float, float], draws: tuple[Floats, Floats, Floats]) -> Gap:
    """Return the gap of (alone, distilled, teacher), once as measured and once a resample."""
    sign = 1.0 if higher_is_better else -1.0
    alone, distilled, teacher = point
    if not sign * (teacher - alone) > 0:
        return Gap(None, reason="the teacher is not better than the student alone")
    recovered = (distilled - alone) / (teacher - alone)
    alone_R, distilled_R, teacher_R = draws
    lead_R = sign * (teacher_R - alone_R)
    defined_R = lead_R > 0
    gap_R = sign * (distilled_R - alone_R) / np.where(defined_R, lead_R, 1.0)
    tail = (1 - LEVEL) / 2
    low = float(np.quantile(np.where(defined_R, gap_R, -np.inf), tail, method="lower"))
    high = float(np.quantile(np.where(defined_R, gap_R, np.inf), 1 - tail, method="higher"))
    if not (np.isfinite(low) and np.isfinite(high)):
        share = float(defined_R.mean())
        return Gap(recovered, reason=f"the teacher leads the student alone in only {share:.0%} of the resamples")
    return Gap(recovered, low, high)
