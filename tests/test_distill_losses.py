import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ddcache.distill.losses import (
    divergence,
    hidden_loss,
    mixture_loss,
    soft_divergence,
    task_loss,
    weighted_divergence,
    weighted_task_loss,
)

ROWS = torch.tensor([True, True, False, True])


def softmax(logits, temperature=1.0):
    powers = np.exp(logits / temperature - np.max(logits / temperature, axis=-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def numbers(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_task_loss_of_a_regression_is_the_mean_squared_error_of_the_labelled_rows():
    output, target = numbers(4), torch.tensor([1.0, float("nan"), 7.0, -2.0])
    expected = ((output[0] - 1.0) ** 2 + (output[3] + 2.0) ** 2) / 2
    assert task_loss(output, target, ROWS, "regression").item() == pytest.approx(expected.item())


def test_task_loss_of_a_classification_is_the_mean_cross_entropy_of_the_labelled_rows():
    logits, target = numbers(4, 3), torch.tensor([2, -1, 0, 1])
    expected = F.cross_entropy(logits[[0, 3]], target[[0, 3]])
    torch.testing.assert_close(task_loss(logits, target, ROWS, "classification"), expected)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_unlabelled_rows_send_no_gradient(kind):
    output = (numbers(4) if kind == "regression" else numbers(4, 3)).requires_grad_()
    target = torch.tensor([1.0, float("nan"), 0.0, 2.0]) if kind == "regression" else torch.tensor([1, -1, 0, 2])
    task_loss(output, target, torch.ones(4, dtype=torch.bool), kind).backward()
    reached = output.grad.reshape(4, -1).abs().sum(1) > 0
    assert reached.tolist() == [True, False, True, True]
    assert output.grad.isfinite().all()


def test_divergence_of_logits_is_kl_from_teacher_to_student_at_temperature_t_times_t_squared():
    student, teacher = numbers(5, 4), numbers(5, 4, seed=1)
    expected = 9.0 * kl(softmax(teacher.numpy(), 3.0), softmax(student.numpy(), 3.0))
    np.testing.assert_allclose(divergence(student, teacher, "classification", 3.0), expected)


def test_divergence_of_predictions_is_the_squared_error():
    torch.testing.assert_close(
        divergence(torch.tensor([1.0, -2.0]), torch.tensor([3.0, -2.5]), "regression", 3.0), torch.tensor([4.0, 0.25])
    )


def test_soft_divergence_from_a_one_hot_target_is_the_cross_entropy():
    logits = numbers(2, 3)
    target = torch.eye(3, dtype=torch.float64)[[0, 2]]
    expected = F.cross_entropy(logits, torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(soft_divergence(logits, target, 1.0), expected)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_weighted_divergence_sums_over_teachers_and_averages_over_the_rows(kind):
    shape = (3,) if kind == "classification" else ()
    student, teachers, weights = numbers(4, 1, *shape), numbers(4, 2, *shape, seed=1), numbers(4, 2, seed=2).abs()
    weights[1] = 0.0
    expected = 0.0
    for row in (0, 1, 3):
        for i in range(2):
            s, t = student[row, 0].numpy(), teachers[row, i].numpy()
            d = (s - t) ** 2 if kind == "regression" else 4.0 * kl(softmax(t, 2.0), softmax(s, 2.0))
            expected += weights[row, i].item() * d / 3
    found = weighted_divergence(student, teachers, weights, ROWS, kind, 2.0)
    assert found.item() == pytest.approx(expected.item())


def test_hidden_loss_compares_layer_normalised_vectors():
    hidden, answers, weights = numbers(4, 5), numbers(4, 2, 5, seed=1), numbers(4, 2, seed=2).abs()

    def normal(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5)

    expected = 0.0
    for row in (0, 1, 3):
        for i in range(2):
            apart = normal(hidden[row].numpy()) - normal(answers[row, i].numpy())
            expected += weights[row, i].item() * (apart**2).mean() / 3
    assert hidden_loss(hidden, answers, weights, ROWS).item() == pytest.approx(expected)


def test_weighted_task_loss_judges_every_teacher_by_the_labels():
    outputs, target = numbers(4, 2), torch.tensor([1.0, float("nan"), 7.0, -2.0], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    errors = (outputs - target.unsqueeze(1)) ** 2
    expected = (errors[0, 0] + errors[0, 1] + errors[3, 1]) / 2
    assert weighted_task_loss(outputs, target, weights, ROWS, "regression").item() == pytest.approx(expected.item())


def test_mixture_of_predictions_is_judged_by_its_squared_error():
    gate = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    outputs, target = torch.tensor([[4.0, 0.0], [2.0, 9.0]]), torch.tensor([3.0, 1.0])
    found = mixture_loss(gate, outputs, target, torch.tensor([True, True]), "regression")
    assert found.item() == pytest.approx(((1.0 - 3.0) ** 2 + (2.0 - 1.0) ** 2) / 2)


def test_mixture_of_classifiers_mixes_probabilities_not_logits():
    gate, logits = torch.tensor([[0.3, 0.7]]), torch.tensor([[[8.0, 0.0], [0.0, 1.0]]])
    mixed = 0.3 * softmax(logits[0, 0].numpy()) + 0.7 * softmax(logits[0, 1].numpy())
    found = mixture_loss(gate, logits, torch.tensor([1]), torch.tensor([True]), "classification")
    assert found.item() == pytest.approx(-np.log(mixed[1]), rel=1e-5)


def test_mixture_of_teachers_that_are_all_sure_of_another_class_still_teaches_the_gate():
    gate = torch.tensor([[0.5, 0.5]], requires_grad=True)
    logits = torch.tensor([[[200.0, 0.0], [300.0, 0.0]]])
    loss = mixture_loss(gate, logits, torch.tensor([1]), torch.tensor([True]), "classification")
    loss.backward()
    assert loss.item() == pytest.approx(200.0 - np.log(0.5), rel=1e-5)
    assert gate.grad.isfinite().all()
    assert gate.grad[0, 0] < gate.grad[0, 1]


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_losses_are_zero_with_finite_gradients_where_no_teacher_is_present(kind):
    shape = (3,) if kind == "classification" else ()
    student, said = numbers(4, *shape).requires_grad_(), numbers(4, 2, *shape).requires_grad_()
    gate, hidden = torch.zeros(4, 2, requires_grad=True), numbers(4, 5).requires_grad_()
    absent, target = torch.zeros(4, 2, *shape), torch.tensor([0, 1, 0, 1])
    losses = [
        weighted_divergence(student.unsqueeze(1), absent, gate, ROWS, kind, 2.0),
        hidden_loss(hidden, torch.zeros(4, 2, 5), gate, ROWS),
        weighted_task_loss(said, target, gate, ROWS, kind),
        mixture_loss(gate, said, target, ROWS, kind),
    ]
    sum(losses).backward()
    assert [loss.item() for loss in losses] == [0.0] * 4
    assert all(x.grad.isfinite().all() for x in (student, said, gate, hidden))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_losses_are_zero_over_no_rows(kind):
    output = (numbers(4, 3) if kind == "classification" else numbers(4)).requires_grad_()
    none = torch.zeros(4, dtype=torch.bool)
    loss = task_loss(output, torch.tensor([0, 1, 0, 1]), none, kind)
    loss = loss + weighted_divergence(
        output.unsqueeze(1), output.detach()[:, None] + 1, torch.ones(4, 1), none, kind, 2.0
    )
    loss.backward()
    assert loss.item() == 0.0
    assert (output.grad == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 8.0))
def test_divergence_is_never_negative_and_zero_only_of_equal_distributions(seed, temperature):
    student, teacher = numbers(3, 4, seed=seed), numbers(3, 4, seed=seed + 1)
    assert (divergence(student, teacher, "classification", temperature) > 0).all()
    same = divergence(teacher + 1.5, teacher, "classification", temperature)  # a shift of all logits changes nothing
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-10, rtol=0)
