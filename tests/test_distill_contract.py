"""The contract that every distillation method passes, and the small synthetic batches it is held to."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ddcache.distill import METHODS, StudentState, TapSpec, Task, TeacherSpec, build_distiller
from ddcache.errors import ConfigError

ROWS, DIM, CLASSES = 12, 6, 3
PARTS = {"train": slice(0, 6), "transfer": slice(6, 9), "calibration": slice(9, 12)}
TEACHERS = (
    TeacherSpec(
        "cnn.v1", {"map": TapSpec((4, 2, 3)), "pooled": TapSpec((5,), torch.arange(5.0), torch.ones(5))}, "output"
    ),
    TeacherSpec("vit", {"tokens": TapSpec((3, 7))}, "output"),
)
SILENT = TeacherSpec("clip", {"tokens": TapSpec((2, 4)), "pooled": TapSpec((3,))})
KINDS = ("regression", "classification")
METHOD_CASES = [
    ("none", {}),
    ("kd:vit", {}),
    ("average", {}),
    ("diversedistill", {}),
    ("diversedistill", {"gate": "uniform"}),
    ("diversedistill", {"answers": "linear"}),
    ("diversedistill", {"answers": "none", "gate_bias": [0.5, -1.0]}),
]
every_method = pytest.mark.parametrize(
    ("name", "settings"), METHOD_CASES, ids=[" ".join([n, *map(str, s.values())]) for n, s in METHOD_CASES]
)
every_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class FakeBatch:
    targets: dict
    features: dict
    present: dict
    parts: dict


def make_batch(kind, teachers=TEACHERS, *, absent=None, parts=PARTS, dtype=torch.float32, seed=0):
    """A batch with labels on train and calibration rows; `absent`: teacher -> rows that it has no features for."""
    g = torch.Generator().manual_seed(seed)
    shape = (CLASSES,) if kind == "classification" else ()
    features, present = {}, {}
    for teacher in teachers:
        present[teacher.name] = torch.ones(ROWS, dtype=torch.bool)
        present[teacher.name][list((absent or {}).get(teacher.name, []))] = False
        taps = {name: torch.randn(ROWS, *tap.shape, generator=g) for name, tap in teacher.taps.items()}
        if teacher.output:
            taps[teacher.output] = 2 * torch.randn(ROWS, *shape, generator=g)
        features[teacher.name] = {name: tap[present[teacher.name]].to(dtype) for name, tap in taps.items()}
    if kind == "regression":
        target, unknown = torch.randn(ROWS, generator=g), float("nan")
    else:
        target, unknown = torch.randint(0, CLASSES, (ROWS,), generator=g), -1
    target[PARTS["transfer"]] = unknown
    return FakeBatch({"y": target}, features, present, dict(parts))


def make_state(kind, seed=0, trailing=False):
    """A student whose hidden state and output are leaves, so that a test sees which of them a loss reaches."""
    g = torch.Generator().manual_seed(100 + seed)
    width = CLASSES if kind == "classification" else 1
    weight = torch.randn(width, DIM, generator=g)
    hidden = torch.randn(ROWS, DIM, generator=g)
    output = F.linear(hidden, weight)
    if kind == "regression" and not trailing:
        output = output.squeeze(1)
    return StudentState(hidden.requires_grad_(), output.requires_grad_(), lambda z: F.linear(z, weight))


def build(name, settings, kind, teachers=TEACHERS):
    torch.manual_seed(0)
    distiller = build_distiller(name, settings, DIM, teachers, Task(kind, "y"))
    if settings.get("gate", "learned") == "learned" and name == "diversedistill":
        torch.nn.init.normal_(distiller.gate.interest.weight)  # past its start, where every sample is gated alike
    return distiller


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def test_the_suite_covers_every_method():
    assert {name.partition(":")[0] for name, _ in METHOD_CASES} == set(METHODS)


@every_kind
@every_method
def test_loss_is_the_finite_sum_of_scalar_terms_with_the_task_among_them(name, settings, kind):
    distiller, state, batch = build(name, settings, kind), make_state(kind), make_batch(kind)
    terms = distiller.terms(state, batch)
    assert all(term.shape == () and term.isfinite() and term > 0 for term in terms.values())
    assert distiller.loss(state, batch).item() == pytest.approx(sum(values(terms).values()), rel=1e-6)
    train, target = slice(0, 6), batch.targets["y"]
    error = F.mse_loss if kind == "regression" else F.cross_entropy
    torch.testing.assert_close(terms["task"], error(state.output[train], target[train]))


@every_kind
@every_method
def test_student_learns_from_train_rows_and_if_distilled_from_transfer_but_never_from_calibration(name, settings, kind):
    state = make_state(kind)
    build(name, settings, kind).loss(state, make_batch(kind)).backward()
    reached = (state.output.grad.reshape(ROWS, -1).abs().sum(1) > 0).tolist()
    assert reached == [True] * 6 + [name != "none"] * 3 + [False] * 3


@every_kind
@every_method
def test_every_parameter_of_the_method_learns(name, settings, kind):
    distiller, batch = build(name, settings, kind), make_batch(kind)
    before = {n: p.detach().clone() for n, p in distiller.named_parameters()}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1) if before else None
    if optimizer:
        distiller.loss(make_state(kind), batch).backward()
        optimizer.step()
    unmoved = {n for n, p in distiller.named_parameters() if torch.equal(p, before[n])}
    assert unmoved == set()
    assert all(p.isfinite().all() for p in distiller.parameters())


@every_kind
@every_method
@pytest.mark.parametrize(
    "absent", [{"vit": [0, 6, 9]}, {"vit": range(ROWS)}, {"cnn.v1": range(1, ROWS), "vit": range(ROWS)}]
)
def test_missing_teachers_leave_loss_and_gradients_finite(name, settings, kind, absent):
    distiller, state = build(name, settings, kind), make_state(kind)
    loss = distiller.loss(state, make_batch(kind, absent=absent))
    loss.backward()
    grads = [state.output.grad, state.hidden.grad, *(p.grad for p in distiller.parameters())]
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads if grad is not None)


@every_kind
@every_method
def test_without_any_teacher_the_task_is_all_that_is_left(name, settings, kind):
    batch = make_batch(kind, absent={"cnn.v1": range(ROWS), "vit": range(ROWS)})
    terms = values(build(name, settings, kind).terms(make_state(kind), batch))
    assert terms.pop("task") > 0
    assert set(terms.values()) <= {0.0}


@every_kind
@every_method
@pytest.mark.parametrize("missing", [("transfer",), ("calibration",), ("transfer", "calibration")])
def test_a_batch_may_lack_the_transfer_or_calibration_part(name, settings, kind, missing):
    distiller, state = build(name, settings, kind), make_state(kind)
    whole = values(distiller.terms(state, make_batch(kind)))
    parts = {split: rows for split, rows in PARTS.items() if split not in missing}
    terms = values(distiller.terms(state, make_batch(kind, parts=parts)))
    assert terms.keys() == whole.keys()
    assert np.isfinite(list(terms.values())).all()
    assert terms["task"] == whole["task"]
    distilled = set(terms) & {"output", "hidden", "answer_output"}
    assert all((terms[term] != whole[term]) == ("transfer" in missing) for term in distilled)
    calibrated = set(terms) & {"gate", "answer_task"}
    assert all((terms[term] != whole[term]) == ("calibration" in missing) for term in calibrated)


@every_kind
@every_method
def test_a_batch_without_any_label_has_finite_gradients_and_no_task_loss(name, settings, kind):
    distiller, state, batch = build(name, settings, kind), make_state(kind), make_batch(kind)
    batch.targets["y"][:] = float("nan") if kind == "regression" else -1
    terms = distiller.terms(state, batch)
    sum(terms.values()).backward()
    assert terms["task"] == 0
    assert state.output.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in distiller.parameters() if p.grad is not None)


@every_kind
@every_method
def test_the_same_seed_gives_the_same_loss_and_another_seed_another_module(name, settings, kind):
    state, batch = make_state(kind), make_batch(kind)
    first, second = build(name, settings, kind), build(name, settings, kind)
    assert torch.equal(first.loss(state, batch), second.loss(state, batch))
    torch.manual_seed(1)
    other = build_distiller(name, settings, DIM, TEACHERS, Task(kind, "y"))
    different = [n for n, p in first.named_parameters() if not torch.equal(p, other.get_parameter(n))]
    assert bool(different) == (name == "diversedistill")


@every_kind
@every_method
def test_float16_features_are_reckoned_with_in_float32(name, settings, kind):
    distiller, state, half = build(name, settings, kind), make_state(kind), make_batch(kind, dtype=torch.float16)
    full = {t: {tap: values.float() for tap, values in taps.items()} for t, taps in half.features.items()}
    expected = distiller.terms(state, replace(half, features=full))
    for term, value in distiller.terms(state, half).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[term])


@every_kind
@every_method
def test_a_method_needs_no_tap_beyond_those_it_reads(name, settings, kind):
    distiller, state, batch = build(name, settings, kind), make_state(kind), make_batch(kind)
    read = {t: {tap: batch.features[t][tap] for tap in taps} for t, taps in distiller.reads.items()}
    lean = replace(batch, features=read, present={t: batch.present[t] for t in read})
    assert torch.equal(distiller.loss(state, lean), distiller.loss(state, batch))
    for teacher, taps in read.items():
        for tap in taps:
            fewer = {t: {n: f for n, f in fs.items() if (t, n) != (teacher, tap)} for t, fs in read.items()}
            with pytest.raises(KeyError):
                distiller.loss(state, replace(lean, features=fewer))


@every_method
def test_a_trailing_one_of_a_regression_head_changes_nothing(name, settings):
    distiller, batch = build(name, settings, "regression"), make_batch("regression")
    expected = distiller.loss(make_state("regression"), batch)
    for teacher in batch.features.values():
        teacher["output"] = teacher["output"].unsqueeze(1)
    assert torch.equal(distiller.loss(make_state("regression", trailing=True), batch), expected)


@every_kind
@every_method
def test_one_teacher_is_committee_enough(name, settings, kind):
    settings = {key: value for key, value in settings.items() if key != "gate_bias"}
    only = TEACHERS[1:]
    distiller, state = build(name, settings, kind, only), make_state(kind)
    terms = distiller.terms(state, make_batch(kind, only))
    assert all(term.isfinite() for term in terms.values())
    if "output" in terms:
        alone = build("kd:vit", {}, kind, only).terms(state, make_batch(kind, only))
        torch.testing.assert_close(terms["output"], alone["output"])


@every_kind
@pytest.mark.parametrize("settings", [{}, {"gate": "uniform"}, {"answers": "linear"}])
def test_diversedistill_takes_teachers_without_an_output(settings, kind):
    teachers = (*TEACHERS, SILENT)
    distiller, state = build("diversedistill", settings, kind, teachers), make_state(kind)
    loss = distiller.loss(state, make_batch(kind, teachers, absent={"clip": [0, 7, 10]}))
    loss.backward()
    assert loss.isfinite()
    spoken = distiller.answers[2].speak
    last = spoken[-1] if isinstance(spoken, torch.nn.Sequential) else spoken
    assert last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["kd:vit", "average", "diversedistill"])
def test_a_teacher_with_other_classes_is_refused_by_name(name):
    batch = make_batch("classification")
    batch.features["vit"]["output"] = torch.zeros(ROWS, CLASSES + 2)
    with pytest.raises(ConfigError, match=r"teacher 'vit': expected outputs of .*\(3,\) a sample, found \(5,\)"):
        build(name, {}, "classification").loss(make_state("classification"), batch)


@pytest.mark.parametrize(("kind", "shape"), [("regression", (ROWS, 2)), ("classification", (ROWS,))])
def test_a_student_output_of_another_shape_is_refused(kind, shape):
    state = replace(make_state(kind), output=torch.zeros(shape))
    with pytest.raises(ConfigError, match=f"expected outputs of a {kind}"):
        build("none", {}, kind).loss(state, make_batch(kind))


@every_kind
def test_kd_output_term_is_the_weighted_divergence_from_the_one_teacher(kind):
    state, batch = make_state(kind), make_batch(kind, absent={"vit": [1, 7]})
    term = build("kd:vit", {"output_weight": 3.0}, kind).terms(state, batch)["output"]
    rows = [0, 2, 3, 4, 5, 6, 8]
    student, teacher = state.output.detach(), batch.features["vit"]["output"]
    expected = 0.0
    for at, row in enumerate(r for r in range(ROWS) if r not in (1, 7)):
        if row in rows:
            expected += 3.0 * reference_divergence(student[row], teacher[at], kind) / 9  # absent rows count as zero
    assert term.item() == pytest.approx(expected, rel=1e-5)


@every_kind
def test_average_output_term_is_the_divergence_from_the_mean_of_the_present_teachers(kind):
    state, batch = make_state(kind), make_batch(kind, absent={"vit": [1, 7], "cnn.v1": [7, 8]})
    term = build("average", {"output_weight": 3.0}, kind).terms(state, batch)["output"]
    expected = 0.0
    for row in range(9):
        said = [
            batch.features[t]["output"][int(batch.present[t][:row].sum())]
            for t in batch.present
            if batch.present[t][row]
        ]
        if not said:
            continue
        if kind == "regression":
            error = (state.output[row] - sum(said) / len(said)) ** 2
        else:
            mean = sum(F.softmax(t / 2.0, -1) for t in said) / len(said)
            error = 4.0 * (mean * (mean.log() - F.log_softmax(state.output[row] / 2.0, -1))).sum()
        expected += 3.0 * error.item() / 9
    assert term.item() == pytest.approx(expected, rel=1e-5)


def reference_divergence(output, teacher, kind):
    """D of one sample, written out with numpy; temperature 2."""
    if kind == "regression":
        return float((output - teacher) ** 2)
    p, q = (np.exp(x.numpy().astype(np.float64) / 2.0) for x in (teacher, output))
    p, q = p / p.sum(), q / q.sum()
    return float(4.0 * (p * np.log(p / q)).sum())
