"""Distillation from the mean of several teachers' outputs."""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor
from torch.nn import functional as F

from ddcache.distill.base import (
    Batch,
    Distiller,
    StudentState,
    Task,
    TeacherSpec,
    as_output,
    presence,
    require_outputs,
    rows_of,
    stack_outputs,
)
from ddcache.distill.losses import row_mean, soft_divergence


@final
class Average(Distiller):
    """Match the mean of the present teachers' outputs.

    Source: You, Xu, Xu and Tao 2017, "Learning from multiple teacher networks", KDD (doi:10.1145/3097983.3098135):
    the mean of the *softened probabilities* softmax(t_i / T), not of the logits, so that a teacher with larger logits
    has no larger say; then T² KL(mean || student). For a regression, the squared error to the mean prediction.

    Args:
        student_dim: d, unused.
        teachers: at least one; every one must have an output.
        task: what the student learns.
        output_weight: of the teachers' term, on the train and transfer parts; the task term has weight 1.
    """

    splits = ("transfer",)

    def __init__(
        self, student_dim: int, teachers: Sequence[TeacherSpec], task: Task, *, output_weight: float = 4.0
    ) -> None:
        super().__init__(student_dim, teachers, task)
        require_outputs("average", teachers)
        self.output_weight = output_weight

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """The teachers' outputs."""
        return {teacher.name: (teacher.output,) for teacher in self.teachers if teacher.output is not None}

    def terms(self, state: StudentState, batch: Batch) -> dict[str, Tensor]:
        """Return `task` and `output`."""
        output_Bx = as_output(state.output, self.task.kind)
        teachers_BKx = stack_outputs(self.teachers, batch, output_Bx, self.task.kind)
        present_BK = presence(self.teachers, batch)
        error_B = self._error(output_Bx, teachers_BKx, present_BK).masked_fill(~present_BK.any(1), 0.0)
        error = row_mean(error_B, rows_of(state, batch, "train", "transfer"))
        return {"task": self.task_term(state, batch), "output": self.output_weight * error}

    def _error(self, output_Bx: Tensor, teachers_BKx: Tensor, present_BK: Tensor) -> Tensor:
        share_BK = present_BK / present_BK.sum(1, keepdim=True).clamp_min(1)
        if self.task.kind == "regression":
            return (output_Bx - (share_BK * teachers_BKx).sum(1)).square()
        probabilities_BKC = F.softmax(teachers_BKx / self.task.temperature, dim=-1)
        mean_BC = (share_BK.unsqueeze(-1) * probabilities_BKC).sum(1)
        return soft_divergence(output_Bx, mean_BC, self.task.temperature)
