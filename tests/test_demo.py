"""The README's first minutes: the demo's command, then its Python example, in a folder of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run what `make demo` runs and return its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    done = subprocess.run(
        [sys.executable, "-m", "ddcache.cli", "run", "pipelines/digits/pipeline.yaml"],
        cwd=folder, capture_output=True, text=True, check=False, env={"COLUMNS": "120", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_demo_prints_every_row_of_the_table_and_where_the_report_lies(demo: tuple[Path, str]) -> None:
    folder, out = demo
    for row in ("student alone", "vit", "convnet", "histograms", "kd:vit", "average", "diversedistill"):
        assert row in out, out
    assert "Report: runs/digits/report.html" in out
    assert (folder / "runs/digits/report.html").stat().st_size > 5_000


def test_the_demo_writes_only_caches_runs_and_weights(demo: tuple[Path, str]) -> None:
    assert {path.name for path in demo[0].iterdir()} == {"pipelines", "caches", "runs", "weights"}


def test_distilled_digits_students_beat_the_student_alone(demo: tuple[Path, str]) -> None:
    evaluation = json.loads((demo[0] / "runs/digits/evaluation.json").read_text())
    mean = {student["method"]: student["mean"] for student in evaluation["students"]}
    best = max(teacher["score"] for teacher in evaluation["teachers"])
    assert mean["none"] < mean["diversedistill"] < best
    assert mean["none"] < mean["average"] < best


def test_the_readmes_python_example_runs_as_it_stands(demo: tuple[Path, str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    (demo[0] / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=demo[0], capture_output=True, text=True, check=False, timeout=120
    )
    (demo[0] / "example.py").unlink()
    assert done.returncode == 0, done.stderr
    assert "diversedistill" in done.stdout
    assert "digit-" in done.stdout
