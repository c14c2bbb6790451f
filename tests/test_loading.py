from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddcache.cache.reader import Cache
from ddcache.errors import CacheError, ConfigError
from ddcache.extract import extract_features
from ddcache.loading import FeatureLoader
from ddcache.loading.plan import plan_epoch
from ddcache.prefetch import prefetch

if TYPE_CHECKING:
    from ddcache.loading import Batch

Make = "Callable[..., Pipeline]"


@pytest.fixture
def cache(make: Make) -> Cache:
    pipeline = make()
    extract_features(pipeline)
    return Cache.open(pipeline.cache)


@given(
    n=st.integers(1, 200),
    size=st.integers(1, 40),
    world=st.integers(1, 5),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
)
def test_ranks_together_visit_every_row_exactly_once_in_the_global_order(
    n: int, size: int, world: int, seed: int, epoch: int
) -> None:
    rows = np.arange(100, 100 + n)
    plan = plan_epoch({"train": rows}, {"train": size}, seed=seed, epoch=epoch, world_size=world)
    alone = plan_epoch({"train": rows}, {"train": size}, seed=seed, epoch=epoch)
    visited = [(i, plan.batch(i)["train"]) for rank in range(world) for i in plan.of_rank(rank, world)]
    merged = np.concatenate([own for _, own in sorted(visited, key=lambda pair: pair[0])])
    assert np.array_equal(merged, alone.orders["train"])
    assert sorted(merged.tolist()) == rows.tolist()


@given(n=st.integers(1, 60), m=st.integers(1, 60), size=st.integers(1, 20), other=st.integers(1, 20))
def test_the_other_splits_cycle_through_all_of_their_rows(n: int, m: int, size: int, other: int) -> None:
    plan = plan_epoch(
        {"train": np.arange(n), "transfer": np.arange(1000, 1000 + m)},
        {"train": size, "transfer": other},
        seed=0,
        epoch=0,
    )
    order = plan.orders["transfer"]
    assert len(order) == plan.batches * other
    for start in range(0, len(order) - m + 1, m):
        assert sorted(order[start : start + m].tolist()) == list(range(1000, 1000 + m))


@given(n=st.integers(1, 100), size=st.integers(1, 30), world=st.integers(1, 4))
def test_drop_last_gives_every_rank_as_many_full_batches(n: int, size: int, world: int) -> None:
    plan = plan_epoch({"train": np.arange(n)}, {"train": size}, seed=0, epoch=0, world_size=world, drop_last=True)
    assert len({len(plan.of_rank(rank, world)) for rank in range(world)}) == 1
    assert all(len(plan.batch(i)["train"]) == size for i in range(plan.batches))
    assert plan.batches == n // size // world * world


def test_epochs_and_seeds_have_their_own_orders() -> None:
    def order(**which: int) -> list[int]:
        orders = plan_epoch({"train": np.arange(50)}, {"train": 8}, **which).orders  # type: ignore[arg-type]
        return orders["train"].tolist()

    assert order(seed=0, epoch=0) == order(seed=0, epoch=0)
    assert order(seed=0, epoch=0) != order(seed=0, epoch=1)
    assert order(seed=0, epoch=0) != order(seed=1, epoch=0)
    unshuffled = plan_epoch({"train": np.arange(50)}, {"train": 8}, seed=0, epoch=3, shuffle="none")
    assert unshuffled.orders["train"].tolist() == list(range(50))


def test_batches_hold_what_the_cache_holds_for_their_rows(cache: Cache) -> None:
    seen = []
    for batch in FeatureLoader(cache, 50, seed=3):
        rows = batch.rows.numpy()
        seen += rows.tolist()
        assert batch.keys.tolist() == cache.samples.keys[rows].tolist()
        assert torch.equal(batch.targets["label"], torch.from_numpy(cache.samples.targets["label"][rows]))
        assert torch.equal(batch.inputs["x"], cache.read_inputs(rows)["x"])
        for teacher, tap in (("big", "body"), ("big", "output"), ("groups", "table")):
            assert torch.equal(batch.features[teacher][tap], cache.read(teacher, tap, rows))
            assert batch.present[teacher].all()
    assert sorted(seen) == cache.samples.rows("train").tolist()


def test_a_mapping_of_splits_gives_parts_of_those_sizes(cache: Cache) -> None:
    sizes = {"train": 40, "transfer": 24, "calibration": 8}
    loader = FeatureLoader(cache, split=sizes)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(cache.samples.rows("train")) // 40)
    for batch in batches[:-1]:
        assert {split: len(batch.part(split)) for split in sizes} == sizes
    for batch in batches:
        for split in sizes:
            part = batch.part(split)
            assert set(cache.samples.splits[part.rows.numpy()].tolist()) == {split}
            assert torch.equal(part.features["big"]["body"], cache.read("big", "body", part.rows.numpy()))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch_bytes", [1, 10_000, 2**26])
def test_threads_and_prefetch_change_no_batch(cache: Cache, threads: int, prefetch_bytes: int) -> None:
    reference = [b.rows.tolist() for b in FeatureLoader(cache, 32, seed=1)]
    loader = FeatureLoader(cache, 32, seed=1, threads=threads, prefetch_bytes=prefetch_bytes)
    assert [b.rows.tolist() for b in loader] == reference


def test_each_loop_is_the_next_epoch(cache: Cache) -> None:
    loader = FeatureLoader(cache, 32, seed=1)
    first, second = ([b.rows.tolist() for b in loader] for _ in range(2))
    loader.set_epoch(0)
    assert [b.rows.tolist() for b in loader] == first
    assert first != second


@given(cut=st.integers(0, 9))
def test_a_loader_resumes_at_the_exact_next_batch(cached: Cache, cut: int) -> None:
    whole = [b.rows.tolist() for b in FeatureLoader(cached, 32, seed=5)]
    loader, taken = FeatureLoader(cached, 32, seed=5), []
    iterator = iter(loader)
    for _ in range(cut):
        taken.append(next(iterator).rows.tolist())
    resumed = FeatureLoader(cached, 32, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert taken + [b.rows.tolist() for b in resumed] == whole


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    from ddcache.config import load_pipeline
    from tests.tiny import write_pipeline

    pipeline = load_pipeline(write_pipeline(tmp_path_factory.mktemp("cached")))
    extract_features(pipeline)
    return Cache.open(pipeline.cache)


def test_the_state_of_another_order_is_refused(cache: Cache) -> None:
    state = FeatureLoader(cache, 32, seed=5).state_dict()
    with pytest.raises(ConfigError, match="expected seed 6, found 5"):
        FeatureLoader(cache, 32, seed=6).load_state_dict(state)


def test_only_the_teachers_and_taps_asked_for_are_read(cache: Cache) -> None:
    batch = next(iter(FeatureLoader(cache, teachers=["big"], taps={"big": ["output"]})))
    assert {t: list(taps) for t, taps in batch.features.items()} == {"big": ["output"]}
    assert next(iter(FeatureLoader(cache, teachers=[]))).features == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "tran"}, ConfigError, "split: expected one of"),
        ({"split": {"train": 0}}, ConfigError, "at least one sample"),
        ({"teachers": ["bgi"]}, ConfigError, "not 'bgi'"),
        ({"taps": {"big": ["bdoy"]}}, CacheError, "no array 'bdoy' in teachers/big; it has"),
        ({"taps": {"bgi": ["body"]}}, ConfigError, r"found \['bgi'\]"),
        ({"shuffle": "locally"}, ConfigError, "shuffle: expected"),
        ({"rank": 2, "world_size": 2}, ConfigError, "rank: expected 0 to 1"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_read(
    cache: Cache, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FeatureLoader(cache, **arguments)  # type: ignore[arg-type]


def test_a_damaged_chunk_raises_in_the_loop_and_leaves_no_thread(cache: Cache) -> None:
    chunk = cache.path / "teachers/big/body/c/3/0/0"
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    before = threading.active_count()

    def consume() -> list[Batch]:
        return list(FeatureLoader(cache, 16))

    with pytest.raises(CacheError, match="teachers/big/body rows 384 to 511: the chunk is damaged"):
        consume()
    assert threading.active_count() == before


def test_closing_early_leaves_no_thread(cache: Cache) -> None:
    before = threading.active_count()
    for _ in range(20):
        iterator = iter(FeatureLoader(cache, 16, prefetch_bytes=1))
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_prefetch_keeps_the_order_and_raises_in_place() -> None:
    def half(value: int) -> float:
        return 1 / value

    assert list(prefetch(half, [1, 2, 4], 2)) == [1, 0.5, 0.25]
    iterator = prefetch(half, [1, 0, 2], 2)
    assert next(iterator) == 1
    with pytest.raises(ZeroDivisionError):
        next(iterator)
