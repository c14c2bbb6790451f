"""DiverseDistill against the formulas of the design (section 8), recomputed one sample and one teacher at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distill_contract import (
    DIM,
    PARTS,
    ROWS,
    SILENT,
    TEACHERS,
    FakeBatch,
    build,
    every_kind,
    make_batch,
    make_state,
    reference_divergence,
)
from torch.nn import functional as F

from ddcache.distill import DiverseDistill, StudentState, TapSpec, Task, TeacherSpec
from ddcache.distill.answers import MANY_SLOTS, StandardSlots, as_slots, attend
from ddcache.distill.gate import present_softmax

COMMITTEE = (*TEACHERS, SILENT)
ABSENT = {"cnn.v1": [1, 10], "vit": [1, 2, 7], "clip": [1, 9]}  # row 1 has no teacher at all


def reference_gate(module, hidden, present):
    """g = softmax_i( e_i · W_g h / √16 + b_i ) over the present teachers, one sample: a list of K floats."""
    scores = {}
    for i in range(len(module.teachers)):
        if present[i]:
            interest = module.gate.interest.weight @ hidden
            scores[i] = math.exp(module.teachers_Ke[i].dot(interest).item() / 4.0 + module.gate.bias[i].item())
    return [scores.get(i, 0.0) / sum(scores.values()) if i in scores else 0.0 for i in range(len(module.teachers))]


def reference_answer(module, i, hidden, features):
    """a_i of one sample (d,), with torch's own fused attention."""
    asks = module.questions
    interest = asks.interest[2](F.gelu(asks.interest[0](hidden)))
    manner = asks.manner.weight @ module.teachers_Ke[i] + asks.manner.bias
    q_Ma = (asks.question.weight @ (interest * manner) + asks.question.bias).reshape(2, 32)
    keys, values = [], []
    for name, projection in zip(module.teachers[i].taps, module.answers[i].projections, strict=True):
        tap, x = module.teachers[i].taps[name], features[name]
        slots = (
            [x[:, r, c] for r in range(x.shape[1]) for c in range(x.shape[2])]
            if x.ndim == 3
            else x.reshape(-1, x.shape[-1])
        )
        for s, slot in enumerate(slots):
            if tap.mean is not None:
                slot = (slot - tap.mean) / tap.std
            projected = projection.project.weight @ (slot + projection.positions_SD[s]) + projection.project.bias
            keys.append(projected[:32])
            values.append(projected[32:])
    q, k, v = (x.reshape(len(x), 4, 8).transpose(0, 1) for x in (q_Ma, torch.stack(keys), torch.stack(values)))
    heard = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1)
    speak = module.answers[i].speak
    return speak[2](F.gelu(speak[0](heard)))


def reference_task_error(output, target, kind):
    return (output - target).item() ** 2 if kind == "regression" else -F.log_softmax(output, -1)[target].item()


def reference_mixture_error(gate, outputs, target, kind):
    if kind == "regression":
        return (sum(g * t.item() for g, t in zip(gate, outputs, strict=True)) - target.item()) ** 2
    return -math.log(sum(g * F.softmax(t, -1)[target].item() for g, t in zip(gate, outputs, strict=True)))


@torch.no_grad()
def reference_terms(module, state, batch, kind):
    """The table of section 8, a Python loop over (row, teacher)."""
    terms = dict.fromkeys(["task", "output", "hidden", "answer_output", "answer_task", "gate"], 0.0)
    target = batch.targets["y"]
    for row in range(ROWS):
        split = next(split for split, rows in PARTS.items() if rows.start <= row < rows.stop)
        present = [bool(batch.present[t.name][row]) for t in module.teachers]
        gate = reference_gate(module, state.hidden[row], present) if any(present) else [0.0] * len(present)
        if split == "train":
            terms["task"] += reference_task_error(state.output[row], target[row], kind) / 6
        said = [torch.zeros_like(state.output[row])] * len(present)
        for i, teacher in enumerate(module.teachers):
            if not present[i]:
                continue
            at = int(batch.present[teacher.name][:row].sum())
            features = {tap: values[at] for tap, values in batch.features[teacher.name].items()}
            answer = reference_answer(module, i, state.hidden[row], features)
            output = state.head(answer[None])[0].reshape(state.output[row].shape)
            said[i] = features[teacher.output] if teacher.output else output
            if split == "calibration":
                terms["answer_task"] += 0.1 * reference_task_error(output, target[row], kind) / 3
                continue
            apart = F.layer_norm(state.hidden[row], (DIM,)) - F.layer_norm(answer, (DIM,))
            terms["hidden"] += gate[i] * apart.square().mean().item() / 9
            if teacher.output:
                terms["output"] += 4.0 * gate[i] * reference_divergence(state.output[row], said[i], kind) / 9
                terms["answer_output"] += reference_divergence(output, said[i], kind) / 9
        if split == "calibration" and any(present):
            terms["gate"] += reference_mixture_error(gate, said, target[row], kind) / 3
    return terms


@every_kind
@pytest.mark.parametrize("absent", [{}, ABSENT], ids=["dense", "ragged"])
def test_every_term_equals_its_formula(kind, absent):
    module, state = build("diversedistill", {"gate_bias": [0.3, -0.2, 0.1]}, kind, COMMITTEE), make_state(kind)
    batch = make_batch(kind, COMMITTEE, absent=absent)
    expected = reference_terms(module, state, batch, kind)
    found = module.terms(state, batch)
    assert {name: term.item() for name, term in found.items()} == pytest.approx(expected, rel=1e-4)


def reached_by(term, module, state):
    """Names of the student's tensors and the module's parts that a term sends a gradient to."""
    parts = {"student hidden": [state.hidden], "student output": [state.output]}
    for name, parameter in module.named_parameters():
        parts.setdefault(name.partition(".")[0], []).append(parameter)
    flat = [x for xs in parts.values() for x in xs]
    grads = iter(torch.autograd.grad(term, flat, retain_graph=True, allow_unused=True))
    return {
        part
        for part, xs in parts.items()
        if any(g is not None and bool((g != 0).any()) for g in [next(grads) for _ in xs])
    }


@every_kind
@pytest.mark.parametrize("committee", [TEACHERS, COMMITTEE], ids=["all with outputs", "one without"])
def test_each_loss_teaches_its_own_party_only(kind, committee):
    module, state = build("diversedistill", {}, kind, committee), make_state(kind)
    terms = module.terms(state, make_batch(kind, committee))
    assert {name: reached_by(term, module, state) for name, term in terms.items()} == {
        "task": {"student output"},
        "output": {"student output"},
        "hidden": {"student hidden"},
        "answer_output": {"questions", "answers", "teachers_Ke"},
        "answer_task": {"questions", "answers", "teachers_Ke"},
        "gate": {"gate", "teachers_Ke"},
    }


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({"gate": "uniform"}, {"task", "output", "hidden", "answer_output", "answer_task"}),
        ({"answers": "none"}, {"task", "output", "gate"}),
        ({"answers": "linear"}, {"task", "output", "hidden", "answer_output", "answer_task", "gate"}),
    ],
)
def test_an_ablation_drops_the_terms_of_the_part_it_lacks(settings, terms):
    module = build("diversedistill", settings, "regression")
    assert module.terms(make_state("regression"), make_batch("regression")).keys() == terms


def test_weights_scale_their_own_terms():
    state, batch = make_state("regression"), make_batch("regression")
    plain = build("diversedistill", {}, "regression").terms(state, batch)
    weights = {"output_weight": 8.0, "answer_weight": 3.0, "calibration_answer_weight": 0.5}
    heavy = build("diversedistill", weights, "regression").terms(state, batch)
    ratios = {name: (heavy[name] / plain[name]).item() for name in plain}
    assert ratios == pytest.approx(
        {"task": 1, "output": 2, "hidden": 3, "answer_output": 1, "answer_task": 5, "gate": 1}, rel=1e-5
    )


def test_linear_answers_are_a_linear_map_of_the_mean_slots_and_ask_nothing():
    module, batch = build("diversedistill", {"answers": "linear"}, "regression"), make_batch("regression")
    answer, features = module.answers[0], batch.features["cnn.v1"]
    pooled = torch.cat([features["map"].mean((2, 3)), features["pooled"] - torch.arange(5.0)], 1)
    torch.testing.assert_close(answer(features), pooled @ answer.speak.weight.T + answer.speak.bias)
    assert module.questions is None


def test_gate_softmax_equals_a_hand_computed_one():
    scores = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]] * 3)
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    expected = torch.tensor([[1 / 8, 2 / 8, 5 / 8], [1 / 6, 0.0, 5 / 6], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(present_softmax(scores, present), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=k, max_size=k), min_size=1, max_size=6
        )
    )
)
def test_gate_rows_sum_to_one_over_present_teachers_and_to_zero_without_any(table):
    scores = torch.tensor([[score for score, _ in row] for row in table], dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[there for _, there in row] for row in table])
    weights = present_softmax(scores, present)
    torch.testing.assert_close(weights.sum(1), present.any(1).double())
    assert (weights[~present] == 0).all()
    (grad,) = torch.autograd.grad(weights.square().sum(), scores)
    assert grad.isfinite().all()
    assert (grad[~present] == 0).all()


def test_gate_starts_at_the_softmax_of_its_bias_and_at_uniform_without_one():
    hidden = 100 * torch.randn(5, DIM)
    weights = torch.tensor([0.7, 0.3])
    biased = DiverseDistill(DIM, TEACHERS, Task("regression", "y"), gate_bias=weights.log().tolist())
    torch.testing.assert_close(biased.gate_weights(hidden), weights.expand(5, 2))
    plain = DiverseDistill(DIM, TEACHERS, Task("regression", "y"))
    torch.testing.assert_close(plain.gate_weights(hidden), torch.full((5, 2), 0.5))


def test_gate_weights_need_no_features_and_equal_those_in_the_loss():
    module = build("diversedistill", {}, "regression", COMMITTEE)
    hidden = torch.randn(4, DIM, requires_grad=True)
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    found = module.gate_weights(hidden, present)
    expected = [reference_gate(module, hidden[row], present[row]) for row in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(module.gate_weights(hidden)[0], found[0])
    assert torch.autograd.grad(found.square().sum(), hidden, allow_unused=True) == (None,)


@pytest.mark.parametrize("slots", [1, 3, MANY_SLOTS, MANY_SLOTS + 1, 40])
def test_attention_equals_torchs_own(slots):
    g = torch.Generator().manual_seed(slots)
    q, k, v = (torch.randn(5, n, 12, generator=g, requires_grad=True) for n in (2, slots, slots))
    found = attend(q, k, v, heads=3)
    for sample in range(5):
        for head in range(3):
            at = slice(4 * head, 4 * head + 4)
            expected = F.scaled_dot_product_attention(q[sample, :, at], k[sample, :, at], v[sample, :, at])
            torch.testing.assert_close(found[sample, :, at], expected)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.sum(), (q, k, v)))


def test_maps_tokens_and_vectors_become_slots_of_channels():
    fmap = torch.randn(2, 4, 2, 3)
    assert torch.equal(as_slots(fmap)[:, 5], fmap[:, :, 1, 2])
    tokens = torch.randn(2, 3, 4)
    assert torch.equal(as_slots(tokens), tokens)
    assert torch.equal(as_slots(tokens[:, 0]), tokens[:, :1])


def test_slots_are_standardised_per_channel_and_a_dead_channel_is_not_blown_up():
    mean, std = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 0.5, 0.0])
    slots = StandardSlots(TapSpec((3, 2, 2), mean, std))
    x = torch.randn(4, 3, 2, 2) * std[:, None, None] + mean[:, None, None]
    found = slots(x.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, :, 1], (x[:, 1].flatten(1) + 2.0) / 0.5, atol=1e-2, rtol=1e-2)
    assert slots(x + 1e-4).abs()[:, :, 2].max() < 1.0


def two_specialists(kind, rows=512):
    """Teacher 0 is right where h_0 > 0 and teacher 1 elsewhere; the other one guesses."""
    hidden, noise = torch.randn(rows, 4), torch.randn(rows, 2, 3)
    left = hidden[:, 0] > 0
    wrong = torch.stack([~left, left], 1)
    if kind == "regression":
        target = hidden @ torch.tensor([0.5, 1.0, -1.0, 0.5])
        outputs = target[:, None] + torch.where(wrong, 2.0, 0.05) * noise[:, :, 0]
    else:
        target = (hidden[:, 1:] + 0.1).argmax(1)
        sure = 4.0 * F.one_hot(target, 3).float()
        outputs = torch.where(wrong[..., None], 3.0 * noise, sure[:, None])
    return hidden, target, outputs, left


def specialist_batch(kind, module_teachers):
    hidden, target, outputs, left = two_specialists(kind)
    features = {
        t.name: {"x": torch.randn(len(hidden), 2), "output": outputs[:, i]} for i, t in enumerate(module_teachers)
    }
    present = {t.name: torch.ones(len(hidden), dtype=torch.bool) for t in module_teachers}
    parts = {"train": slice(0, 256), "calibration": slice(256, 512)}
    head = torch.zeros(3 if kind == "classification" else 1, 4)
    state = StudentState(hidden, F.linear(hidden, head), lambda z: F.linear(z, head))
    return state, FakeBatch({"y": target}, features, present, parts), left


@every_kind
def test_gate_learns_to_trust_each_teacher_where_it_is_right(kind):
    torch.manual_seed(0)
    teachers = [TeacherSpec(name, {"x": TapSpec((2,))}, "output") for name in ("left", "right")]
    module = DiverseDistill(4, teachers, Task(kind, "y"))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(120):
        state, batch, _ = specialist_batch(kind, teachers)
        optimizer.zero_grad()
        module.loss(state, batch).backward()
        optimizer.step()
    state, _, left = specialist_batch(kind, teachers)
    gate = module.gate_weights(state.hidden)
    right_one = torch.where(left, 0, 1)
    assert (gate.argmax(1) == right_one).float().mean() > 0.9
    assert gate.gather(1, right_one[:, None]).mean() > 0.7  # a uniform gate gives 0.5


def test_gate_ignores_the_rows_that_teachers_were_fitted_on():
    """On train rows teacher 0 is perfect, as if over-fitted; on calibration rows teacher 1 is."""
    torch.manual_seed(0)
    teachers = [TeacherSpec(name, {"x": TapSpec((2,))}, "output") for name in ("overfitted", "honest")]
    module = DiverseDistill(4, teachers, Task("regression", "y"))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(60):
        state, batch, _ = specialist_batch("regression", teachers)
        for i, teacher in enumerate(teachers):
            wrong = slice(256, 512) if i == 0 else slice(0, 256)
            output = batch.targets["y"].clone()
            output[wrong] += torch.randn(256)
            batch.features[teacher.name]["output"] = output
        optimizer.zero_grad()
        module.loss(state, batch).backward()
        optimizer.step()
    assert module.gate_weights(state.hidden)[:, 1].mean() > 0.75


def test_answers_come_to_say_what_their_teacher_says():
    torch.manual_seed(0)
    teacher = TeacherSpec("cnn", {"x": TapSpec((2,)), "y": TapSpec((2,))}, "output")
    module, head = DiverseDistill(4, [teacher], Task("regression", "y")), torch.randn(1, 4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        hidden, x = torch.randn(256, 4), torch.randn(256, 2)
        features = {"cnn": {"x": x, "y": -x, "output": x.sum(1)}}
        state = StudentState(hidden, hidden @ head[0], lambda z: F.linear(z, head))
        unlabelled = {"y": torch.full((256,), float("nan"))}
        batch = FakeBatch(unlabelled, features, {"cnn": torch.ones(256, dtype=torch.bool)}, {"transfer": slice(0, 256)})
        terms = module.terms(state, batch)
        losses.append(terms["answer_output"].item())
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]
