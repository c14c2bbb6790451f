from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits

from ddcache.config import check_factories, load_pipeline
from ddcache.errors import SourceError, TeacherError
from ddcache.sources import SubsetSource
from ddcache.students import check_student, load_student
from ddcache.teachers import load_teacher
from pipelines.digits import teachers
from pipelines.digits.data import digits

if TYPE_CHECKING:
    from pathlib import Path

PIPELINE = "pipelines/digits/pipeline.yaml"


def seen(seed: int = 0) -> SubsetSource:
    return SubsetSource(digits(seed), "train", "transfer")


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Return name -> (time of the last write, what it was trained from)."""
    found = {}
    for path in folder.glob("*"):
        with safe_open(path, framework="pt") as file:
            found[path.name] = (path.stat().st_mtime_ns, file.metadata()["made_from"])
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    teachers.prepare(seen(), str(folder), epochs=1)
    return folder


def test_splits_are_disjoint_sized_as_asked_and_stratified() -> None:
    samples = digits().samples
    sizes = {split: len(samples.rows(split)) for split in ("train", "transfer", "calibration", "val", "test")}
    assert sizes == {"train": 300, "transfer": 600, "calibration": 100, "val": 150, "test": 647}
    labels = load_digits().target
    share = np.bincount(labels) / len(labels)
    for split in sizes:
        rows = samples.rows(split)
        assert np.abs(np.bincount(labels[rows], minlength=10) - share * len(rows)).max() <= 2, split


def test_a_seed_gives_the_same_source_and_another_seed_another_split() -> None:
    assert digits(3).samples.digests() == digits(3).samples.digests()
    assert digits(3).digests() == digits(4).digests()
    assert digits(3).samples.digests()["splits"] != digits(4).samples.digests()["splits"]


def test_labels_are_hidden_in_transfer_and_right_elsewhere() -> None:
    samples = digits().samples
    target, hidden = samples.targets["digit"], samples.splits == "transfer"
    assert (target[hidden] == -1).all()
    np.testing.assert_array_equal(target[~hidden], load_digits().target[~hidden])


def test_images_are_float32_from_0_to_1() -> None:
    image = digits().read(np.arange(1797))["image"]
    assert image.shape == (1797, 1, 8, 8)
    assert image.dtype == torch.float32
    assert (image.min(), image.max()) == (0.0, 1.0)


def test_sizes_without_test_samples_are_refused() -> None:
    with pytest.raises(SourceError, match="leave test samples"):
        digits(transfer=1300)


def test_the_pipeline_file_is_valid_and_its_modules_fit(prepared: Path) -> None:
    overrides = tuple(f"teachers.{n}.args.weights={prepared / n}.safetensors" for n in teachers.TEACHERS)
    pipeline = load_pipeline(PIPELINE, overrides)
    check_factories(pipeline)
    image = digits().read(np.arange(4))
    for name, config in pipeline.teachers.items():
        teacher = load_teacher(name, config)
        features = teacher.features(teacher.inputs(image), list(config.taps), 4)
        assert features["output"].shape == (4, 10)
    check_student("mlp", pipeline.students["mlp"], load_student("mlp", pipeline.students["mlp"]), image)


def test_the_student_is_over_ten_times_smaller_than_the_foundation_teacher() -> None:
    pipeline = load_pipeline(PIPELINE)
    sizes = {name: sum(p.numel() for p in build().parameters()) for name, (build, _) in teachers.TEACHERS.items()}
    student = sum(p.numel() for p in load_student("mlp", pipeline.students["mlp"]).parameters())
    assert max(sizes.values()) == sizes[pipeline.foundation or ""]
    assert student * 10 < sizes["vit"]


def test_prepare_writes_each_teacher_once(prepared: Path) -> None:
    before = state(prepared)
    assert set(before) == {"vit.safetensors", "convnet.safetensors", "histograms.safetensors"}
    teachers.prepare(seen(), str(prepared), epochs=1)
    assert state(prepared) == before


def test_prepare_is_reproducible_and_leaves_the_global_generator_alone(prepared: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    teachers.prepare(seen(), str(tmp_path), epochs=1)
    assert torch.equal(torch.rand(3), expected)
    for name, load in (("vit", teachers.vit), ("histograms", teachers.histograms)):
        first, second = (load(str(folder / f"{name}.safetensors")).state_dict() for folder in (prepared, tmp_path))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_prepare_trains_again_what_other_samples_settings_or_damage_concern(tmp_path: Path) -> None:
    teachers.prepare(seen(), str(tmp_path), epochs=1)
    before = state(tmp_path)
    (tmp_path / "histograms.safetensors").write_bytes(b"damaged")
    teachers.prepare(seen(), str(tmp_path), epochs=1)
    mended = state(tmp_path)
    assert mended["vit.safetensors"] == before["vit.safetensors"]
    assert mended["histograms.safetensors"][1] == before["histograms.safetensors"][1]
    teachers.prepare(seen(1), str(tmp_path), epochs=1)
    other = state(tmp_path)
    assert all(other[name][1] != before[name][1] for name in before)
    teachers.prepare(seen(1), str(tmp_path), epochs=1, seed=1)
    assert all(state(tmp_path)[name][1] != other[name][1] for name in before)


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_missing_or_damaged_weights_say_what_to_run(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "vit.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TeacherError, match="ddcache extract"):
        teachers.vit(str(path))


def test_an_expert_learns_from_the_training_rows_alone(tmp_path: Path) -> None:
    """The histograms are cheap enough to train for real: well ahead of chance on images that it never saw."""
    build, recipe = teachers.TEACHERS["histograms"]
    module = teachers._train(build, seen(), recipe, seed=0)
    labels = load_digits().target
    source = digits()
    test = source.samples.rows("test")
    with torch.inference_mode():
        found = module(source.read(test)["image"]).argmax(1).numpy()
    assert (found == labels[test]).mean() > 0.95
