from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ddcache.config import Pipeline, check_factories, load_pipeline
from ddcache.errors import ConfigError
from ddcache.train import check_training
from tests.tiny import write_pipeline

if TYPE_CHECKING:
    from pathlib import Path


def test_a_right_file_loads_and_its_factories_exist(tmp_path: Path) -> None:
    pipeline = load_pipeline(write_pipeline(tmp_path))
    check_factories(pipeline)
    check_training(pipeline)
    assert pipeline.teachers["groups"].key_of("table") == ("group",)
    assert pipeline.teachers["big"].output_tap == "output"
    assert pipeline.foundation == "big"


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("unknown field", {"teachers__big__tapps": {}}, "teachers.big.tapps: unknown field"),
    ("unknown top field", {"sourse": "a:b"}, "sourse: unknown field"),
    ("missing field", {"task": None}, "task: this field is required"),
    ("pool", {"teachers__big__taps__body__pool": "max"}, "teachers.big.taps.body.pool: expected one of 'none', 'mean'"),
    ("tokens:0", {"teachers__big__taps__body__pool": "tokens:0"}, "found 'tokens:0'"),
    ("dtype", {"teachers__big__taps__body__dtype": "float61"}, "teachers.big.taps.body.dtype:"),
    ("factory form", {"source": "tests.tiny"}, "source.factory: expected 'package.module:callable'"),
    ("metric of other task", {"task__metric": "rmse"}, "metric of a classification: expected one of ['accuracy']"),
    ("teacher name", {"teachers__../x": {"role": "expert"}}, "teachers.../x"),
    ("kd of nobody", {"methods": ["kd:nobody"]}, "'kd:nobody' names a teacher that is not among"),
    ("method twice", {"methods": ["none", "none"]}, "found ['none'] more than once"),
    ("epochs", {"train__epochs": 0}, "train.epochs: input should be greater than or equal to 1, found 0"),
    ("lr text", {"train__lr": "fast"}, "train.lr:"),
    ("no taps", {"teachers__big__taps": {}}, "teachers.big.taps:"),
    ("url", {"cache": "s3://bucket/cache"}, "cache: expected a local folder, found the URL"),
    ("two outputs", {"teachers__big__taps__body__kind": "output"}, "at most one tap of kind 'output'"),
]


@pytest.mark.parametrize(("changes", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named_with_the_path_of_its_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(write_pipeline(tmp_path, **changes))
    assert message in str(caught.value)


FACTORY_MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("no module", {"source": "tests.tinny:source"}, "source.factory: cannot import 'tests.tinny'"),
    ("no callable", {"source": "tests.tiny:sauce"}, "source.factory: expected a callable 'sauce' in 'tests.tiny'"),
    ("no such argument", {"teachers__big__args": {"widht": 3}}, "teachers.big.args: tests.tiny:net"),
    ("missing argument", {"teachers__big__factory": "tests.tiny:broken"}, "missing a required argument: 'how'"),
    ("prepare takes no source", {"prepare": "tests.tiny:net"}, "prepare.args: tests.tiny:net"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [m[1:] for m in FACTORY_MISTAKES], ids=[m[0] for m in FACTORY_MISTAKES]
)
def test_a_factory_that_cannot_be_called_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pipeline = load_pipeline(write_pipeline(tmp_path, **changes))
    with pytest.raises(ConfigError) as caught:
        check_factories(pipeline)
    assert message in str(caught.value)


def test_every_problem_of_a_file_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(write_pipeline(tmp_path, train__epochs=0, task__metric="rmse", name="../up"))
    assert {"train.epochs", "task", "name"} <= {
        line.strip().partition(":")[0] for line in str(caught.value).split("\n")
    }


def test_a_missing_or_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the pipeline file"):
        load_pipeline(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_pipeline(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_pipeline(tmp_path / "list.yaml")


def test_set_changes_a_field_and_is_checked_like_the_file(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path)
    pipeline = load_pipeline(path, ("train.seeds=[3, 4]", "source.args.n=80", "train.lr=1e-3"))
    assert pipeline.train.seeds == (3, 4)
    assert pipeline.source.args == {"n": 80}
    assert pipeline.train.lr == 1e-3
    with pytest.raises(ConfigError, match="train.sedes: unknown field"):
        load_pipeline(path, ("train.sedes=[3]",))
    with pytest.raises(ConfigError, match="expected FIELD.PATH=VALUE"):
        load_pipeline(path, ("train.seeds",))


def test_a_loaded_pipeline_is_frozen(tmp_path: Path) -> None:
    pipeline: Pipeline = load_pipeline(write_pipeline(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        pipeline.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"diversedistill": {"gaet": "uniform"}}, "methods.diversedistill.gaet: unknown setting"),
        ("disten", "methods.disten: unknown method"),
        ("kd", "methods.kd: expected a teacher"),
    ],
)
def test_a_wrong_method_is_refused(tmp_path: Path, method: object, message: str) -> None:
    pipeline = load_pipeline(write_pipeline(tmp_path, methods=[method]))
    with pytest.raises(ConfigError) as caught:
        check_training(pipeline)
    assert message in str(caught.value)
