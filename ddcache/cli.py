"""The command line: parse, call one library function, print."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Column, Table

from ddcache.errors import DdcacheError
from ddcache.progress import Bars

# The functions that do the work are imported by the commands that call them: torch, zarr and dask together take
# seconds to import, and `ddcache --help` needs none of them.
if TYPE_CHECKING:
    from ddcache.config import Pipeline
    from ddcache.evaluate import Evaluation
    from ddcache.extract import ExtractReport
    from ddcache.train import TrainReport

F = TypeVar("F", bound=Callable[..., Any])

out = Console()
err = Console(stderr=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddcache")
def cli() -> None:
    """Run your frozen teachers once; distil as many students as you like.

    A PIPELINE is a YAML file that names Python callables, which are imported and called: run only files you trust.
    Its paths and modules are looked up from the current directory.
    """


def main() -> None:
    """Run the command line: exit 0 when done, 1 when the work failed, 2 for wrong usage or configuration."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        err.print("\nInterrupted. What was committed stays; the same command goes on from there.")
        sys.exit(130)
    except DdcacheError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except OSError as error:  # a folder that can't be written, a disk that is full
        _print_error(error)
        sys.exit(1)


def _pipeline_command(function: F) -> F:
    """Give a command the arguments that all pipeline commands share."""
    function = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")(
        function
    )
    function = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="FIELD.PATH=VALUE",
        help="Change a field of the pipeline file, such as source.args.root=data/ml-100k. May be given again.",
    )(function)
    return click.argument("pipeline", type=click.Path(path_type=Path))(function)


def _load(path: Path, overrides: tuple[str, ...]) -> Pipeline:
    """Read a pipeline file and check all of it, factories and methods included, before any work starts."""
    from ddcache.config import check_factories, load_pipeline
    from ddcache.train import check_training

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    pipeline = load_pipeline(path, overrides)
    _log_to_stderr(pipeline)
    check_factories(pipeline)
    check_training(pipeline)
    return pipeline


def _log_to_stderr(pipeline: Pipeline) -> None:
    """Show what ddcache and the pipeline's own code log; other libraries only when they warn."""
    handler = RichHandler(console=err, show_path=False, show_time=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    factories = [pipeline.source, *pipeline.teachers.values(), *pipeline.students.values()]
    for package in {"ddcache", *(factory.factory.partition(":")[0].partition(".")[0] for factory in factories)}:
        logging.getLogger(package).setLevel(logging.INFO)


@cli.command()
@_pipeline_command
def plan(pipeline: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Tell what extract would take: forward passes, bytes, disk, time.

    Prepares the teachers if that is not done, and runs two batches of each; writes no cache.
    """
    checked = _load(pipeline, overrides)
    from ddcache.extract import prepare
    from ddcache.plan import plan_extraction

    prepare(checked)
    result = plan_extraction(checked)
    if as_json:
        _print_json(result.to_json())
        return
    table = Table("teacher", "tap", *(_right(c) for c in ("rows", "MB", "to run", "expected")), title=checked.name)
    for name, teacher in result.teachers.items():
        for position, (tap, size) in enumerate(teacher.nbytes.items()):
            once = (f"{teacher.remaining:,}", _duration(teacher.seconds)) if position == 0 else ("", "")
            table.add_row("" if position else name, tap, f"{teacher.rows[tap]:,}", f"{size / 1e6:,.1f}", *once)
    out.print(table)
    out.print(
        f"{result.nbytes / 1e6:,.1f} MB in {result.files:,} files; {result.free_bytes / 1e9:,.1f} GB free at "
        f"{checked.cache}"
    )
    out.print(
        f"Expected time: {_duration(result.seconds)}. A student trained with live teachers would run them for "
        f"{_duration(result.seconds_per_student)}, so the cache pays for itself after {result.break_even:.2g} of them."
    )


@cli.command()
@_pipeline_command
@click.option("--rebuild", multiple=True, metavar="TEACHER", help="Throw away this teacher's cached features first.")
def extract(pipeline: Path, overrides: tuple[str, ...], as_json: bool, rebuild: tuple[str, ...]) -> None:
    """Run the frozen teachers over all samples and cache their features; goes on where it was stopped."""
    checked = _load(pipeline, overrides)
    from ddcache.extract import extract_features, prepare

    prepare(checked)
    report = extract_features(checked, rebuild=rebuild, report_to=Bars(err))
    if as_json:
        _print_json(vars(report))
    else:
        _print_extracted(report, checked)


@cli.command()
@_pipeline_command
@click.option("--student", "students", multiple=True, help="Only this student. May be given again.")
@click.option("--method", "methods", multiple=True, help="Only this method. May be given again.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only this seed. May be given again.")
def train(
    pipeline: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    students: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
) -> None:
    """Train every student x method x seed from the cache; what is finished is kept."""
    checked = _load(pipeline, overrides)
    from ddcache.train import train_students

    report = train_students(checked, students=students, methods=methods, seeds=seeds, report_to=Bars(err))
    if as_json:
        _print_json({"trained": report.trained, "runs": [run.model_dump(mode="json") for run in report.runs]})
    else:
        _print_trained(report, checked)


@cli.command()
@_pipeline_command
def evaluate(pipeline: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score every trained student and every teacher on the test rows, and write the report."""
    checked = _load(pipeline, overrides)
    _evaluate(checked, pipeline, as_json)


@cli.command()
@_pipeline_command
def run(pipeline: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Prepare, extract, train and evaluate: all of it, each step only as far as it is not done yet."""
    checked = _load(pipeline, overrides)
    from ddcache.extract import extract_features, load_source, prepare
    from ddcache.train import train_students

    source = load_source(checked)
    prepare(checked, source)
    extracted = extract_features(checked, source=source, report_to=Bars(err))
    if not as_json:
        _print_extracted(extracted, checked)
    trained = train_students(checked, report_to=Bars(err))
    if not as_json:
        _print_trained(trained, checked)
    _evaluate(checked, pipeline, as_json)


@cli.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def info(cache: Path, as_json: bool) -> None:
    """Tell what a cache holds."""
    from ddcache.cache.reader import Cache

    content = Cache.open(cache).info()
    if as_json:
        _print_json(content)
        return
    splits = ", ".join(f"{name} {count:,}" for name, count in content["splits"].items())
    out.print(f"{content['path']}: {content['samples']:,} samples ({splits})", highlight=False)
    table = Table("teacher", "tap", "shape", "dtype", "keyed by", *(_right(c) for c in ("shards", "MB")))
    for name, array in content["inputs"].items():
        table.add_row("(inputs)", name, *_array_cells(array))
    for name, teacher in content["teachers"].items():
        label = name if teacher["complete"] else f"{name} (partial)"
        for position, (tap, array) in enumerate(teacher["taps"].items()):
            table.add_row("" if position else label, tap, *_array_cells(array))
    out.print(table)


def _evaluate(pipeline: Pipeline, path: Path, as_json: bool) -> None:
    from ddcache.evaluate import evaluate_students
    from ddcache.report import print_table, write_report

    evaluation: Evaluation = evaluate_students(pipeline)
    report = write_report(evaluation, pipeline.runs / "report.html", pipeline_file=path)
    if as_json:
        _print_json({**evaluation.to_json(), "report": str(report)})
        return
    print_table(evaluation, out)
    out.print(f"Report: {report}", highlight=False, soft_wrap=True)


def _print_extracted(report: ExtractReport, pipeline: Pipeline) -> None:
    for teacher, passes in report.forward_passes.items():
        what = f"{passes:,} forward passes" if passes else "0 forward passes, all of it was cached"
        out.print(f"{teacher}: {what}", highlight=False)
    out.print(
        f"Cache {pipeline.cache}: {report.shards_written:,} shards written ({report.nbytes / 1e6:,.1f} MB), "
        f"{report.shards_kept:,} kept, {_duration(report.seconds)}",
        highlight=False,
        soft_wrap=True,
    )


def _print_trained(report: TrainReport, pipeline: Pipeline) -> None:
    kept = len(report.runs) - report.trained
    seconds = sum(run.seconds for run in report.runs)
    out.print(
        f"Runs {pipeline.runs}: {report.trained} trained, {kept} finished before; {_duration(seconds)} of training in "
        f"all; 0 teacher forward passes",
        highlight=False,
        soft_wrap=True,
    )


def _array_cells(array: dict[str, Any]) -> tuple[str, ...]:
    shape = " x ".join(f"{n:,}" for n in array["shape"])
    keyed_by = ", ".join(array["keyed_by"]) or "sample"
    return shape, array["dtype"], keyed_by, array["shards"], f"{array['nbytes'] / 1e6:,.1f}"


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print_error(error: Exception) -> None:
    err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, default=str))


if __name__ == "__main__":
    main()
