"""Answers: what a teacher's features say to the student's questions, in the student's own space.

Shape legend: n samples that a teacher is present for, S slots (of all its taps), D channels of a tap, M questions,
a answer width, H heads, w = a / H, d student width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ddcache.distill.base import TapSpec, TeacherSpec

# Up to this many slots broadcasting is faster than the fused kernel, above it slower. Forward and backward on one core,
# n=512, M=2, a=32, H=4, in ms: S=2: 0.8 against 2.3; S=8: 2.4 against 2.7; S=16: 4.2 against 3.1; S=64: 14 against 9.
MANY_SLOTS = 8


def attend(questions_nMa: Tensor, keys_nSa: Tensor, values_nSa: Tensor, heads: int) -> Tensor:
    """Return multi-head attention of M questions to S slots (Vaswani et al. 2017, arXiv 1706.03762, section 3.2).

    A few slots are done by broadcasting: at these tiny shapes a batched product or the fused kernel pays more for
    each of its n·H small matrices than the arithmetic costs.

    Args:
        questions_nMa: (n, M, a).
        keys_nSa: (n, S, a).
        values_nSa: (n, S, a).
        heads: H, a divisor of a.

    Returns:
        (n, M, a), the heads side by side.
    """
    q_nMHw, k_nSHw, v_nSHw = (_split(x, heads) for x in (questions_nMa, keys_nSa, values_nSa))
    if keys_nSa.shape[1] > MANY_SLOTS:
        q, k, v = (x.transpose(1, 2) for x in (q_nMHw, k_nSHw, v_nSHw))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    scores_nMSH = (q_nMHw.unsqueeze(2) * k_nSHw.unsqueeze(1)).sum(-1) / math.sqrt(q_nMHw.shape[-1])
    weights_nMSH = F.softmax(scores_nMSH, dim=2)
    return (weights_nMSH.unsqueeze(-1) * v_nSHw.unsqueeze(1)).sum(2).flatten(2)


def _split(x_nRa: Tensor, heads: int) -> Tensor:
    n, rows, width = x_nRa.shape
    return x_nRa.reshape(n, rows, heads, width // heads)


def as_slots(feature_n: Tensor) -> Tensor:
    """Return a tap's features (n, D), (n, T, D) or (n, D, H, W) as slots (n, S, D)."""
    if feature_n.ndim == 4:
        return feature_n.flatten(2).transpose(1, 2)
    return feature_n if feature_n.ndim == 3 else feature_n.unsqueeze(1)


@final
class StandardSlots(nn.Module):
    """A tap's features as slots in float32, each channel standardised by the data set's statistics where known."""

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, tap: TapSpec) -> None:
        super().__init__()
        std_D = torch.ones(tap.channels) if tap.std is None else tap.std.detach().float()
        # A channel that hardly moves is rounding noise; a floor relative to the others keeps it from being blown up.
        floor = max(1e-3 * float(std_D.mean()), 1e-6)
        self.register_buffer("mean_D", torch.zeros(tap.channels) if tap.mean is None else tap.mean.detach().float())
        self.register_buffer("std_D", std_D.clamp_min(floor))

    def forward(self, feature_n: Tensor) -> Tensor:
        """Return (n, S, D) float32 for float16 or float32 features of the tap's shape."""
        return (as_slots(feature_n).float() - self.mean_D) / self.std_D


@final
class SlotProjection(nn.Module):
    """Keys and values W(x_s + pos_s) of one tap's slots; taps differ in width, so each has its own W."""

    def __init__(self, tap: TapSpec, answer_dim: int) -> None:
        super().__init__()
        self.slots = StandardSlots(tap)
        self.positions_SD = nn.Parameter(0.02 * torch.randn(tap.slots, tap.channels))
        self.project = nn.Linear(tap.channels, 2 * answer_dim)

    def forward(self, feature_n: Tensor) -> Tensor:
        """Return (n, S, 2a), the keys before the values."""
        projected_nS2a: Tensor = self.project(self.slots(feature_n) + self.positions_SD)
        return projected_nS2a


@final
class AttentionAnswer(nn.Module):
    """a_i = MLP_i( attention of the M questions to the slots of teacher i's taps ).

    Args:
        teacher: its taps.
        student_dim: d.
        questions: M.
        answer_dim: a.
        heads: H, a divisor of a.
    """

    def __init__(self, teacher: TeacherSpec, student_dim: int, questions: int, answer_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.taps = tuple(teacher.taps)
        self.projections = nn.ModuleList(SlotProjection(tap, answer_dim) for tap in teacher.taps.values())
        width = questions * answer_dim
        self.speak = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, student_dim))

    def forward(self, questions_nMa: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Return the answers (n, d) to these questions from the features (n, ...) of the teacher's taps."""
        projected = [p(features[tap]) for tap, p in zip(self.taps, self.projections, strict=True)]
        keys_nSa, values_nSa = torch.cat(projected, dim=1).chunk(2, dim=-1)
        answer_nd: Tensor = self.speak(attend(questions_nMa, keys_nSa, values_nSa, self.heads).flatten(1))
        return answer_nd


@final
class LinearAnswer(nn.Module):
    """The ablation without questions: a_i = W_i [mean over the slots of each tap] + c_i."""

    def __init__(self, teacher: TeacherSpec, student_dim: int) -> None:
        super().__init__()
        self.taps = tuple(teacher.taps)
        self.slots = nn.ModuleList(StandardSlots(tap) for tap in teacher.taps.values())
        self.speak = nn.Linear(sum(tap.channels for tap in teacher.taps.values()), student_dim)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the answers (n, d) from the features (n, ...) of the teacher's taps."""
        pooled = [slots(features[tap]).mean(1) for tap, slots in zip(self.taps, self.slots, strict=True)]
        answer_nd: Tensor = self.speak(torch.cat(pooled, dim=1))
        return answer_nd
