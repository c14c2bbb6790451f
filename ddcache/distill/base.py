"""What every distillation method shares: its inputs as records, and the interface `Distiller`.

Shape legend: B rows of a batch, n of them present for one teacher, K teachers, C classes, d width of the student's
hidden state, D channels of a tap; `x` stands for nothing (regression) or C (classification).
"""

# Annotations stay objects (no `from __future__ import annotations`) in this module and in those of the methods:
# `check_settings` reads the constructors' at run time.

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ddcache.distill.losses import Kind, task_loss
from ddcache.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """What the student learns: `target` names the batch's targets, `temperature` softens logits (unused otherwise)."""

    kind: Kind
    target: str
    temperature: float = 2.0


@dataclass(frozen=True, eq=False)  # tensors have no single truth value, so no ==
class TapSpec:
    """A cached feature of a teacher.

    Args:
        shape: of one sample: (D,), (T, D) tokens, or a (D, H, W) feature map, read as H·W slots of D channels.
        mean: (D,) mean of each channel over the data set, or None to leave it.
        std: (D,) standard deviation of each channel, or None.
    """

    shape: tuple[int, ...]
    mean: Tensor | None = None
    std: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 2, 3) or min(self.shape) < 1:
            raise ConfigError(
                f"expected a tap of shape (D,), (T, D) or (C, H, W) a sample, found {self.shape}; pool it"
            )
        for name, statistic in (("mean", self.mean), ("std", self.std)):
            if statistic is not None and statistic.shape != (self.channels,):
                raise ConfigError(
                    f"{name} of a tap of shape {self.shape}: expected shape ({self.channels},), one value a channel, "
                    f"found {tuple(statistic.shape)}"
                )

    @property
    def channels(self) -> int:
        """D, the width of a slot."""
        return self.shape[0] if len(self.shape) == 3 else self.shape[-1]

    @property
    def slots(self) -> int:
        """How many vectors of width D a sample has."""
        return torch.Size(self.shape).numel() // self.channels


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher as far as distillation sees it: its feature taps, and the tap that holds its answer to the task."""

    name: str
    taps: Mapping[str, TapSpec]
    output: str | None = None


@dataclass(frozen=True, eq=False)
class StudentState:
    """What the student made of a batch.

    Args:
        hidden: (B, d) its representation.
        output: (B,) or (B, 1) predictions of a regression, (B, C) logits of a classification.
        head: maps (N, d) to the output of the student's head, with detached parameters:
            the gradient reaches the argument only.
    """

    hidden: Tensor
    output: Tensor
    head: Callable[[Tensor], Tensor]


class Batch(Protocol):
    """What a distiller reads of the loader's batch of B rows."""

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """Name -> (B,), NaN or -1 where unlabelled."""

    @property
    def features(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Teacher -> tap -> (n, ...) float16 or float32: the rows of the samples that are present, in their order."""

    @property
    def present(self) -> Mapping[str, Tensor]:
        """Teacher -> (B,) bool."""

    @property
    def parts(self) -> Mapping[str, slice]:
        """Split (train, transfer, calibration) -> its rows in this batch; a split may be absent."""


class Distiller(nn.Module, ABC):
    """What supervises a student; thrown away after training.

    Args:
        student_dim: d, the width of the student's hidden state.
        teachers: the committee; its order is the order of K everywhere.
        task: what the student learns.

    A method adds its own settings as keyword-only arguments: they are its configuration.
    """

    splits: ClassVar[tuple[str, ...]] = ()
    """The splits it wants in a batch besides `train`."""

    takes_teacher: ClassVar[bool] = False
    """Whether its name carries a teacher, as in `kd:<teacher>`."""

    def __init__(self, student_dim: int, teachers: Sequence[TeacherSpec], task: Task) -> None:
        super().__init__()
        self.student_dim = student_dim
        self.teachers = tuple(teachers)
        self.task = task

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:  # noqa: B027 - most methods have no such rules
        """Check rules that bind several settings of this method together.

        Raises:
            ConfigError: the message starts with the setting's name.
        """

    @property
    @abstractmethod
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Teacher -> the taps of it that `terms` reads; the rest need not be loaded."""

    @abstractmethod
    def terms(self, state: StudentState, batch: Batch) -> dict[str, Tensor]:
        """Return the scalar terms of the loss by name, each already weighted; `task` is the student's own."""

    def loss(self, state: StudentState, batch: Batch) -> Tensor:
        """Return the scalar to minimise: the sum of the terms."""
        return torch.stack(list(self.terms(state, batch).values())).sum()

    def task_term(self, state: StudentState, batch: Batch) -> Tensor:
        """Return the student's scalar task loss on the labelled rows of the train part, for every method alike."""
        output_Bx = as_output(state.output, self.task.kind)
        return task_loss(output_Bx, batch.targets[self.task.target], rows_of(state, batch, "train"), self.task.kind)


def as_output(output: Tensor, kind: Kind) -> Tensor:
    """Return predictions as (N,) for a regression, dropping a trailing 1, and as (N, C) for a classification.

    Raises:
        ConfigError: it has another shape.
    """
    if kind == "regression" and output.ndim == 2 and output.shape[1] == 1:
        return output.squeeze(1)
    if output.ndim != (1 if kind == "regression" else 2):
        expected = "(N,) or (N, 1)" if kind == "regression" else "(N, classes)"
        raise ConfigError(f"expected outputs of a {kind} of shape {expected}, found {tuple(output.shape)}")
    return output


def rows_of(state: StudentState, batch: Batch, *splits: str) -> Tensor:
    """Return (B,) bool: the rows of this batch that belong to any of the splits."""
    rows_B = torch.zeros(len(state.hidden), dtype=torch.bool, device=state.hidden.device)
    for split in splits:
        if split in batch.parts:
            rows_B[batch.parts[split]] = True
    return rows_B


def spread(values_n: Tensor, present_B: Tensor) -> Tensor:
    """Return (B, ...) with the n present samples' values in their rows and zeros elsewhere."""
    if len(values_n) == len(present_B):
        return values_n
    return values_n.new_zeros(len(present_B), *values_n.shape[1:]).index_put((present_B,), values_n)


def presence(teachers: Sequence[TeacherSpec], batch: Batch) -> Tensor:
    """Return (B, K) bool: which teacher has features for which sample."""
    return torch.stack([batch.present[teacher.name] for teacher in teachers], dim=1)


def stack_outputs(teachers: Sequence[TeacherSpec], batch: Batch, like_Bx: Tensor, kind: Kind) -> Tensor:
    """Return the teachers' outputs (B, K) or (B, K, C) in float32, zeros where one is absent or has none.

    Args:
        teachers: the K teachers.
        batch: holds their output taps.
        like_Bx: the student's output, which theirs must fit.
        kind: the kind of task.

    Raises:
        ConfigError: a teacher's output has another number of classes than the student's.
    """
    return torch.stack([_output_of(teacher, batch, like_Bx, kind) for teacher in teachers], dim=1)


def _output_of(teacher: TeacherSpec, batch: Batch, like_Bx: Tensor, kind: Kind) -> Tensor:
    if teacher.output is None:
        return torch.zeros_like(like_Bx, dtype=torch.float32)
    output_nx = as_output(batch.features[teacher.name][teacher.output].float(), kind)
    if output_nx.shape[1:] != like_Bx.shape[1:]:
        raise ConfigError(
            f"teacher {teacher.name!r}: expected outputs of the student's shape {tuple(like_Bx.shape[1:])} a sample, "
            f"found {tuple(output_nx.shape[1:])}; map its classes to the task's, or leave its output out"
        )
    return spread(output_nx, batch.present[teacher.name])


def require_outputs(method: str, teachers: Sequence[TeacherSpec]) -> None:
    """Check that there are teachers and that each has an output.

    Raises:
        ConfigError: naming the first that has none.
    """
    if not teachers:
        raise ConfigError(f"{method}: expected at least one teacher, found none; name some, or use the method 'none'")
    for teacher in teachers:
        if teacher.output is None:
            raise ConfigError(
                f"{method}: teacher {teacher.name!r} has no output to distil from; mark the tap that answers the task "
                f"with `kind: output`, leave the teacher out, or use 'diversedistill', which needs features only"
            )
