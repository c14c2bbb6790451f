"""ddcache: run your frozen teachers once; distil as many students as you like.

The public API. Each name is imported from its module when it is first used, so that `import ddcache` and
`ddcache --help` don't wait for torch, zarr and dask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddcache.cache.reader import Cache
    from ddcache.cache.samples import Samples
    from ddcache.config import Pipeline, load_pipeline
    from ddcache.distill import DiverseDistill, StudentState, TapSpec, Task, TeacherSpec, build_distiller
    from ddcache.errors import (
        CacheError,
        ConfigError,
        DdcacheError,
        SourceError,
        StaleCacheError,
        TeacherError,
        TrainError,
    )
    from ddcache.evaluate import Evaluation, evaluate_students
    from ddcache.extract import extract_features, load_source, prepare
    from ddcache.loading import Batch, FeatureLoader
    from ddcache.plan import plan_extraction
    from ddcache.report import write_report
    from ddcache.sources import ArraySource, Source, SubsetSource
    from ddcache.teachers import FrozenModel
    from ddcache.train import teacher_specs, train_students

_MODULE_OF = {
    "ArraySource": "ddcache.sources",
    "Batch": "ddcache.loading",
    "Cache": "ddcache.cache.reader",
    "CacheError": "ddcache.errors",
    "ConfigError": "ddcache.errors",
    "DdcacheError": "ddcache.errors",
    "DiverseDistill": "ddcache.distill",
    "Evaluation": "ddcache.evaluate",
    "FeatureLoader": "ddcache.loading",
    "FrozenModel": "ddcache.teachers",
    "Pipeline": "ddcache.config",
    "Samples": "ddcache.cache.samples",
    "Source": "ddcache.sources",
    "SourceError": "ddcache.errors",
    "StaleCacheError": "ddcache.errors",
    "StudentState": "ddcache.distill",
    "SubsetSource": "ddcache.sources",
    "TapSpec": "ddcache.distill",
    "Task": "ddcache.distill",
    "TeacherError": "ddcache.errors",
    "TeacherSpec": "ddcache.distill",
    "TrainError": "ddcache.errors",
    "build_distiller": "ddcache.distill",
    "evaluate_students": "ddcache.evaluate",
    "extract_features": "ddcache.extract",
    "load_pipeline": "ddcache.config",
    "load_source": "ddcache.extract",
    "plan_extraction": "ddcache.plan",
    "prepare": "ddcache.extract",
    "teacher_specs": "ddcache.train",
    "train_students": "ddcache.train",
    "write_report": "ddcache.report",
}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ddcache' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_MODULE_OF)
