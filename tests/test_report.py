from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from ddcache.evaluate import Evaluation, MethodScore, RunScore, TeacherScore
from ddcache.report import gap_chart, print_table, write_report
from ddcache.statistics import Gap

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "<script>alert('x')</script>&\"[bold]"
BEHIND = "the teacher is not better than the student alone"


def method(name: str, gap: Gap, student: str = "mlp", **changes: object) -> MethodScore:
    fields: dict = {
        "student": student,
        "method": name,
        "seeds": (0, 1),
        "scores": (0.91, 0.93),
        "mean": 0.92,
        "std": 0.0141,
        "gap_best": gap,
        "gap_foundation": gap,
        "parameters": 3466,
        "compression": 93.7,
        "latency_ms": 0.21,
        "gate": None,
        "runs": tuple(RunScore(s, 0.92, 0.93, 3, 5, 1.2) for s in (0, 1)),
    }
    return MethodScore(**(fields | changes))


def evaluation(*methods: MethodScore, **changes: object) -> Evaluation:
    base = Evaluation(
        pipeline="digits",
        task="classification",
        target="digit",
        metric="accuracy",
        higher_is_better=True,
        samples=647,
        splits={"train": 300, "test": 647},
        teachers=(
            TeacherScore("vit", "foundation", 0.9799, 324_826, 1797, 1_797_000),
            TeacherScore("convnet", "expert", 0.9861, 82_282, 1797, 416_904),
            TeacherScore("groups", "expert", None, 100, 30, 1000),
        ),
        students=methods
        or (
            method("none", Gap(0.0, 0.0, 0.0)),
            method("kd:vit", Gap(0.431, 0.2, 0.65), mean=0.949),
            method("diversedistill", Gap(0.37, -0.17, 1.58), mean=0.945, gate={"vit": 0.25, "convnet": 0.75}),
        ),
        best_teacher="convnet",
        foundation="vit",
        resamples=2000,
        threads=2,
        saved_passes=324_000,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def page(tmp_path: Path, what: Evaluation, **keywords: str) -> str:
    return write_report(what, tmp_path / "deep" / "report.html", **keywords).read_text(encoding="utf-8")


def table(what: Evaluation, width: int = 100) -> str:
    out = io.StringIO()
    print_table(what, Console(file=out, width=width, color_system=None))
    return out.getvalue()


class Page(HTMLParser):
    """Collects tags, attributes and visible text, and checks that the tags are closed."""

    void = ("meta", "br", "circle", "line", "path", "rect", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack[-1] != tag and self.stack[-1] == "li":
            self.stack.pop()
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, evaluation())
    tags = Page(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not [attrs for _, attrs in tags if "src" in attrs or "href" in attrs]


def test_the_page_shows_every_number(tmp_path: Path) -> None:
    text = " ".join(Page(page(tmp_path, evaluation(), pipeline_file="some/pipeline.yaml")).text.split())
    for expected in (
        "94.90 ± 1.41 %", "43 % [20, 65]", "37 % [−17, 158]", "98.61 %", "324,826", "student alone", "best teacher",
        "94× smaller", "647 labelled test samples", "0.75", "ddcache run some/pipeline.yaml", "2,000", "324,000",
    ):  # fmt: skip
        assert expected in text, expected


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    hostile = evaluation(
        method("none", Gap(0.0, 0.0, 0.0), HOSTILE),
        method(HOSTILE, Gap(0.5, 0.1, 0.9), HOSTILE, gate={HOSTILE: 1.0}),
        method("kd", Gap(None, reason=HOSTILE), HOSTILE),
        pipeline=HOSTILE,
        target=HOSTILE,
        teachers=(TeacherScore(HOSTILE, HOSTILE, 0.9, 10, 10, 10),),
        best_teacher=HOSTILE,
        foundation=HOSTILE,
        splits={HOSTILE: 3},
    )
    text = page(tmp_path, hostile, pipeline_file=HOSTILE)
    assert "<script" not in text
    assert Page(text).text.count(HOSTILE) >= 12
    assert HOSTILE in table(hostile, 300)


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_table_fits_80_and_100_columns(width: int) -> None:
    lines = table(evaluation(), width).splitlines()
    assert max(map(len, lines)) <= width
    (row,) = [line for line in lines if "kd:vit" in line]
    assert " ".join(row.split()) == "kd:vit 94.90 ± 1.41 % 43 % [20, 65] 43 % 3,466"
    (best,) = [line for line in lines if "best teacher" in line]
    assert " ".join(best.split()) == "convnet expert 98.61 % best teacher 82,282"
    assert "Student mlp: 3,466 parameters, 94× smaller than the foundation teacher." in lines


def test_long_names_fold_and_keep_the_numbers_whole() -> None:
    name = "a-teacher-with-a-long-name" * 2
    text = table(evaluation(method("none", Gap(0.0)), method(f"kd:{name}", Gap(-0.37, -1.17, 0.58))))
    assert max(map(len, text.splitlines())) <= 100
    assert "−37 % [−117, 58]" in text


def test_undefined_gaps_show_a_dash_and_the_reason_and_no_percentage(tmp_path: Path) -> None:
    gap = Gap(None, reason=BEHIND)
    undefined = evaluation(method("none", gap), method("kd:vit", gap))
    (row,) = [line for line in table(undefined).splitlines() if "kd:vit" in line]
    assert " ".join(row.split()) == "kd:vit 92.00 ± 1.41 % – – 3,466"
    assert table(undefined).count(BEHIND) == 2  # to the best and to the foundation teacher
    parsed = Page(page(tmp_path, undefined))
    assert BEHIND in parsed.text
    assert "svg" not in {tag for tag, _ in parsed.tags}
    assert "None" not in parsed.text
    assert "None" not in table(undefined)


def test_a_gap_without_an_interval_is_drawn_without_a_whisker(tmp_path: Path) -> None:
    text = page(tmp_path, evaluation(method("none", Gap(0.0)), method("kd:vit", Gap(0.5, reason="too noisy"))))
    assert 'class="point"' in text
    assert 'class="whisker"' not in text
    assert "too noisy" in text


@pytest.mark.parametrize("metric", ["rmse", "mae"])
def test_errors_are_shown_with_four_digits(tmp_path: Path, metric: str) -> None:
    errors = evaluation(metric=metric, task="regression", higher_is_better=False)
    assert "0.9490 ± 0.0141" in table(errors)
    assert "0.9490 ± 0.0141" in page(tmp_path, errors)


def test_no_foundation_one_seed_and_no_distillation_leave_no_hole(tmp_path: Path) -> None:
    few = evaluation(
        method("none", Gap(0.0), gap_foundation=None, std=None, seeds=(0,), scores=(0.9,)), foundation=None
    )
    assert "foundation" not in table(few).replace("vit foundation", "")
    text = Page(page(tmp_path, few)).text
    assert "None" not in text
    assert "smaller than the largest teacher" in text


def test_a_far_whisker_is_cut_with_an_arrow_so_that_the_points_stay_apart(tmp_path: Path) -> None:
    rows = [method("none", Gap(0.0)), method("a", Gap(0.2, -90.0, 0.4)), method("b", Gap(0.8, 0.5, 1.1))]
    chart = gap_chart(rows)
    assert chart is not None
    assert [(m.cut_low, m.cut_high) for m in chart.marks] == [(False, False), (True, False)]
    assert chart.marks[0].at - chart.marks[1].at > 10
    assert "m5-4l-5 4l5 4" in page(tmp_path, evaluation(*rows))


def test_several_students_have_a_chart_each(tmp_path: Path) -> None:
    rows = [method(m, Gap(g, g, g), s) for s in ("small", "large") for m, g in (("none", 0.0), ("average", 0.5))]
    text = page(tmp_path, evaluation(*rows))
    assert text.count("<svg") == 2
    assert "Gap recovered: large" in text


@pytest.mark.parametrize(
    "gaps",
    [
        [Gap(0.4, 0.2, 0.6)],
        [Gap(1.2, 0.9, 1.5), Gap(-0.3, -1.0, 0.2)],
        [Gap(-30.0, -50.0, -10.0)],
        [Gap(250.0, 3.0, 4e5)],
        [Gap(0.5), Gap(0.5)],
    ],
)
def test_the_chart_holds_everything_it_draws(gaps: list[Gap]) -> None:
    chart = gap_chart([method("none", Gap(0.0)), *(method(f"m{i}", gap) for i, gap in enumerate(gaps))])
    assert chart is not None
    assert len(chart.marks) == len(gaps)
    drawn = [chart.zero, chart.hundred, *(at for at, _ in chart.ticks)]
    drawn += [v for m in chart.marks for v in (m.low, m.at, m.high) if v is not None]
    assert all(0 <= at <= 100 for at in drawn)
    assert chart.zero < chart.hundred
    assert 2 <= len(chart.ticks) <= 10
    assert {"0 %"} <= {label for _, label in chart.ticks}
    assert [m.at for m in chart.marks] == sorted((m.at for m in chart.marks), reverse=True)
