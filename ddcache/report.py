"""Shows an evaluation: a table for the terminal, and one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from rich import box
from rich.markup import escape
from rich.table import Table

from ddcache.evaluate import ALONE, LATENCY_BATCH, LATENCY_REPEATS
from ddcache.files import write_whole
from ddcache.statistics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ddcache.evaluate import Evaluation, MethodScore
    from ddcache.statistics import Gap

DASH = "–"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
CUT = 1.0  # whiskers are drawn this far beyond the points, in widths of what the points span


def write_report(evaluation: Evaluation, path: str | Path, *, pipeline_file: str | Path | None = None) -> Path:
    """Write one self-contained HTML page and return its path.

    Args:
        evaluation: what `evaluate_students` returned.
        path: of the page; its folder is made.
        pipeline_file: named in the commands that make the numbers again.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": score_text, "gap": gap_text, "interval": interval_text, "count": count_text}
    environment.filters |= {"mean": mean_text, "compression": compression_text, "megabytes": megabytes_text}
    template = environment.from_string((files("ddcache") / "report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        e=evaluation,
        metric=METRICS[evaluation.metric].title,
        charts={name: gap_chart(rows) for name, rows in _by_student(evaluation).items()},
        by_student=_by_student(evaluation),
        reasons=_reasons(evaluation),
        top=_top(evaluation),
        gates=[row for row in evaluation.students if row.gate],
        x=lambda percent: round(14 + percent * 3.72, 1),
        alone=ALONE,
        pipeline_file=str(pipeline_file) if pipeline_file is not None else "PIPELINE.yaml",
        latency_batch=LATENCY_BATCH,
        latency_repeats=LATENCY_REPEATS,
        dash=DASH,
    )
    return write_whole(Path(path), page.encode())


def print_table(evaluation: Evaluation, console: Console) -> None:
    """Print teachers and students in one table; it fits 80 columns where names are short, and 100 where they fold."""
    metric = METRICS[evaluation.metric].title
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{escape(evaluation.pipeline)}: {metric} on {evaluation.samples:,} test samples",
        title_style="bold",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    table.add_column(metric, justify="right", no_wrap=True)
    table.add_column("gap to\nbest", justify="right", no_wrap=True)
    if evaluation.foundation is not None:
        table.add_column("gap to\nfoundation", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for teacher in evaluation.teachers:
        cells = ["[dim]best teacher[/]" if teacher.name == evaluation.best_teacher else ""]
        if evaluation.foundation is not None:
            cells.append("")
        table.add_row(
            f"{escape(teacher.name)} [dim]{escape(teacher.role)}[/]",
            DASH if teacher.score is None else score_text(teacher.score, evaluation.metric),
            *cells,
            f"{teacher.parameters:,}",
        )
    by_student = _by_student(evaluation)
    for student, rows in by_student.items():
        table.add_section()
        for row in rows:
            # One student needs no name in front of every method.
            table.add_row(*_student_cells(evaluation, student if len(by_student) > 1 else "", row))
    console.print(table)
    largest = "foundation" if evaluation.foundation is not None else "largest"
    for student, rows in by_student.items():
        size = f"{rows[0].parameters:,} parameters, {compression_text(rows[0].compression)} smaller"
        console.print(f"Student {student}: {size} than the {largest} teacher.", markup=False, highlight=False)
    for reason in _reasons(evaluation):
        console.print(f"{DASH} {reason}", style="dim", markup=False, highlight=False)
    seeds = len(evaluation.students[0].seeds)
    console.print(
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds != 1 else ''}; [95 % interval] by paired bootstrap "
        f"over test samples and seeds.",
        style="dim",
        markup=False,
        highlight=False,
    )


def _student_cells(evaluation: Evaluation, student: str, row: MethodScore) -> list[str]:
    is_alone = row.method == ALONE
    what = "student alone" if is_alone else row.method
    cells = [escape(f"{student} {what}".strip()), mean_text(row, evaluation.metric)]
    cells.append(DASH if is_alone else escape(f"{gap_text(row.gap_best)} {interval_text(row.gap_best)}".rstrip()))
    if row.gap_foundation is not None:
        cells.append(DASH if is_alone else gap_text(row.gap_foundation))
    return [*cells, f"{row.parameters:,}"]


def score_text(value: float, metric: str) -> str:
    """Return a score as text: per cent for accuracy, four digits for errors."""
    return f"{value * 100:.2f} %" if metric == "accuracy" else f"{value:.4f}"


def mean_text(row: MethodScore, metric: str) -> str:
    """Return `mean ± std`; the mean alone for a single seed."""
    if metric == "accuracy":
        return f"{row.mean * 100:.2f}{'' if row.std is None else f' ± {row.std * 100:.2f}'} %"
    return f"{row.mean:.4f}{'' if row.std is None else f' ± {row.std:.4f}'}"


def gap_text(gap: Gap) -> str:
    """Return the share recovered as per cent; a dash where it is undefined."""
    return DASH if gap.recovered is None else f"{_percent(gap.recovered)} %"


def interval_text(gap: Gap) -> str:
    """Return `[low, high]` in per cent; nothing where there is no interval."""
    return "" if gap.low is None or gap.high is None else f"[{_percent(gap.low)}, {_percent(gap.high)}]"


def count_text(value: int) -> str:
    """Return a number with thousands separated."""
    return f"{value:,}"


def megabytes_text(nbytes: int) -> str:
    """Return bytes as megabytes."""
    return f"{nbytes / 1e6:,.1f}"


def compression_text(value: float) -> str:
    """Return how many times smaller."""
    return f"{value:,.0f}{TIMES}" if value >= 10 else f"{value:.1f}{TIMES}"


def _percent(share: float) -> str:
    text = f"{share * 100:,.0f}"
    return "0" if text == "-0" else text.replace("-", MINUS)


def _by_student(evaluation: Evaluation) -> dict[str, list[MethodScore]]:
    found: dict[str, list[MethodScore]] = {}
    for row in evaluation.students:
        found.setdefault(row.student, []).append(row)
    return found


def _top(evaluation: Evaluation) -> MethodScore | None:
    """Return the distilled student with the best score, if there is a gap that it could recover."""
    sign = 1 if evaluation.higher_is_better else -1
    rows = [row for row in evaluation.students if row.method != ALONE and row.gap_best.recovered is not None]
    return max(rows, key=lambda row: sign * row.mean, default=None)


def _reasons(evaluation: Evaluation) -> list[str]:
    """Return why a gap or an interval is missing, each reason once, with whom it is about."""
    found: dict[str, None] = {}
    for row in evaluation.students:
        for what, gap in (("best teacher", row.gap_best), ("foundation teacher", row.gap_foundation)):
            if gap is not None and gap.reason is not None:
                kind = "gap" if gap.recovered is None else "interval"
                # A missing gap is missing for every method of a student, a missing interval too: one line for all.
                found[f"{row.student}: no {kind} to the {what}: {gap.reason}"] = None
    return list(found)


@dataclass(frozen=True)
class Mark:
    """One method in the chart: its label, the point and the whisker, in per cent of the chart's width.

    `cut_low` and `cut_high` say that the whisker goes on outside the chart.
    """

    label: str
    text: str
    at: float
    low: float | None
    high: float | None
    cut_low: bool
    cut_high: bool


@dataclass(frozen=True)
class Chart:
    """Where everything in the gap chart lies, in per cent of its width; `None` marks are not drawn.

    Attributes:
        marks: the methods, best first.
        zero: of the student alone.
        hundred: of the best teacher.
        ticks: (position, label).
    """

    marks: tuple[Mark, ...]
    zero: float
    hundred: float
    ticks: tuple[tuple[float, str], ...]

    @property
    def is_cut(self) -> bool:
        """Whether a whisker goes on outside the chart."""
        return any(mark.cut_low or mark.cut_high for mark in self.marks)

    @staticmethod
    def anchor(at: float) -> str:
        """Return where a label at this position is held, so that it stays inside the chart."""
        return "start" if at < 15 else "end" if at > 85 else "middle"


def gap_chart(rows: Sequence[MethodScore]) -> Chart | None:
    """Lay out the gaps recovered against the best teacher; None if no method has one."""
    points = [
        (row.method, row.gap_best, row.gap_best.recovered)
        for row in rows
        if row.method != ALONE and row.gap_best.recovered is not None
    ]
    points.sort(key=lambda point: -point[2])
    if not points:
        return None
    shares = [0.0, 1.0, *(recovered for _, _, recovered in points)]
    # A whisker may be far longer than the differences that the chart is for: it is cut, and drawn with an arrow.
    room = CUT * (max(shares) - min(shares))
    lowest, highest = min(shares) - room, max(shares) + room
    ends = [min(max(v, lowest), highest) for _, gap, _ in points for v in (gap.low, gap.high) if v is not None]
    left, right, step = _axis(min(shares + ends), max(shares + ends))

    def at(share: float) -> float:
        return round((min(max(share, left), right) - left) / (right - left) * 100, 2)

    ticks = [left + step * k for k in range(round((right - left) / step) + 1)]
    return Chart(
        marks=tuple(
            Mark(
                label=method,
                text=gap_text(gap),
                at=at(recovered),
                low=None if gap.low is None else at(gap.low),
                high=None if gap.high is None else at(gap.high),
                cut_low=gap.low is not None and gap.low < left,
                cut_high=gap.high is not None and gap.high > right,
            )
            for method, gap, recovered in points
        ),
        zero=at(0.0),
        hundred=at(1.0),
        ticks=tuple((at(tick), f"{_percent(tick)} %") for tick in ticks),
    )


def _axis(low: float, high: float) -> tuple[float, float, float]:
    """Return ends and step of an axis with at most seven round steps that holds low to high and a little more."""
    step = next(s for s in _round_steps() if (high - low) / s <= 5)
    left = math.floor(low / step) * step
    right = math.ceil(high / step) * step
    return left, right, step


def _round_steps() -> list[float]:
    return [m * 10.0**k for k in range(-1, 12) for m in (1, 2, 2.5, 5)][1:]
