"""DiverseDistill: a student that asks its teachers, and a gate that learns whom to trust.

Shape legend: B rows, n of them present for one teacher, K teachers, C classes, M questions, d student width,
e teacher embedding width, a answer width; `x` stands for nothing (regression) or C (classification).
"""

# Annotations stay objects (no `from __future__ import annotations`): `check_settings` reads the constructor's.

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ddcache.distill.answers import AttentionAnswer, LinearAnswer
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
    spread,
    stack_outputs,
)
from ddcache.distill.gate import Gate, UniformGate
from ddcache.distill.losses import hidden_loss, mixture_loss, weighted_divergence, weighted_task_loss
from ddcache.distill.questions import Questions
from ddcache.errors import ConfigError


@final
class DiverseDistill(Distiller):
    """Question-Answer distillation with a learned teacher gate.

    Source: DiverseDistill, arXiv 2402.14035. The paper's abstract fixes the parts; the gate's stacking loss on
    calibration rows and the answers' losses are this project's (docs: design, distillation).

    One optimiser step trains three parties that don't push each other about: the hidden state enters questions and
    gate detached; answers and gate weights enter the student's terms detached; teachers without an output enter the
    gate's mixture by their detached answers. The embeddings e_i are shared by gate and questions, and learn from both.

    Args:
        student_dim: d, the width of the student's hidden state.
        teachers: the committee, at least one; with answers, each has at least one feature tap.
        task: what the student learns.
        questions: M, questions to each teacher.
        heads: attention heads, a divisor of `answer_dim`.
        answer_dim: a, the width of questions, keys and values.
        teacher_dim: e, the width of the teachers' embeddings.
        output_weight: λ_o of Σ_i g_i D(f(h), t_i).
        answer_weight: λ_a of Σ_i g_i mean (LN(h) − LN(a_i))².
        calibration_answer_weight: of the task loss of the answers on calibration rows.
        gate: "learned", or "uniform" over the present teachers (ablation).
        answers: "attention"; ablations: "linear" in the teacher's mean slots, without questions; "none", outputs only.
        gate_bias: K initial values of the gate's bias, such as the logarithms of static stacking weights; None: zeros.
    """

    splits = ("transfer", "calibration")

    def __init__(
        self,
        student_dim: int,
        teachers: Sequence[TeacherSpec],
        task: Task,
        *,
        questions: int = 2,
        heads: int = 4,
        answer_dim: int = 32,
        teacher_dim: int = 16,
        output_weight: float = 4.0,
        answer_weight: float = 1.0,
        calibration_answer_weight: float = 0.1,
        gate: Literal["learned", "uniform"] = "learned",
        answers: Literal["attention", "linear", "none"] = "attention",
        gate_bias: Sequence[float] | None = None,
    ) -> None:
        super().__init__(student_dim, teachers, task)
        self.check({"heads": heads, "answer_dim": answer_dim, "gate": gate, "gate_bias": gate_bias})
        _check_committee(teachers, answers, gate_bias)
        self.output_weight = output_weight
        self.answer_weight = answer_weight
        self.calibration_answer_weight = calibration_answer_weight
        self.has_output_K: Tensor
        self.register_buffer("has_output_K", torch.tensor([t.output is not None for t in teachers]), persistent=False)
        self.teachers_Ke = nn.Parameter(torch.randn(len(teachers), teacher_dim))
        bias = gate_bias or [0.0] * len(teachers)
        self.gate = Gate(student_dim, teacher_dim, bias) if gate == "learned" else UniformGate()
        self.questions: Questions | None = None
        self.answers: nn.ModuleList | None = None  # in the teachers' order; a dict's keys could not hold every name
        if answers == "attention":
            self.questions = Questions(student_dim, teacher_dim, questions, answer_dim)
            self.answers = nn.ModuleList(
                AttentionAnswer(teacher, student_dim, questions, answer_dim, heads) for teacher in teachers
            )
        elif answers == "linear":
            self.answers = nn.ModuleList(LinearAnswer(teacher, student_dim) for teacher in teachers)

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> None:
        """Check that the heads divide the answers' width and that only a learned gate has a bias."""
        heads, answer_dim = settings["heads"], settings["answer_dim"]
        if answer_dim % heads:
            raise ConfigError(f"heads: expected a divisor of answer_dim ({answer_dim}), found {heads}")
        if settings["gate"] == "uniform" and settings["gate_bias"] is not None:
            raise ConfigError("gate_bias: a uniform gate has none; leave it out, or set gate: learned")

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Every teacher's feature taps, unless there are no answers, and its output if it has one."""
        return {
            teacher.name: (*(teacher.taps if self.answers is not None else ()), *filter(None, [teacher.output]))
            for teacher in self.teachers
        }

    def gate_weights(self, hidden: Tensor, present: Tensor | None = None) -> Tensor:
        """Return how much each teacher is worth to the student, without any of the teachers' features.

        Args:
            hidden: (B, d) hidden states; no gradient flows to them.
            present: (B, K) bool, the teachers to choose from; None means all.

        Returns:
            (B, K) weights; a row sums to 1, or to 0 where no teacher is present.
        """
        if present is None:
            present = torch.ones(len(hidden), len(self.teachers), dtype=torch.bool, device=hidden.device)
        weights_BK: Tensor = self.gate(hidden.detach(), self.teachers_Ke, present)
        return weights_BK

    def terms(self, state: StudentState, batch: Batch) -> dict[str, Tensor]:
        """Return `task` and `output`; `hidden`, `answer_output`, `answer_task` if it has answers; `gate` if learned.

        `task`, `output` and `hidden` teach the student; the `answer_` terms the questions and answers; `gate` the gate.
        """
        present_BK = presence(self.teachers, batch)
        gate_BK = self.gate_weights(state.hidden, present_BK)
        output_Bx = as_output(state.output, self.task.kind)
        teachers_BKx = stack_outputs(self.teachers, batch, output_Bx, self.task.kind)
        speaks_BK = present_BK & self.has_output_K
        distilled_B = rows_of(state, batch, "train", "transfer")

        terms = {"task": self.task_term(state, batch)}
        weight_BK = gate_BK.detach() * speaks_BK
        terms["output"] = self.output_weight * self._divergence(
            output_Bx.unsqueeze(1), teachers_BKx, weight_BK, distilled_B
        )
        stacked_BKx = teachers_BKx
        if self.answers is not None:
            answers_BKd = self._answer(state.hidden.detach(), batch)
            hidden = hidden_loss(state.hidden, answers_BKd.detach(), gate_BK.detach(), distilled_B)
            terms["hidden"] = self.answer_weight * hidden
            said_BKx = self._say(state, answers_BKd)
            terms["answer_output"] = self._divergence(said_BKx, teachers_BKx, speaks_BK.float(), distilled_B)
            terms["answer_task"] = self.calibration_answer_weight * self._answer_task(state, batch, said_BKx)
            stacked_BKx = torch.where(_as_wide(self.has_output_K, said_BKx), teachers_BKx, said_BKx.detach())
        if isinstance(self.gate, Gate):
            calibration = batch.targets[self.task.target], _calibration_rows(state, batch)
            terms["gate"] = mixture_loss(gate_BK, stacked_BKx, *calibration, self.task.kind)
        return terms

    def _divergence(self, output_BKx: Tensor, teachers_BKx: Tensor, weight_BK: Tensor, rows_B: Tensor) -> Tensor:
        kind, temperature = self.task.kind, self.task.temperature
        return weighted_divergence(output_BKx, teachers_BKx, weight_BK, rows_B, kind, temperature)

    def _answer_task(self, state: StudentState, batch: Batch, said_BKx: Tensor) -> Tensor:
        weight_BK = presence(self.teachers, batch).float()
        target_B = batch.targets[self.task.target]
        return weighted_task_loss(said_BKx, target_B, weight_BK, _calibration_rows(state, batch), self.task.kind)

    def _answer(self, hidden_Bd: Tensor, batch: Batch) -> Tensor:
        """Return the answers (B, K, d), zeros where a teacher is absent."""
        assert self.answers is not None
        questions_BKMa = None if self.questions is None else self.questions(hidden_Bd, self.teachers_Ke)
        answers = []
        for i, (teacher, answer) in enumerate(zip(self.teachers, self.answers, strict=True)):
            present_B, features = batch.present[teacher.name], batch.features[teacher.name]
            asked = () if questions_BKMa is None else (_select(questions_BKMa[:, i], present_B, features),)
            answers.append(spread(answer(*asked, features), present_B))
        return torch.stack(answers, dim=1)

    def _say(self, state: StudentState, answers_BKd: Tensor) -> Tensor:
        """Return f(a_i), the answers in the student's words: (B, K) or (B, K, C)."""
        said = as_output(state.head(answers_BKd.flatten(0, 1)), self.task.kind)
        return said.reshape(*answers_BKd.shape[:2], *said.shape[1:])


def _calibration_rows(state: StudentState, batch: Batch) -> Tensor:
    """Return (B,) bool: the calibration rows, or the train rows of a batch without such a part."""
    return rows_of(state, batch, "calibration" if "calibration" in batch.parts else "train")


def _select(rows_B: Tensor, present_B: Tensor, features: Mapping[str, Tensor]) -> Tensor:
    """Return the present samples' rows; a full batch is known by its features' length, without copying the rows."""
    n = len(next(iter(features.values())))
    return rows_B if n == len(present_B) else rows_B[present_B]


def _as_wide(mask_K: Tensor, like_BKx: Tensor) -> Tensor:
    return mask_K.view(1, -1, *[1] * (like_BKx.ndim - 2))


def _check_committee(teachers: Sequence[TeacherSpec], answers: str, gate_bias: Sequence[float] | None) -> None:
    if answers == "none" or not teachers:
        require_outputs("diversedistill with answers: none" if teachers else "diversedistill", teachers)
    for teacher in teachers:
        if answers != "none" and not teacher.taps:
            raise ConfigError(
                f"diversedistill: teacher {teacher.name!r} has no feature tap to answer from; "
                f"add one beside its output, or set answers: none"
            )
    if gate_bias is not None and (len(gate_bias) != len(teachers) or not all(map(math.isfinite, gate_bias))):
        raise ConfigError(
            f"gate_bias: expected {len(teachers)} finite numbers, one for each of {[t.name for t in teachers]}, "
            f"found {list(gate_bias)}"
        )
