"""The pipeline file: read, checked and frozen before any work starts.

A pipeline file names callables (`factory: package.module:callable`) that ddcache imports and calls, so it is code
that you trust, like a Makefile.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ddcache.errors import ConfigError
from ddcache.names import parse_name

Name = Annotated[str, AfterValidator(parse_name)]
POOLS = "'none', 'mean', 'cls' or 'tokens:K' with K >= 1"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _parse_factory(value: object) -> object:
    return {"factory": value} if isinstance(value, str) else value


def _parse_factory_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise ValueError(f"expected 'package.module:callable', found {text!r}")
    return text


def _parse_pool(text: str) -> str:
    if not re.fullmatch(r"none|mean|cls|tokens:[1-9]\d*", text):
        raise ValueError(f"expected one of {POOLS}, found {text!r}")
    return text


def _parse_local(text: str) -> Path:
    if "://" in text:
        raise ValueError(f"expected a local folder, found the URL {text!r}")
    return Path(text)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


# YAML 1.1 reads 1e-3 as text, so a number may be given as text.
Number = Annotated[float, Field(strict=False)]
LocalPath = Annotated[Path, BeforeValidator(lambda v: _parse_local(v) if isinstance(v, str) else v)]


class Factory(_Model):
    """A callable and its keyword arguments; a plain string is a callable without arguments."""

    factory: Annotated[str, AfterValidator(_parse_factory_name)]
    args: dict[str, Any] = {}

    def load(self, where: str, **extra: object) -> Callable[..., Any]:
        """Import the callable and check that it takes `args` and the keyword arguments named in `extra`.

        Raises:
            ConfigError: no such module or attribute, or the arguments don't fit its signature.
        """
        module_name, _, attribute = self.factory.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(
                f"{where}.factory: cannot import {module_name!r}: {error}; run from the folder that holds it, "
                f"or install it"
            ) from error
        found = getattr(module, attribute, None)
        if not callable(found):
            raise ConfigError(f"{where}.factory: expected a callable {attribute!r} in {module_name!r}, found {found!r}")
        try:
            inspect.signature(found).bind(**extra, **self.args)
        except TypeError as error:
            raise ConfigError(
                f"{where}.args: {self.factory}{inspect.signature(found)} does not take these arguments: {error}"
            ) from error
        callable_: Callable[..., Any] = found
        return callable_


FactoryField = Annotated[Factory, BeforeValidator(_parse_factory)]


class TaskConfig(_Model):
    """What the student learns and how it is judged."""

    kind: Literal["regression", "classification"]
    target: Name
    metric: Literal["rmse", "mae", "accuracy"]
    temperature: Annotated[Number, Field(gt=0)] = 2.0

    @model_validator(mode="after")
    def _check_metric(self) -> Self:
        allowed = {"regression": ("rmse", "mae"), "classification": ("accuracy",)}[self.kind]
        if self.metric not in allowed:
            raise ValueError(f"metric of a {self.kind}: expected one of {list(allowed)}, found {self.metric!r}")
        return self


class TapConfig(_Model):
    """A module whose output is captured.

    `keyed_by` names entity columns: the tap then keeps one row a distinct entity instead of one a sample, and
    whatever the module gives must depend on those columns only.
    """

    module: str
    pool: Annotated[str, AfterValidator(_parse_pool)] = "none"
    dtype: Literal["float16", "float32"] = "float16"
    kind: Literal["feature", "output"] = "feature"
    select: str | int | None = None
    keyed_by: Annotated[tuple[Name, ...] | None, BeforeValidator(lambda v: _to_tuple(v))] = None


def _to_tuple(value: object) -> object:
    value = _as_list(value)
    return tuple(value) if isinstance(value, list) else value


class TeacherConfig(Factory):
    """A frozen teacher: where its module comes from and what of it is kept."""

    role: Literal["foundation", "expert"]
    keyed_by: Annotated[tuple[Name, ...], BeforeValidator(_to_tuple)] = ()
    taps: Annotated[dict[Name, TapConfig], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)] = 256
    shard_rows: Annotated[int, Field(ge=1)] | None = None
    autocast: Literal["bfloat16", "float16"] | None = None
    device: str = "cpu"

    @model_validator(mode="after")
    def _check_taps(self) -> Self:
        outputs = [name for name, tap in self.taps.items() if tap.kind == "output"]
        if len(outputs) > 1:
            raise ValueError(f"expected at most one tap of kind 'output', found {outputs}")
        return self

    def key_of(self, tap: str) -> tuple[str, ...]:
        """Return the entity columns that a tap is keyed by; () means one row a sample."""
        own = self.taps[tap].keyed_by
        return self.keyed_by if own is None else own

    @property
    def output_tap(self) -> str | None:
        """The tap that holds the teacher's answer to the task, if it has one."""
        return next((name for name, tap in self.taps.items() if tap.kind == "output"), None)


class StudentConfig(Factory):
    """A student: `hidden` names the module whose output is its representation, `head` the module that maps it on."""

    hidden: str
    head: str


class MethodConfig(_Model):
    """A distillation method, written `name`, `name:argument` or `name: {setting: value}`."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*(:[A-Za-z0-9][A-Za-z0-9._-]*)?$")]
    settings: dict[str, Any] = {}


def _parse_method(value: object) -> object:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, settings),) = value.items()
        return {"name": name, "settings": settings or {}}
    return value


class TrainConfig(_Model):
    """Stage two: one student is trained per entry of students x methods x seeds."""

    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 1024
    lr: Annotated[Number, Field(gt=0)] = 1e-2
    distiller_lr: Annotated[Number, Field(gt=0)] = 3e-3
    weight_decay: Annotated[Number, Field(ge=0)] = 1e-2
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_to_tuple), Field(min_length=1)] = (0,)
    device: str = "cpu"


class Pipeline(_Model):
    """A checked pipeline file. Paths are relative to the current directory."""

    name: Name
    cache: LocalPath
    runs: LocalPath
    source: FactoryField
    prepare: FactoryField | None = None
    task: TaskConfig
    teachers: Annotated[dict[Name, TeacherConfig], Field(min_length=1)]
    students: Annotated[dict[Name, StudentConfig], Field(min_length=1)]
    methods: Annotated[
        tuple[Annotated[MethodConfig, BeforeValidator(_parse_method)], ...],
        BeforeValidator(_to_tuple),
        Field(min_length=1),
    ]
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check_methods(self) -> Self:
        names = [method.name for method in self.methods]
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"methods: expected each once, found {repeated} more than once")
        for name in names:
            teacher = name.partition(":")[2]
            if teacher and teacher not in self.teachers:
                raise ValueError(f"methods: {name!r} names a teacher that is not among {list(self.teachers)}")
        return self

    @property
    def foundation(self) -> str | None:
        """The first teacher of role foundation."""
        return next((n for n, t in self.teachers.items() if t.role == "foundation"), None)


def load_pipeline(path: str | Path, overrides: tuple[str, ...] = ()) -> Pipeline:
    """Read and check a pipeline file.

    Args:
        path: a YAML file.
        overrides: `field.path=value`, the value in YAML, each set after reading the file.

    Raises:
        ConfigError: the file is missing or no YAML, a field is unknown, missing or wrong, or a factory cannot be
            imported or does not take its arguments. Every problem of the schema is listed with its field's path.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the pipeline file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(content).__name__}")
    for override in overrides:
        _apply_override(content, override)
    try:
        pipeline = Pipeline.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {_describe(e)}" for e in error.errors())) from error
    return pipeline


def check_factories(pipeline: Pipeline) -> None:
    """Import every factory of a pipeline and check its arguments, so that a typo costs no work.

    Raises:
        ConfigError: naming the field.
    """
    pipeline.source.load("source")
    if pipeline.prepare is not None:
        pipeline.prepare.load("prepare", source=None)
    for name, teacher in pipeline.teachers.items():
        teacher.load(f"teachers.{name}")
    for name, student in pipeline.students.items():
        student.load(f"students.{name}")


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    fields = path.split(".")
    if not equals or not all(fields):
        raise ConfigError(f"--set: expected FIELD.PATH=VALUE, found {override!r}")
    node = content
    for field in fields[:-1]:
        child = node.setdefault(field, {})
        if isinstance(child, str) and field in ("source", "prepare"):
            child = node[field] = {"factory": child}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {field!r} is not a mapping of fields")
        node = child
    try:
        node[fields[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error


def _describe(error: Any) -> str:
    """Say where, what was expected and what was found, for one pydantic error."""
    where = ".".join(str(part) for part in error["loc"]) or "pipeline"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown field; check its spelling against the reference"
    if error["type"] == "missing":
        return f"{where}: this field is required"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    found = error["input"]
    shown = repr(found) if not isinstance(found, dict | list) else type(found).__name__
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, found {shown}"
