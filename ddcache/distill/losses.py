"""Losses as pure functions of tensors.

Shape legend: B rows of a batch, K teachers, C classes, d width of the student's hidden state;
`x` stands for nothing (regression) or C (classification).

Every loss is the mean over the rows it was asked for; a (row, teacher) pair of weight zero adds zero and still counts.
So a pair weighs the same in whichever batch it falls, and nothing is NaN where no teacher is present or no row has a
label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["regression", "classification"]


def row_mean(values_B: Tensor, rows_B: Tensor) -> Tensor:
    """Return the scalar mean of `values_B` (B,) over the rows that `rows_B` (B,) bool marks; 0 if it marks none."""
    return values_B.masked_fill(~rows_B, 0.0).sum() / rows_B.sum().clamp_min(1)


def labelled(target_B: Tensor, kind: Kind) -> Tensor:
    """Return (B,) bool: where a target is known (not NaN for a regression, not negative for a class)."""
    return target_B.isfinite() if kind == "regression" else target_B >= 0


def task_error(output_x: Tensor, target: Tensor, kind: Kind) -> Tensor:
    """Return the task's error of each prediction: squared error, or cross-entropy in nats.

    Args:
        output_x: (...,) predictions or (..., C) logits.
        target: broadcastable to (...): floats, or class numbers. An unknown one gives a finite value to be masked.
        kind: the kind of task.

    Returns:
        (...) errors.
    """
    # Unknown targets are replaced before any arithmetic: a NaN masked afterwards would still poison the gradient.
    known = target.masked_fill(~labelled(target, kind), 0)
    if kind == "regression":
        return (output_x - known.to(output_x.dtype)).square()
    log_p = F.log_softmax(output_x, dim=-1)
    index = known.long().expand(output_x.shape[:-1]).unsqueeze(-1)
    return -log_p.gather(-1, index).squeeze(-1)


def task_loss(output_Bx: Tensor, target_B: Tensor, rows_B: Tensor, kind: Kind) -> Tensor:
    """Return the scalar mean task error over the labelled rows among `rows_B` (B,) bool."""
    return row_mean(task_error(output_Bx, target_B, kind), rows_B & labelled(target_B, kind))


def soft_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return T² KL(target || softmax(logits / T)) of each row (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        logits: (..., C) of the student.
        target: (..., C) probabilities, already softened, of the same or a broadcastable shape.
        temperature: T; the factor T² keeps the gradient's size independent of it.

    Returns:
        (...) divergences in nats.
    """
    log_q = F.log_softmax(logits / temperature, dim=-1)
    return temperature**2 * (torch.xlogy(target, target) - target * log_q).sum(-1)


def divergence(output_x: Tensor, teacher_x: Tensor, kind: Kind, temperature: float) -> Tensor:
    """Return D(output, teacher) of each prediction: squared error, or T² KL(teacher || output) at temperature T.

    Args:
        output_x: (...,) or (..., C) logits.
        teacher_x: the teacher's, of the same or a broadcastable shape.
        kind: the kind of task.
        temperature: T; unused by a regression.

    Returns:
        (...) divergences.
    """
    if kind == "regression":
        return (output_x - teacher_x).square()
    return soft_divergence(output_x, F.softmax(teacher_x / temperature, dim=-1), temperature)


def weighted_divergence(
    output_BKx: Tensor, teacher_BKx: Tensor, weight_BK: Tensor, rows_B: Tensor, kind: Kind, temperature: float
) -> Tensor:
    """Return the scalar mean over `rows_B` of Σ_i weight_i D(output, teacher_i).

    Args:
        output_BKx: (B, K) or (B, K, C); K may be 1, for one output compared with every teacher.
        teacher_BKx: (B, K) or (B, K, C), anything finite where a teacher is absent.
        weight_BK: (B, K), zero where a teacher is absent or has no output.
        rows_B: (B,) bool.
        kind: the kind of task.
        temperature: T of `divergence`.
    """
    return row_mean((weight_BK * divergence(output_BKx, teacher_BKx, kind, temperature)).sum(1), rows_B)


def hidden_loss(hidden_Bd: Tensor, answers_BKd: Tensor, weight_BK: Tensor, rows_B: Tensor) -> Tensor:
    """Return the scalar mean over `rows_B` of Σ_i weight_i mean_d (LN(h) − LN(a_i))², LN without scale and shift."""
    width = answers_BKd.shape[-1:]
    apart_BKd = F.layer_norm(hidden_Bd, width).unsqueeze(1) - F.layer_norm(answers_BKd, width)
    return row_mean((weight_BK * apart_BKd.square().mean(-1)).sum(1), rows_B)


def weighted_task_loss(output_BKx: Tensor, target_B: Tensor, weight_BK: Tensor, rows_B: Tensor, kind: Kind) -> Tensor:
    """Return the scalar mean over the labelled rows among `rows_B` of Σ_i weight_i task_error(output_i, target)."""
    error_BK = task_error(output_BKx, target_B.unsqueeze(1), kind)
    return row_mean((weight_BK * error_BK).sum(1), rows_B & labelled(target_B, kind))


def mixture_loss(gate_BK: Tensor, output_BKx: Tensor, target_B: Tensor, rows_B: Tensor, kind: Kind) -> Tensor:
    """Return the task loss of the gated mixture, the mean over the labelled rows among `rows_B`.

    A regression mixes the outputs, (Σ_i g_i t_i − y)². A classification mixes the *probabilities*,
    −log Σ_i g_i softmax(t_i)[y]: the mixture of experts of Jacobs et al. 1991, equation 1.3 with categorical experts;
    mixed logits would let the most confident teacher drown the others whatever its weight.

    Args:
        gate_BK: (B, K) weights; a row sums to 1, or to 0 where no teacher is present: it then adds zero.
        output_BKx: (B, K) or (B, K, C) logits, anything finite where a teacher is absent.
        target_B: (B,) targets.
        rows_B: (B,) bool.
        kind: the kind of task.
    """
    if kind == "regression":
        error_B = task_error((gate_BK * output_BKx).sum(1), target_B, kind)
    else:
        # In log space: teachers that are all sure of another class would make the plain sum 0 and its logarithm -inf.
        log_gate_BK = gate_BK.clamp_min(torch.finfo(gate_BK.dtype).tiny).log()
        error_B = -torch.logsumexp(log_gate_BK - task_error(output_BKx, target_B.unsqueeze(1), kind), dim=1)
    answered_B = (gate_BK > 0).any(1)
    return row_mean(error_B.masked_fill(~answered_B, 0.0), rows_B & labelled(target_B, kind))
