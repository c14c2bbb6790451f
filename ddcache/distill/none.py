"""No distillation: the student learns from the labels alone."""

from collections.abc import Mapping
from typing import final

from torch import Tensor

from ddcache.distill.base import Batch, Distiller, StudentState


@final
class NoDistillation(Distiller):
    """The undistilled student, the zero of "gap recovered": its task loss on labelled rows and nothing else."""

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """No teacher is read."""
        return {}

    def terms(self, state: StudentState, batch: Batch) -> dict[str, Tensor]:
        """Return `task` alone."""
        return {"task": self.task_term(state, batch)}
