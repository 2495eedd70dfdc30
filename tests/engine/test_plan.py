"""Planning: linear in the rows, and a run looks at the rows of its own steps alone."""

import dataclasses
import time

import numpy as np
import pytest

import prefuse
from prefuse.engine.data.order import hold_out, mismatches_of_epoch, plan_epoch
from prefuse.engine.data.ragged import Ragged, Texts
from prefuse.engine.data.table import Examples
from prefuse.engine.run import plan, reference_logps
from prefuse.engine.run.plan import Steps, TrainingSet
from prefuse.engine.run.ranks import Ranks, share
from tiny_run import settings

MANY = 200_000


def many_pairs(count: int) -> Examples:
    """Pairs of 3 to 20 tokens a part; every prompt twice."""
    random = np.random.default_rng(0)

    def rows(count: int) -> Ragged:
        lengths = random.integers(3, 20, count)
        return Ragged.end_to_end(random.integers(2, 300, lengths.sum(), dtype=np.int32), lengths)

    prompts = rows(-(-count // 2)).take(np.arange(count) // 2)
    return Examples(prompts, rows(2 * count), Texts.of(f"r:{i}" for i in range(count)), sides=2, padding_free=True)


@pytest.fixture(scope="module")
def many():
    return many_pairs(MANY)


def config(**changes):
    return settings(model_name_or_path="m", dataset_name="d", output_dir="o", **changes)


def test_planning_is_linear_in_the_rows(many):
    def seconds(examples: Examples) -> float:
        examples = dataclasses.replace(examples)  # without what it knows already
        start = time.process_time()
        steps = Steps(examples, config(num_train_epochs=1.0), Ranks())
        for step in range(steps.total):
            steps.parts(step)
        return time.process_time() - start

    taken = seconds(many)
    few = min(seconds(many[: MANY // 8]) for _ in range(2))
    assert taken < 4 * 8 * few  # 8 where it is linear, 64 where it is quadratic
    assert taken < 20  # 1.5 to 2 on a machine of today, alone


def test_a_short_run_cuts_its_own_steps_alone(many, monkeypatch):
    cut, asked = [], []
    monkeypatch.setattr(
        plan, "share", lambda microbatches, *rest: cut.append(microbatches) or share(microbatches, *rest)
    )
    monkeypatch.setattr(plan, "without_padding", lambda examples, *rest: examples)

    def reference(lm, examples, batches, cache, ranks):
        asked.append(sorted(i for indices in batches for i in indices))
        return [np.float32(0)] * len(examples)

    monkeypatch.setattr(plan, "reference_logps", reference)
    start = time.process_time()
    one_of_each = dataclasses.replace(
        many, completions=many.completions[::2], sides=1, labels=np.arange(MANY) % 2 == 0, padding_free=True
    )
    for examples, loss in (many, prefuse.DPO()), (one_of_each, prefuse.KTO()):
        cut.clear()
        asked.clear()
        data, _ = plan.meet_reference(None, examples, None, loss, config(max_steps=3), Ranks())
        wanted = sorted(plan_epoch(examples.lengths, 4, 1, 42, 0).order[: 3 * 4].tolist())
        assert asked == [wanted] * (2 if isinstance(loss, prefuse.KTO) else 1)
        assert len(cut) == 3 * len(asked)
        assert (data.total_steps, data.steps_per_epoch) == (3, MANY // 4)
    assert time.process_time() - start < 20


def test_the_steps_of_a_run_are_its_epochs_one_after_the_other():
    examples = many_pairs(22)
    steps = Steps(examples, config(num_train_epochs=2.5), Ranks())
    assert (steps.per_epoch, steps.total, steps.epochs) == (6, 15, 3)
    for step in range(steps.total):
        epoch = plan_epoch(examples.lengths, 4, 1, 42, step // 6, examples.bins(4 * 2 * 64))
        assert steps.parts(step) == [epoch[step % 6]]
    assert steps.microbatches_of(0, 2) == [m for step in (12, 13, 14) for m in steps.parts(step)[0]]
    longer = Steps(examples, config(max_steps=20), Ranks(0, 2))
    assert (longer.per_epoch, longer.total, longer.epochs) == (3, 20, 7)


def test_a_rank_has_its_rows_and_a_spare_batch_where_another_has_one_more():
    examples = dataclasses.replace(many_pairs(5), padding_free=False)
    changes = config(max_steps=3, per_device_train_batch_size=1)
    seen, counts = [], []
    for rank in range(2):
        data = TrainingSet(examples, Steps(examples, changes, Ranks(0, 2)), Ranks(rank, 2))
        for step, own in enumerate(data.steps_from(0)):
            assert own.step == step
            assert [batch.rows for batch in own.batches][: len(own.rows[rank])] == own.rows[rank]
            assert len(own.batches) == 1
            counts.append(own.counts)
            seen += [row for batch in own.rows[rank] for row in batch]
    assert sorted(seen) == [f"r:{i}" for i in range(5)]
    assert counts == [[True], [True], [True], [True], [True], [False]]


def test_splitting_many_microbatches_for_many_ranks_is_quick():
    start = time.process_time()
    parts = share([[2 * i, 2 * i + 1] for i in range(20_000)], np.arange(40_000) % 97 + 1, 16_001)
    assert sorted(i for part in parts for indices in part for i in indices) == list(range(40_000))
    assert {len(part) for part in parts} == {2}
    assert time.process_time() - start < 10  # half a second; minutes where each split looks at all others


def test_numbers_for_rows_that_repeat(many):
    assert len(hold_out(many.prompts, 0.05, 3)[1]) == 2 * round(0.05 * MANY / 2)
    draws = np.asarray(mismatches_of_epoch(many.prompts, 3, 0))
    same = many.prompts.same
    assert (same[draws] != same).all()


def test_logps_of_rows_that_are_not_known_are_not_given():
    logps = reference_logps.Logps(np.array([2, 0, 3]))
    logps[2] = logps.values.new_tensor([1.0, 2.0, 3.0])
    assert logps[2].tolist() == [1, 2, 3]
    assert not logps.all_of([2, 0])
    with pytest.raises(AssertionError, match="example 0"):
        logps[0]
