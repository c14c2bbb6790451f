import pytest
import torch

from ddcache.distill import (
    METHODS,
    DiverseDistill,
    KnowledgeDistillation,
    TapSpec,
    Task,
    TeacherSpec,
    build_distiller,
    check_settings,
    parse_method,
)
from ddcache.errors import ConfigError

TASK = Task("regression", "rating")
CNN = TeacherSpec("cnn", {"mid": TapSpec((4,))}, "output")
VIT = TeacherSpec("vit", {"mid": TapSpec((6,))})
BARE = TeacherSpec("bare", {}, "output")


def test_a_method_name_splits_into_class_and_teacher():
    assert parse_method("kd:cnn") == (KnowledgeDistillation, "cnn")
    assert parse_method("kd:v1.5:b") == (KnowledgeDistillation, "v1.5:b")
    assert parse_method("diversedistill") == (DiverseDistill, None)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("boost", {}, r"methods\.boost: unknown method; expected one of \['none', 'kd'"),
        ("kd", {}, r"methods\.kd: expected a teacher, as in 'kd:<teacher>'"),
        ("kd:", {}, r"methods\.kd:: expected a teacher"),
        ("average:cnn", {}, r"methods\.average:cnn: this method takes no teacher; write 'average'"),
        ("none:", {}, r"methods\.none:: this method takes no teacher"),
        ("none", {"x": 1}, r"methods\.none\.x: unknown setting; expected one of \[\]"),
        ("kd:cnn", {"weight": 1}, r"methods\.kd:cnn\.weight: unknown setting; expected one of \['output_weight'\]"),
        ("average", {"output_weight": "4"}, r"output_weight: expected a number >= 0, found '4'"),
        ("average", {"output_weight": -1.0}, r"output_weight: expected a number >= 0, found -1.0"),
        ("average", {"output_weight": float("nan")}, r"output_weight: expected a number >= 0, found nan"),
        ("average", {"output_weight": True}, r"output_weight: expected a number >= 0, found True"),
        ("diversedistill", {"questions": 2.0}, r"questions: expected a whole number >= 1, found 2.0"),
        ("diversedistill", {"questions": 0}, r"questions: expected a whole number >= 1, found 0"),
        ("diversedistill", {"questions": True}, r"questions: expected a whole number >= 1, found True"),
        ("diversedistill", {"gate": "soft"}, r"gate: expected one of \['learned', 'uniform'\], found 'soft'"),
        (
            "diversedistill",
            {"answers": None},
            r"answers: expected one of \['attention', 'linear', 'none'\], found None",
        ),
        ("diversedistill", {"gate_bias": "12"}, r"gate_bias: expected a list of finite numbers or null, found '12'"),
        ("diversedistill", {"gate_bias": [0.0, float("-inf")]}, r"gate_bias: expected a list of finite numbers"),
        ("diversedistill", {"heads": 5}, r"methods\.diversedistill\.heads: expected a divisor of answer_dim \(32\)"),
        ("diversedistill", {"gate": "uniform", "gate_bias": [1.0]}, r"methods\.diversedistill\.gate_bias: a uniform"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(name, settings)
    with pytest.raises(ConfigError, match=message):
        build_distiller(name, settings, 8, [CNN], TASK)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("none", {}),
        ("kd:cnn", {"output_weight": 2}),
        ("diversedistill", {"gate_bias": [-1, 0.5], "heads": 2, "answer_dim": 6, "answers": "linear"}),
        ("diversedistill", {"gate_bias": None, "output_weight": 0.0}),
    ],
)
def test_right_settings_build(name, settings):
    check_settings(name, settings)
    distiller = build_distiller(name, settings, 8, [CNN, VIT], TASK)
    assert type(distiller) is METHODS[name.partition(":")[0]]
    if "output_weight" in settings:
        assert distiller.output_weight == settings["output_weight"]


@pytest.mark.parametrize(
    ("name", "settings", "teachers", "message"),
    [
        ("kd:vit", {}, [CNN, VIT], r"kd: teacher 'vit' has no output .* `kind: output`"),
        ("kd:gpt", {}, [CNN, VIT], r"expected a teacher among \['cnn', 'vit'\], found 'gpt'"),
        ("average", {}, [CNN, VIT], r"average: teacher 'vit' has no output .*diversedistill"),
        ("average", {}, [], r"average: expected at least one teacher"),
        ("diversedistill", {}, [], r"diversedistill: expected at least one teacher"),
        ("diversedistill", {}, [CNN, BARE], r"teacher 'bare' has no feature tap .* answers: none"),
        ("diversedistill", {"answers": "none"}, [CNN, VIT], r"answers: none: teacher 'vit' has no output"),
        (
            "diversedistill",
            {"gate_bias": [1.0]},
            [CNN, VIT],
            r"gate_bias: expected 2 finite numbers, .*\['cnn', 'vit'\]",
        ),
    ],
)
def test_teachers_that_a_method_cannot_use_are_refused_by_name(name, settings, teachers, message):
    with pytest.raises(ConfigError, match=message):
        build_distiller(name, settings, 8, teachers, TASK)


def test_kd_of_several_teachers_is_refused():
    with pytest.raises(ConfigError, match=r"expected one teacher, found \['cnn', 'bare'\]; use 'average'"):
        KnowledgeDistillation(8, [CNN, BARE], TASK)


def test_methods_read_only_the_taps_they_use():
    both = [CNN, VIT]
    assert build_distiller("none", {}, 8, both, TASK).reads == {}
    assert build_distiller("kd:cnn", {}, 8, both, TASK).reads == {"cnn": ("output",)}
    assert build_distiller("average", {}, 8, [CNN, BARE], TASK).reads == {"cnn": ("output",), "bare": ("output",)}
    assert build_distiller("diversedistill", {}, 8, both, TASK).reads == {"cnn": ("mid", "output"), "vit": ("mid",)}
    outputs_only = build_distiller("diversedistill", {"answers": "none"}, 8, [CNN, BARE], TASK)
    assert outputs_only.reads == {"cnn": ("output",), "bare": ("output",)}


def test_methods_say_which_splits_they_want():
    assert {name: cls.splits for name, cls in METHODS.items()} == {
        "none": (),
        "kd": ("transfer",),
        "average": ("transfer",),
        "diversedistill": ("transfer", "calibration"),
    }


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4, 5)])
def test_a_tap_of_another_rank_is_refused(shape):
    with pytest.raises(ConfigError, match="expected a tap of shape"):
        TapSpec(shape)


@pytest.mark.parametrize(("shape", "channels", "slots"), [((5,), 5, 1), ((3, 5), 5, 3), ((5, 2, 3), 5, 6)])
def test_a_tap_knows_its_slots_and_their_width(shape, channels, slots):
    tap = TapSpec(shape, torch.zeros(channels), torch.ones(channels))
    assert (tap.channels, tap.slots) == (channels, slots)
    with pytest.raises(ConfigError, match="one value a channel"):
        TapSpec(shape, std=torch.ones(channels + 1))
