from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from ddcache.config import Pipeline, load_pipeline
from tests.tiny import write_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Deadlines measure the machine, not the property; the same examples every run keep CI's verdicts repeatable.
settings.register_profile("ddcache", deadline=None, derandomize=True)
settings.load_profile("ddcache")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Pipeline]:
    """Return a function that loads the tiny pipeline, writing into the test's folder, with changes."""

    def load(**changes: object) -> Pipeline:
        return load_pipeline(write_pipeline(tmp_path, **changes))

    return load


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
