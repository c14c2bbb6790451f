"""From a method's name and settings in a pipeline file to a distiller."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from ddcache.distill.average import Average
from ddcache.distill.diverse import DiverseDistill
from ddcache.distill.kd import KnowledgeDistillation
from ddcache.distill.none import NoDistillation
from ddcache.errors import ConfigError

if TYPE_CHECKING:
    from ddcache.distill.base import Distiller, Task, TeacherSpec

METHODS: dict[str, type[Distiller]] = {
    "none": NoDistillation,
    "kd": KnowledgeDistillation,
    "average": Average,
    "diversedistill": DiverseDistill,
}


def parse_method(name: str) -> tuple[type[Distiller], str | None]:
    """Split `method` or `method:teacher` into the method's class and the teacher's name.

    Raises:
        ConfigError: no such method, a method that takes a teacher without one, or a teacher too many.
    """
    method, colon, teacher = name.partition(":")
    if method not in METHODS:
        raise ConfigError(f"methods.{name}: unknown method; expected one of {list(METHODS)}")
    cls = METHODS[method]
    if cls.takes_teacher and not teacher:
        raise ConfigError(f"methods.{name}: expected a teacher, as in '{method}:<teacher>'")
    if colon and not cls.takes_teacher:
        raise ConfigError(f"methods.{name}: this method takes no teacher; write '{method}'")
    return cls, teacher or None


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Check a method's name and settings without building anything.

    The settings of a method are the keyword-only arguments of its class: numbers are finite, weights at least 0 and
    counts at least 1.

    Raises:
        ConfigError: `methods.<name>.<setting>: …`, saying what was expected and what was found.
    """
    cls, _ = parse_method(name)
    known = _settings_of(cls)
    for setting, value in settings.items():
        where = f"methods.{name}.{setting}"
        if setting not in known:
            raise ConfigError(f"{where}: unknown setting; expected one of {list(known)}")
        if not _fits(value, known[setting].annotation):
            raise ConfigError(f"{where}: expected {_describe(known[setting].annotation)}, found {value!r}")
    try:
        cls.check({setting: parameter.default for setting, parameter in known.items()} | dict(settings))
    except ConfigError as error:
        raise ConfigError(f"methods.{name}.{error}") from error


def build_distiller(
    name: str, settings: Mapping[str, Any], student_dim: int, teachers: Sequence[TeacherSpec], task: Task
) -> Distiller:
    """Build a method's distiller; its parameters are drawn from torch's global generator.

    Args:
        name: a key of `METHODS`, with `:<teacher>` where the method takes one.
        settings: its settings; the others keep their defaults.
        student_dim: the width of the student's hidden state.
        teachers: the whole committee; a method that takes a teacher gets that one.
        task: what the student learns.

    Raises:
        ConfigError: a wrong name or setting, or teachers that the method can't use.
    """
    check_settings(name, settings)
    cls, wanted = parse_method(name)
    if wanted is not None:
        chosen = [teacher for teacher in teachers if teacher.name == wanted]
        if not chosen:
            raise ConfigError(
                f"methods.{name}: expected a teacher among {[t.name for t in teachers]}, found {wanted!r}"
            )
        teachers = chosen
    return cls(student_dim, teachers, task, **settings)


def _settings_of(cls: type[Distiller]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(value: Any, annotation: Any) -> bool:
    """Tell whether a setting's value fits its annotation: float, int, Literal, Sequence[float], None or a union."""
    for option in _alternatives(annotation):
        if option is types.NoneType:
            fits = value is None
        elif option is float:
            fits = _is_number(value) and value >= 0
        elif option is int:
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        elif get_origin(option) is Literal:
            fits = isinstance(value, str) and value in get_args(option)
        elif get_origin(option) is Sequence:
            fits = isinstance(value, list | tuple) and all(map(_is_number, value))
        else:
            raise AssertionError(f"no rule for settings annotated {option!r}; add one here and to _describe")
        if fits:
            return True
    return False


def _describe(annotation: Any) -> str:
    def one(option: Any) -> str:
        if get_origin(option) is Literal:
            return f"one of {list(get_args(option))}"
        if get_origin(option) is Sequence:
            return "a list of finite numbers"
        return {types.NoneType: "null", float: "a number >= 0", int: "a whole number >= 1"}[option]

    return " or ".join(map(one, _alternatives(annotation)))
