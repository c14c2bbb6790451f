"""A tiny pipeline whose parts the tests name by `tests.tiny:…`: 600 samples, three small teachers, one student."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ddcache.sources import ArraySource, Samples
from ddcache.teachers import FrozenModel

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = 4
GROUPS = 30


def source(n: int = 600, seed: int = 0, calibration: bool = True) -> ArraySource:
    """Points around four centres; a group is an entity, and its vector depends on the group alone."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n)
    centres = rng.normal(size=(CLASSES, 8)) * 1.2
    x = (centres[label] + rng.normal(size=(n, 8))).astype(np.float32)
    splits = np.array(["train", "train", "train", "transfer", "calibration", "val", "test", "train"])[np.arange(n) % 8]
    if not calibration:
        splits[splits == "calibration"] = "train"
    label[splits == "transfer"] = -1
    group = rng.integers(0, GROUPS, n)
    samples = Samples(np.array([f"s{i:05d}" for i in range(n)]), splits, {"label": label}, {"group": group})
    return ArraySource(samples, {"x": x, "group": group.astype(np.int64)})


class Net(nn.Module):
    """Two layers; `body` gives 32 features, `head` the logits."""

    def __init__(self, seed: int, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class Groups(nn.Module):
    """Depends on the group alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table = nn.Embedding(GROUPS, 6)

    def forward(self, group: Tensor) -> Tensor:
        out: Tensor = self.table(group)
        return out


class Slow(Net):
    """Takes some milliseconds a batch, so that a test can kill it on the way."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x)


class Broken(Net):
    """Raises, or gives NaN or too large a value, for the batch that holds the largest x[0]."""

    def __init__(self, how: str, above: float) -> None:
        super().__init__(0)
        self.how, self.above = how, above

    def forward(self, x: Tensor) -> Tensor:
        bad = x[:, 0] > self.above
        if self.how == "raise" and bad.any():
            raise RuntimeError("no such picture")
        value = {"nan": float("nan"), "large": 1e7, "raise": 0.0}[self.how]
        return super().forward(torch.where(bad[:, None], torch.full_like(x, value), x))


class Several(nn.Module):
    """Returns a mapping from its `core`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.core = _Mapping()

    def forward(self, x: Tensor) -> Any:
        return self.core(x)


class _Mapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"hidden": self.layer(x), "note": "text"}


def net(seed: int = 0, width: int = 32) -> Net:
    return Net(seed, width)


def groups() -> Groups:
    return Groups()


def slow() -> Slow:
    return Slow(0)


def broken(how: str, above: float = 3.0) -> Broken:
    return Broken(how, above)


def several() -> Several:
    return Several()


seen: list[set[str]] = []


def spy(source: Any, mark: str) -> None:
    """Serve as a `prepare` that notes which splits it was shown."""
    seen.append({*source.samples.splits.tolist(), mark})


def unseeded() -> FrozenModel:
    torch.seed()
    return FrozenModel(nn.Linear(8, 4), preprocess=lambda inputs: inputs["x"])


def student(seed: int = 1) -> Net:
    return Net(torch.initial_seed() % 1000 + seed, width=6)


def pipeline(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of a pipeline file that writes into `folder`; `changes` are `a__b=value`."""
    content: dict[str, Any] = {
        "name": "tiny",
        "cache": str(folder / "cache"),
        "runs": str(folder / "runs"),
        "source": "tests.tiny:source",
        "task": {"kind": "classification", "target": "label", "metric": "accuracy"},
        "teachers": {
            "big": {
                "role": "foundation",
                "factory": "tests.tiny:net",
                "batch_size": 64,
                "shard_rows": 128,
                "taps": {
                    "body": {"module": "body", "dtype": "float32"},
                    "output": {"module": "head", "kind": "output", "dtype": "float32"},
                },
            },
            "groups": {
                "role": "expert",
                "factory": "tests.tiny:groups",
                "keyed_by": "group",
                "taps": {"table": {"module": "table"}},
            },
        },
        "students": {"small": {"factory": "tests.tiny:student", "hidden": "body", "head": "head"}},
        "methods": ["none", "kd:big", "diversedistill"],
        "train": {"epochs": 3, "batch_size": 64, "seeds": [0]},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = content
        for parent in parents:
            node = node[parent]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return content


def write_pipeline(folder: Path, **changes: Any) -> Path:
    """Write the pipeline file of `pipeline` into `folder`."""
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline(folder, **changes)), encoding="utf-8")
    return path
