from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddcache.config import TeacherConfig
from ddcache.errors import ConfigError, TeacherError
from ddcache.teachers import digest_weights, load_teacher, pool, select_output
from tests import tiny


def config(factory: str = "net", taps: dict[str, object] | None = None, **fields: object) -> TeacherConfig:
    taps = taps or {"body": {"module": "body"}, "output": {"module": "head", "kind": "output"}}
    return TeacherConfig.model_validate({"factory": f"tests.tiny:{factory}", "role": "expert", "taps": taps, **fields})


def test_one_forward_pass_gives_the_outputs_of_all_taps() -> None:
    teacher = load_teacher("t", config(args={"seed": 4}))
    x = torch.randn(5, 8)
    features = teacher.features(teacher.inputs({"x": x, "group": torch.zeros(5)}), ["body", "output"], 5)
    net = tiny.net(4)
    torch.testing.assert_close(features["body"], net.body(x).detach())
    torch.testing.assert_close(features["output"], net(x).detach())


def test_a_loaded_teacher_is_frozen_and_in_eval_mode() -> None:
    teacher = load_teacher("t", config())
    assert not teacher.model.module.training
    assert not any(p.requires_grad for p in teacher.model.module.parameters())


def test_a_missing_module_name_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"teachers.t.taps.body.module: Net has no module 'boddy'.*'body'"):
        load_teacher("t", config(taps={"body": {"module": "boddy"}}))


def test_an_input_that_forward_needs_and_the_source_lacks_is_named() -> None:
    teacher = load_teacher("t", config())
    with pytest.raises(ConfigError, match=r"forward needs \['x'\], but the source gives \['y'\]"):
        teacher.inputs({"y": torch.zeros(2, 8)})


def test_an_output_in_a_mapping_is_selected_by_key() -> None:
    teacher = load_teacher("t", config("several", {"core": {"module": "core", "select": "hidden"}}))
    assert teacher.features((torch.zeros(3, 8),), ["core"], 3)["core"].shape == (3, 5)


@pytest.mark.parametrize(
    ("output", "select", "message"),
    [
        ({"a": torch.zeros(1)}, None, r"select: is needed: the module returns a dict; choose one of \['a'\]"),
        ({"a": torch.zeros(1)}, "b", r"'b' is not there"),
        ((torch.zeros(1), None), 1, "expected item 1 to be a tensor, found NoneType"),
        ((torch.zeros(1),), 2, r"choose one of \[0\]"),
        (torch.zeros(1), 0, "found a tensor"),
        ("text", None, "expected a tensor, tuple or mapping, found str"),
    ],
)
def test_a_wrong_selection_says_what_there_is_to_choose(output: object, select: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_output(output, select, "here")  # type: ignore[arg-type]


def test_a_teacher_that_raises_is_named() -> None:
    teacher = load_teacher("t", config("broken", args={"how": "raise", "above": -9.0}))
    with pytest.raises(TeacherError, match="teacher 't' raised RuntimeError: no such picture"):
        teacher.features((torch.zeros(2, 8),), ["body"], 2)


def test_an_output_of_another_batch_size_is_refused() -> None:
    teacher = load_teacher("t", config())
    with pytest.raises(TeacherError, match="3 samples on its first axis, found shape"):
        teacher.features((torch.zeros(2, 8),), ["body"], 3)


@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_token_segments_are_those_of_adaptive_average_pooling(size: int, length: int, data: st.DataObject) -> None:
    segments = data.draw(st.integers(1, length))
    value = torch.randn(size, length, 3, dtype=torch.float64)
    expected = nn.functional.adaptive_avg_pool1d(value.transpose(1, 2), segments).transpose(1, 2)
    torch.testing.assert_close(pool(value, f"tokens:{segments}", None, ""), expected)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(1, 2))
def test_padding_does_not_change_what_is_pooled(lengths: list[int], segments: int) -> None:
    longest = max(lengths)
    value = torch.randn(len(lengths), longest, 3)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    for how in ("mean", f"tokens:{segments}"):
        pooled = pool(value, how, mask, "")
        for row, length in enumerate(lengths):
            alone = pool(value[row : row + 1, :length], how, None, "")
            torch.testing.assert_close(pooled[row : row + 1], alone)


def test_a_feature_map_is_pooled_over_its_pixels() -> None:
    value = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pool(value, "mean", None, ""), value.mean((2, 3)))
    assert pool(value, "tokens:4", None, "").shape == (2, 4, 3)
    assert pool(value, "none", None, "").shape == (2, 3, 4, 5)


def test_cls_takes_the_first_token() -> None:
    value = torch.randn(2, 7, 3)
    assert torch.equal(pool(value, "cls", None, ""), value[:, 0])


def test_pooling_what_has_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="found \\(2, 3\\); use 'none'"):
        pool(torch.zeros(2, 3), "mean", None, "here")
    with pytest.raises(ConfigError, match="at least 9 tokens, found 4"):
        pool(torch.zeros(2, 4, 3), "tokens:9", None, "here")


def test_the_weights_digest_sees_every_tensor_and_no_order() -> None:
    def digest(change: str = "") -> str:
        net = tiny.net(0)
        net.register_buffer("scale", torch.ones(2), persistent=False)
        with torch.no_grad():
            if change == "value":
                net.head.bias[0] += 1e-6
            if change == "buffer":
                net.scale[1] = 2  # type: ignore[index]
            if change == "dtype":
                net.head.double()
        return digest_weights(net)

    assert digest() == digest()
    assert len({digest(), digest("value"), digest("buffer"), digest("dtype")}) == 4


def test_the_weights_digest_takes_bfloat16_and_empty_tensors() -> None:
    module = nn.Linear(2, 2).bfloat16()
    module.register_buffer("none", torch.empty(0))
    assert digest_weights(module) == digest_weights(module)


def test_preprocessing_is_chosen_by_row_domain() -> None:
    from ddcache.teachers import FrozenModel, Teacher

    model = FrozenModel(nn.Identity(), {("g",): lambda b: b["g"], (): lambda b: b["x"]})
    teacher = Teacher("t", config(), model)
    batch = {"g": torch.ones(2), "x": torch.zeros(2)}
    assert torch.equal(teacher.inputs(batch, ("g",)), batch["g"])  # type: ignore[arg-type]
    assert torch.equal(teacher.inputs(batch), batch["x"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"keyed by \['h'\]"):
        teacher.inputs(batch, ("h",))


def test_autocast_computes_in_the_dtype_asked_for() -> None:
    teacher = load_teacher("t", config(autocast="bfloat16"))
    x = torch.randn(4, 8)
    assert teacher.features({"x": x}, ["output"], 4)["output"].dtype == torch.bfloat16
    assert np.isfinite(teacher.features({"x": x}, ["body"], 4)["body"].float().numpy()).all()
