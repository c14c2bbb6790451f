"""Weights that a pipeline's `prepare` leaves for its teachers: safetensors files that know what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ddcache import TeacherError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def digest(facts: Mapping[str, Any]) -> str:
    """Return a SHA-256 of whatever weights are made from, given as JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_made_from(path: Path, made_from: str) -> bool:
    """Return whether the file exists and was made from what has this digest."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("made_from") == made_from
    except (OSError, SafetensorError):
        return False


def save(state: Mapping[str, Tensor], path: Path, made_from: str) -> None:
    """Write weights whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".tmp-{os.getpid()}")
    save_file({n: t.detach().contiguous() for n, t in state.items()}, unfinished, metadata={"made_from": made_from})
    unfinished.replace(path)


def load(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file.

    Raises:
        TeacherError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise TeacherError(
            f"{path} is missing; ddcache run and ddcache extract make it by the pipeline's prepare"
        ) from error
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"{path} can't be read ({error}); remove it and run ddcache extract") from error
