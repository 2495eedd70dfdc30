"""The table of tiles: how it is read, which row holds where, and how the tuner races candidates and writes rows.

No GPU: the tuner's timer is a fake, or wraps the interpreter.
"""

import contextlib
import functools
import inspect
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import prefuse
from aot_worker import compiling_processes
from prefuse.bench.truth.head_cases import NEEDS, check_head, evaluate, random_inputs
from prefuse.kernels.tiles import table as configs
from prefuse.kernels.tiles import tune
from prefuse.kernels.tiles.table import Config, Row, choose, read, trial

pytest.importorskip("triton")

from prefuse.kernels import launch
from prefuse.kernels.tiles.aot import CHIPS
from prefuse.kernels.tiles.shipped import users

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the chip of CPU tensors under the interpreter")

GOOD = {
    "chip": "sm_90",
    "dtype": "half",
    "operands": "descriptors",
    "kernel": "fold",
    "tile": [64, 64, 64],
    "warps": 4,
    "stages": 2,
    "source": "compiled",
}
SHIPPED = read(configs.TABLE)


def toml(*rows):
    """A table file's text."""
    lines = ["  {" + ", ".join(f"{k} = {v!r}" for k, v in row.items()) + "}," for row in rows]
    return "\n".join(["rows = [", *lines, "]"])


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Puts rows into a file, and the file into PREFUSE_TILES."""

    def forget():
        configs.table.cache_clear()
        configs.find.cache_clear()

    def install(*rows):
        path = tmp_path / "own.toml"
        path.write_text(toml(*rows))
        monkeypatch.setenv("PREFUSE_TILES", str(path))
        forget()
        return path

    yield install
    monkeypatch.undo()
    forget()


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("row", SHIPPED, ids=str)
def test_a_shipped_row_fits_its_chip_and_serves_a_kernel(row):
    assert 0 < row.shared_bytes <= CHIPS[row.chip].shared_limit
    # A row that no kernel runs with would be a mistake in its columns, and the compiler would never see it.
    assert users(row)


def test_a_good_row_is_read_as_it_stands(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(toml(GOOD | {"tile": [128, 64, 32], "min_d": 2048, "source": "measured on a chip"}))
    expected = Row(90, "half", "fold", Config(128, 64, 32, 4, 2, True), "measured on a chip", 2048, 0, configs.OWN)
    assert read(path) == (expected,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": "sm_75"}, "chip must be sm_<80 or more>, gfx<arch> or interpreter, got 'sm_75'"),
        ({"chip": "H100"}, "chip must be sm_<80 or more>"),
        ({"chip": 90}, "chip must be .* got 90"),
        ({"chip": "sm_80"}, "sm_80 has no tensor descriptors; its operands are pointers"),
        ({"chip": "gfx942"}, "gfx942 has no tensor descriptors"),
        ({"dtype": "bf16"}, r"dtype must be one of \['half', 'float32'\], got 'bf16'"),
        ({"operands": "tma"}, r"operands must be one of \['pointers', 'descriptors'\], got 'tma'"),
        ({"kernel": "folds"}, r"kernel must be one of \['fold', .*'kl plain'\], got 'folds'"),
        ({"tile": [64, 64]}, r"tile must be three powers of two from 16 to 1024, got \[64, 64\]"),
        ({"tile": [64, 96, 64]}, r"tile must be three powers of two .* got \[64, 96, 64\]"),
        ({"tile": [64, 64, 8]}, r"tile must be three powers of two .* got \[64, 64, 8\]"),
        ({"warps": 6}, "warps must be a power of two up to 32, got 6"),
        ({"stages": 0}, "stages must be an integer >= 1, got 0"),
        ({"stages": 2.5}, "stages must be an integer >= 1, got 2.5"),
        ({"min_d": -1}, "min_d must be an integer >= 0, got -1"),
        ({"source": "a guess"}, 'source must be "compiled" or "measured on <gpu>, ...", got \'a guess\''),
        ({"min_n": 64}, r"expected columns .*: unknown \['min_n'\]"),
        ({"warps": None}, r"expected columns .*: missing \['warps'\]"),
    ],
)
def test_a_wrong_row_is_refused_by_file_and_number(tmp_path, change, message):
    path = tmp_path / "own.toml"
    wrong = {name: value for name, value in (GOOD | change).items() if value is not None}
    path.write_text(toml(GOOD | {"kernel": "outputs"}, wrong))
    with pytest.raises(ValueError, match=rf"{path}, row 2 \({wrong['chip']} .*\): {message}"):
        read(path)


def test_two_rows_for_the_same_are_refused(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(toml(GOOD, GOOD | {"min_d": 512}, GOOD | {"warps": 8}))
    with pytest.raises(ValueError, match=r"row 3 \(sm_90 half descriptors fold\): an earlier row holds for the same"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows = [", "is not TOML"),
        ("", r"expected one list `rows = \[\.\.\.\]`, got \[\]"),
        ("rows = 3", r"expected one list `rows = \[\.\.\.\]`"),
        ("rows = [3]", r"row 1 \(\?\): expected \{ chip = \.\.\., \.\.\. \}, got 3"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read(path)


def test_a_table_of_ones_own_that_is_not_there_is_refused(own_table):
    path = own_table(GOOD)
    path.unlink()
    with pytest.raises(ValueError, match=rf"PREFUSE_TILES names {path}, which is no file"):
        choose("fold", 90, torch.bfloat16, True, 64, 1000)


# ------------------------------------------------------------------------------------------------- choosing


def tile_of(kernel="fold", chip=90, dtype=torch.bfloat16, descriptors=True, d=4096, v=128256):
    return choose(kernel, chip, dtype, descriptors, d, v)


def row_of(chip, dtype, kernel, descriptors):
    (row,) = [
        r for r in SHIPPED if (r.chip, r.dtype, r.kernel, r.config.descriptors) == (chip, dtype, kernel, descriptors)
    ]
    return row.config


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        # An NVIDIA chip without rows takes the nearest older one's that has this path for operands.
        (("fold", 86, torch.float16, True), (80, "half", "fold", False)),
        (("fold", 89, torch.bfloat16, True), (80, "half", "fold", False)),
        (("fold", 90, torch.bfloat16, True), (90, "half", "fold", True)),
        (("fold", 90, torch.bfloat16, False), (80, "half", "fold", False)),
        (("dlogits", 103, torch.bfloat16, True), (100, "half", "dlogits", True)),
        (("dlogits", 121, torch.bfloat16, True), (120, "half", "dlogits", True)),
        (("dlogits", 121, torch.bfloat16, False), (100, "half", "dlogits", False)),
        # float32 has no rows by descriptor.
        (("outputs", 90, torch.float32, True), (80, "float32", "outputs", False)),
        # A slope has a row where it needs one; elsewhere it is the fold's, and never an older chip's own.
        (("pull softcap", 90, torch.bfloat16, True), (90, "half", "pull softcap", True)),
        (("pull softcap", 100, torch.bfloat16, True), (100, "half", "fold", True)),
        (("pull softcap", 80, torch.bfloat16, True), (80, "half", "fold", False)),
        (("pull softcap outputs", 90, torch.bfloat16, True), (90, "half", "pull softcap outputs", True)),
        (("pull softcap outputs", 120, torch.bfloat16, True), (120, "half", "outputs", True)),
        # AMD by name: CDNA is one family.
        (("fold", "gfx942", torch.bfloat16, True), ("gfx942", "half", "fold", False)),
        (("fold", "gfx90a", torch.float32, True), ("gfx942", "float32", "fold", False)),
        (("fold", "gfx950", torch.float16, True), ("gfx942", "half", "fold", False)),
    ],
)
def test_the_row_that_holds(asked, held):
    assert choose(*asked, 4096, 128256) == row_of(*held)


def test_an_unknown_chip_of_amd_is_refused_with_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"no tile for 'fold' on gfx1100 in tiles\.toml; use impl=\"torch\", or name"
    ):
        tile_of(chip="gfx1100")


def test_the_chip_of_amd_is_its_architecture(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert configs.capability(torch.device("cuda")) == "gfx942"


def test_the_chip_of_nvidia_is_its_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert configs.capability(torch.device("cuda")) == 120


def test_the_most_specific_row_of_ones_own_table_goes_first(own_table):
    own_table(
        GOOD | {"tile": [64, 64, 64], "min_d": 1024, "min_v": 50000},
        GOOD | {"tile": [64, 128, 64], "min_d": 2048},
        GOOD | {"tile": [64, 256, 64], "min_d": 1024},
        GOOD | {"tile": [32, 64, 64], "chip": "sm_100"},
        GOOD | {"tile": [16, 64, 64], "operands": "pointers"},
        GOOD | {"tile": [32, 32, 64], "chip": "gfx1100", "operands": "pointers"},
    )
    sizes = {
        (512, 128256): (128, 256),  # none of them holds: the package's
        (1024, 32000): (64, 256),
        (1024, 49999): (64, 256),
        (1024, 50000): (64, 64),
        (2047, 128256): (64, 64),
        (2048, 128256): (64, 128),  # D first
        (2048, 1): (64, 128),
    }
    made = {size: tile_of(d=size[0], v=size[1]) for size in sizes}
    assert {size: (c.block_n, c.block_v) for size, c in made.items()} == sizes
    assert tile_of(chip=103).block_n == 32  # newer than sm_100: its row, and not sm_90's
    assert tile_of(chip=120).block_n == 128  # the package's of sm_120 is nearer
    assert tile_of(descriptors=False).block_n == 16
    assert tile_of(chip="gfx1100").block_n == 32  # so a chip may be added
    assert tile_of("outputs") == row_of(90, "half", "outputs", True)  # rows that it lacks are the package's
    assert tile_of("pull softcap") == row_of(90, "half", "pull softcap", True)


def test_a_chip_with_a_fold_of_its_own_pulls_with_it_under_a_softcap(own_table):
    own_table(GOOD | {"chip": "sm_89", "operands": "pointers"})
    assert tile_of("pull softcap", chip=89) == tile_of("fold", chip=89) == Config(64, 64, 64, 4, 2, False)
    assert tile_of("outputs", chip=89) == row_of(80, "half", "outputs", False)


@pytest.mark.parametrize(
    ("outputs", "pull", "softcap", "kernel"),
    [
        (False, False, False, "fold"),
        (False, False, True, "fold"),
        (False, True, False, "fold"),  # the same tile without gradients and frozen: the same bits
        (False, True, True, "pull softcap"),
        (True, False, True, "outputs"),
        (True, True, False, "outputs"),
        (True, True, True, "pull softcap outputs"),
    ],
)
def test_the_name_of_a_forward(outputs, pull, softcap, kernel):
    assert configs.fold_kernel(outputs, pull, softcap) == kernel


def test_a_trial_goes_before_everything_and_ends(own_table):
    own_table(GOOD | {"min_d": 4096, "min_v": 128256})
    before = tile_of()
    tried = Row(90, "half", "fold", Config(16, 16, 16, 1, 1, True), "compiled")
    with contextlib.suppress(KeyError), trial(tried):
        assert tile_of() == tried.config
        raise KeyError
    assert tile_of() == before != tried.config


def test_a_tile_does_not_depend_on_the_number_of_rows(monkeypatch, device):
    """Neither by signature nor as it is called, in any mode."""
    assert list(inspect.signature(choose).parameters) == ["kernel", "chip", "dtype", "descriptors", "d", "v"]
    asked = []

    def spy(*args):
        asked[-1].add((args, choose(*args)))
        return choose(*args)

    monkeypatch.setattr(launch, "choose", spy)
    head = functools.partial(prefuse.linear_logprobs, impl="triton")
    for n in (1, 16, 50):
        asked.append(set())
        inputs = random_inputs(n, 16, 41, bias=True, device=device)
        for needs in NEEDS.values():
            evaluate(head, inputs, needs, torch.ones(n, device=device))
        evaluate(head, inputs)
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) > 1


def interpreter_row(kernel, tile, min_d=0, min_v=0, descriptors=True, dtype="float32"):
    return Row(0, dtype, kernel, Config(*tile, 4, 1, descriptors), "compiled", min_d, min_v)


@interpreted
def test_a_bounded_row_runs_from_its_bound_on_and_right(monkeypatch):
    asked = {}

    def spy(kernel, *args):
        asked[kernel, args[-2:]] = choose(kernel, *args)
        return asked[kernel, args[-2:]]

    monkeypatch.setattr(launch, "choose", spy)
    head = functools.partial(prefuse.linear_logprobs, impl="triton")
    rows = [interpreter_row(kernel, (32, 64, 32), 24, 60) for kernel in configs.KERNELS]
    with trial(*rows):
        for d, v in ((16, 70), (24, 41), (24, 60)):
            check_head(head, random_inputs(37, d, v, bias=True, ignored=0.2), softcap=3.0)
            check_head(head, random_inputs(37, d, v), NEEDS["frozen head"], entropy=False)
    tiles = {(kernel, size): c.block_v for (kernel, size), c in asked.items()}
    assert {size: tiles["fold", size] for size in ((16, 70), (24, 41), (24, 60))} == {
        (16, 70): 32, (24, 41): 32, (24, 60): 64,
    }  # fmt: skip
    assert tiles["dlogits", (24, 60)] == 64


@interpreted
def test_another_tile_of_the_fold_keeps_its_modes_alike_in_every_bit():
    """No gradient, lean and frozen: one row, one order of sums."""
    head = functools.partial(prefuse.linear_logprobs, impl="triton")
    inputs = random_inputs(37, 24, 131, ignored=0.1)
    grad = torch.ones(37)
    with trial(interpreter_row("fold", (32, 16, 16))):
        alone = evaluate(head, inputs).logps
        assert torch.equal(evaluate(head, inputs, NEEDS["trainable"], grad).logps, alone)
        assert torch.equal(evaluate(head, inputs, NEEDS["frozen head"], grad).logps, alone)
    assert not torch.equal(evaluate(head, inputs).logps, alone)  # the tile did change


# --------------------------------------------------------------------------------------------------- racing

A, B, C, D = (Config(16, 16 << i, 16, 4, 1, True) for i in range(4))


def entrants(*tiles):
    return [tune.Entrant(Row(90, "half", "fold", tile, "compiled"), []) for tile in tiles]


def fake_time(costs, log=None):
    """Milliseconds by tile: numbers, functions of the count of calls so far, or exceptions."""
    calls = []

    def time_one(row):
        calls.append(row.config)
        if log is not None:
            log.append(row.config)
        cost = costs[row.config]
        if isinstance(cost, Exception):
            raise cost
        return cost(len(calls)) if callable(cost) else cost

    return time_one


def always(share):
    return True


def winner_of(costs, time_left=always):
    racing = entrants(*costs)
    tune.race(racing, fake_time(costs), time_left)
    return racing, tune._winner(racing, torch.bfloat16, None)


def test_the_fastest_wins_and_the_far_slower_leave_early():
    racing, winner = winner_of({A: 10.0, B: 9.0, C: 8.0, D: 30.0})
    assert winner.row.config == C
    assert [len(x.ms) for x in racing] == [tune.ROUNDS] * 3 + [tune.SCREENING]
    assert racing[3].out == "slower"


def test_the_present_row_stays_unless_another_saves_one_percent():
    assert winner_of({A: 10.0, B: 9.95})[1].row.config == A
    assert winner_of({A: 10.0, B: 9.85})[1].row.config == B


def test_a_present_row_far_slower_than_the_rest_is_still_their_measure():
    racing, winner = winner_of({A: 50.0, B: 10.0, C: 11.0})
    assert len(racing[0].ms) == tune.ROUNDS
    assert winner.row.config == B


def test_a_clock_that_slows_down_does_not_choose(monkeypatch):
    """Every call takes longer than the one before: who runs later in a round would lose, if the order stayed."""
    drift = {tile: (lambda calls, cost=cost: cost * 1.02**calls) for tile, cost in ((A, 10.0), (B, 10.0), (C, 9.0))}
    assert winner_of(drift)[1].row.config == C
    monkeypatch.setattr(tune, "ROUNDS", 2)
    order = []
    tune.race(entrants(A, B, C), fake_time({A: 1.0, B: 1.0, C: 1.0}, order), always)
    assert order == [A, B, C, C, B, A]


def test_who_fails_is_out_with_its_reason():
    racing, winner = winner_of({A: 10.0, B: RuntimeError("out of resource: shared memory\nmore"), C: 9.0})
    assert racing[1].out == "RuntimeError: out of resource: shared memory"
    assert winner.row.config == C


def test_out_of_time_keeps_what_was_measured():
    budget = iter([True] * 9 + [False] * 100)
    racing, winner = winner_of({A: 10.0, B: 9.0, C: 8.0, D: 8.5}, lambda share: next(budget))
    assert [len(x.ms) for x in racing] == [3, 2, 2, 2]
    assert winner.row.config == C
    budget = iter([True, True, False, True, True] + [False] * 100)  # the third is not reached in the first round
    racing, winner = winner_of({A: 10.0, B: 9.0, C: 1.0}, lambda share: next(budget))
    assert racing[2].out == "not reached"
    assert winner.row.config == B


def test_one_round_is_too_little_to_choose_by():
    budget = iter([True] * 3 + [False] * 100)
    racing, winner = winner_of({A: 10.0, B: 9.0}, lambda share: next(budget))
    assert [len(x.ms) for x in racing] == [1, 2]
    assert winner is None


def test_the_first_round_may_take_half_of_the_time():
    asked = []
    winner_of({A: 10.0, B: 9.0}, lambda share: asked.append(share) or True)
    assert asked == [0.5] * 2 + [1.0] * 2 * (tune.ROUNDS - 1)


def test_without_a_time_of_the_present_row_nothing_wins():
    assert winner_of({A: 10.0, B: 9.0}, lambda share: False)[1] is None
    assert winner_of({A: RuntimeError("no"), B: 9.0})[1] is None


class FakePool(Executor):
    """Answers at once, from a dict of (tile, kernel) -> problems."""

    def __init__(self, found):
        self.found, self.asked = found, []

    def submit(self, function, row, dtype, name):
        assert function is tune.problems
        self.asked.append((row.config, name))
        future = Future()
        future.set_result(self.found.get((row.config, name), []))
        return future


def test_what_spills_never_runs_and_a_winner_is_clean_in_every_variant():
    racing = entrants(A, B, C, D)
    pool = FakePool({(B, "fold, plain"): ["spills 8 bytes"], (C, "fold, pull"): ["spills 4 bytes"]})
    tune._drop_unclean(racing[1:], torch.bfloat16, pool, always)
    assert [x.out for x in racing] == ["", "spills 8 bytes", "", ""]
    tune.race(racing, fake_time({A: 10.0, B: 1.0, C: 8.0, D: 9.0}), always)
    assert not racing[1].ms
    winner = tune._winner(racing, torch.bfloat16, pool)
    assert winner.row.config == D
    assert racing[2].out == "spills 4 bytes"
    assert {name for tile, name in pool.asked if tile == D} == {
        "fold, plain", "fold, softcap", "fold, bias", "fold, rescue", "fold, pull", "fold, pull, bias",
    }  # fmt: skip


def test_compiling_may_take_a_quarter_of_the_time():
    """What is compiled by then may race; what is not yet begun may not."""
    racing, pool = entrants(A, B, C), FakePool({})
    waiting, asked = Future(), []
    submit = pool.submit
    pool.submit = lambda function, row, *args: waiting if row.config == C else submit(function, row, *args)
    tune._drop_unclean(racing[1:], torch.bfloat16, pool, lambda share: bool(asked.append(share)))
    assert [x.out for x in racing] == ["", "", "not reached"]
    assert asked == [0.25, 0.25]


def test_a_kernel_without_a_row_of_its_own_is_not_tuned_by_itself():
    assert "pull softcap" in tune.own_kernels(90, torch.bfloat16, True, 4096, 128256)
    assert "pull softcap" not in tune.own_kernels(100, torch.bfloat16, True, 4096, 128256)


def test_every_kernel_of_the_table_has_something_to_be_timed_on():
    assert set(tune.WORKLOADS) == set(configs.KERNELS)


@pytest.mark.parametrize(
    ("chip", "dtype", "descriptors"),
    [
        (80, torch.bfloat16, False),
        (90, torch.bfloat16, True),
        (120, torch.float16, True),
        ("gfx942", torch.float32, False),
    ],
)
def test_candidates_are_rows_that_fit(chip, dtype, descriptors):
    present = Row(
        chip, configs.DTYPES[dtype], "fold", choose("fold", chip, dtype, descriptors, 4096, 128256), "compiled"
    )
    limit = tune._shared_limit(chip)
    made = tune.candidates(present, limit)
    assert 8 < len(set(made)) == len(made) < 110
    assert all(row.shared_bytes <= limit and row.config.descriptors == descriptors for row in made)
    assert read_back(made) == made
    assert present in made  # what is shipped was once a candidate
    assert tune.candidates(present, 1024) == []


def test_a_row_takes_shared_memory_as_the_matrix_unit_reads_it():
    """Bytes that the compiler reports of these (the slow tests compare every row)."""

    def shared(chip, dtype, tile, stages, descriptors):
        return Row(chip, dtype, "fold", Config(*tile, 8, stages, descriptors), "compiled").shared_bytes

    assert shared(90, "half", (128, 256, 64), 3, True) == 144 * 1024  # as it runs: a buffer for each stage
    assert shared(80, "half", (128, 128, 64), 3, False) == 64 * 1024  # from registers: one less
    assert shared(120, "half", (128, 128, 64), 3, True) == 64 * 1024
    assert shared("gfx942", "half", (256, 128, 64), 2, False) == 48 * 1024
    assert shared(80, "float32", (64, 64, 16), 1, False) == 8 * 1024


def test_a_chip_that_the_compiler_does_not_know_is_compiled_as_its_nearest():
    assert [tune.compiled_as(chip) for chip in (90, 87, 103, 121, "gfx942")] == [90, 86, 100, 120, "gfx942"]
    with pytest.raises(RuntimeError, match="cannot tune for gfx1100: its resources are not known"):
        tune.compiled_as("gfx1100")


@pytest.mark.slow
def test_the_compiler_finds_the_candidates_that_spill():
    """128 x 256 in four warps spills kilobytes on sm_90; in eight it is the shipped tile."""
    with compiling_processes(2) as pool:
        rows = [
            Row(90, "half", "fold", Config(128, 256, 64, warps, 3, True), "compiled", 4096, 128256) for warps in (4, 8)
        ]
        jobs = [pool.submit(tune.problems, row, torch.bfloat16, "fold, plain") for row in rows]
        spilled, clean = (job.result() for job in jobs)
    assert any("spills" in problem for problem in spilled)
    assert clean == []


def test_other_numbers_do_not_pass_for_the_same():
    logps, grad = torch.randn(50).sub(5), torch.randn(50, 64).bfloat16()
    assert tune.difference([logps, grad], [logps * (1 + 1e-7), grad], 64) == ""
    nan = logps.clone()
    nan[7] = float("nan")
    for wrong in (logps + 1e-3, nan, logps.where(torch.arange(50) != 49, 0.0)):
        assert tune.difference([wrong, grad], [logps, grad], 64).startswith("result 0 is off by ")
    zeroed = grad.clone()
    zeroed[-1] = 0
    assert tune.difference([logps, zeroed], [logps, grad], 64).startswith("result 1 is off by ")


# -------------------------------------------------------------------------------------------------- writing


def read_back(rows):
    """The rows, once through a line of text."""
    return [replace(configs.rows_of(f"rows = [\n{tune.line_of(row)}\n]", "line")[0], layer=row.layer) for row in rows]


def test_the_shipped_table_is_written_as_the_tuner_writes():
    lines = [line for line in configs.TABLE.read_text().splitlines() if line.strip().startswith("{")]
    assert lines == [tune.line_of(row) for row in SHIPPED]


def test_a_row_survives_its_line_whatever_its_source_says():
    source = 'measured on a "quoted" GPU \\ back, ü'
    row = Row("gfx942", "float32", "pull softcap", Config(256, 16, 1024, 16, 5, False), source, 896, 151936)
    assert read_back([row]) == [row]


def test_writing_replaces_its_own_row_and_nothing_else(tmp_path):
    path = tmp_path / "tiles.toml"
    path.write_text(configs.TABLE.read_text())
    before = path.read_text().splitlines()
    old = next(row for row in SHIPPED if (row.chip, row.kernel) == (100, "outputs"))
    new = replace(old, config=replace(old.config, stages=5), source="measured on it")
    bounded = replace(new, min_d=4096)
    tune.write(path, [new, bounded])
    after = path.read_text().splitlines()
    at = before.index(tune.line_of(old))
    assert after == [*before[:at], tune.line_of(new), tune.line_of(bounded), *before[at + 1 :]]
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.toml"]


def test_writing_makes_a_file_and_keeps_rows_of_a_kind_together(tmp_path):
    path = tmp_path / "own.toml"
    rows = {name: parse(change) for name, change in {
        "fold": {}, "dlogits": {"kernel": "dlogits"}, "other chip": {"chip": "sm_120"}, "bounded": {"min_d": 8},
        "outputs": {"kernel": "outputs"}, "pointers": {"operands": "pointers"},
    }.items()}  # fmt: skip
    for row in rows.values():
        tune.write(path, [row])
    order = ["fold", "bounded", "dlogits", "outputs", "pointers", "other chip"]
    assert list(read(path)) == [rows[name] for name in order]


def parse(change):
    return configs.parse(GOOD | change, configs.OWN)


def test_writing_refuses_a_file_whose_rows_do_not_stand_on_lines(tmp_path):
    path = tmp_path / "own.toml"
    text = "rows = [" + toml(GOOD).splitlines()[1] + "]\n"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}.*each one, and the last bracket, has a line of its own"):
        tune.write(path, [parse({"warps": 8})])
    assert path.read_text() == text


# --------------------------------------------------------------------------------------------- the whole way


def wall_timer(run):
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


SMALL_TILES = [Config(32, 32, 16, 4, 1, True), Config(16, 16, 32, 4, 1, True)]


@interpreted
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_every_workload_runs_with_every_candidate(kernel, monkeypatch):
    """The launching is real, on the interpreter: each candidate's tile is the one that is launched."""
    monkeypatch.setattr(tune, "ROUNDS", tune.SCREENING)
    head = tune.Head.random(9, 24, 41, torch.bfloat16, torch.device("cpu"))
    launched = []

    def spy(asked, *args):
        launched.append((asked, choose(asked, *args)))
        return launched[-1][1]

    def timer(run):
        launched.clear()
        run()
        mine = {tile for asked, tile in launched if asked == kernel}
        assert len(mine) == 1
        return {SMALL_TILES[0]: 1.1, SMALL_TILES[1]: 1.0}.get(mine.pop(), 1.2)

    monkeypatch.setattr(launch, "choose", spy)
    tuned = tune.tune_kernel(kernel, head, SMALL_TILES, timer=timer)
    assert [x.out for x in tuned.entrants] == ["", "", ""]
    assert [x.ms for x in tuned.entrants] == [[1.2] * 2, [1.1] * 2, [1.0] * 2]
    assert tuned.winner.row.config == SMALL_TILES[1]


@interpreted
def test_a_tile_that_makes_other_numbers_is_out(monkeypatch):
    """As a miscompiled one would: here the passes themselves go wrong under one tile."""
    head = tune.Head.random(9, 24, 41, torch.float32, torch.device("cpu"))
    honest = tune.WORKLOADS["outputs"]

    def wrong_under_one(head):
        made = honest(head)
        tile = choose("outputs", 0, torch.float32, True, *head.size)
        return [x + 0.01 for x in made] if tile == SMALL_TILES[1] else made

    monkeypatch.setitem(tune.WORKLOADS, "outputs", wrong_under_one)
    tuned = tune.tune_kernel("outputs", head, SMALL_TILES, timer=lambda run: 1.0)
    assert [bool(x.out) for x in tuned.entrants] == [False, False, True]
    assert tuned.entrants[2].out.startswith("ArithmeticError: result 0 is off by")


@interpreted
def test_what_the_command_writes_is_what_runs_next(tmp_path, monkeypatch, own_table, capsys):
    monkeypatch.setattr(tune, "candidates", lambda row, _: [replace(row, config=tile) for tile in SMALL_TILES])
    path = tmp_path / "made.toml"
    args = tune.arguments_of(["--head-dims", "24", "41", "--out", str(path), "--kernels", "outputs", "dlogits"])
    head = tune.Head.random(9, 24, 41, torch.float32, torch.device("cpu"))
    order = []

    def timer(run):
        order.append(wall_timer(run))
        return {0: 5.0, 1: 3.0, 2: 4.0}[[0, 1, 2, 2, 1, 0][(len(order) - 1) % 6]]

    assert tune.tune(head, args, "an interpreter, today", None, timer) == 0
    printed = capsys.readouterr().out
    assert f"PREFUSE_TILES={path}" in printed
    assert "outputs: 3 timed, 0 left out" in printed
    assert [row.kernel for row in read(path)] == ["outputs", "dlogits"]
    assert {row.source for row in read(path)} == {"measured on an interpreter, today: D 24, V 41, fastest of 3"}

    own_table()
    monkeypatch.setenv("PREFUSE_TILES", str(path))
    for kernel, tile in (("outputs", SMALL_TILES[0]), ("fold", Config(16, 32, 16, 4, 1, True))):
        assert choose(kernel, 0, torch.float32, True, 24, 41) == tile
    assert choose("outputs", 0, torch.float32, True, 23, 41) != SMALL_TILES[0]  # measured at 24: not below


@interpreted
def test_rows_for_every_size_are_written_when_asked_for():
    head = tune.Head.random(4, 24, 41, torch.float32, torch.device("cpu"))
    tuned = tune.tune_kernel("outputs", head, SMALL_TILES, timer=lambda run: 1.0)
    bounded, anywhere = (tune.measured(tuned, any_size, "x") for any_size in (False, True))
    assert (bounded.min_d, bounded.min_v) == (24, 41)
    assert (anywhere.min_d, anywhere.min_v) == (0, 0)
    assert "D 24, V 41" in anywhere.source


@interpreted
def test_no_time_for_a_kernel_is_said_and_is_a_failure(tmp_path, capsys):
    args = tune.arguments_of(["--head-dims", "24", "41", "--out", str(tmp_path / "made.toml"), "--minutes", "1e-9"])
    head = tune.Head.random(4, 24, 41, torch.float32, torch.device("cpu"))
    assert tune.tune(head, args, "x", None, wall_timer) == 1
    assert f"no time for {', '.join(configs.KERNELS)}: give more --minutes" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_the_race(tmp_path, capsys):
    for path, why in ((tmp_path / "no" / "made.toml", "No such file"), (tmp_path / "bad.toml", "is not TOML")):
        (tmp_path / "bad.toml").write_text("rows = [")
        args = tune.arguments_of(["--head-dims", "24", "41", "--out", str(path)])
        assert tune.tune(tune.Head.random(4, 24, 41, torch.float32, torch.device("cpu")), args, "x", None, None) == 2
        error = capsys.readouterr().err
        assert f"cannot write {path}" in error
        assert why in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    command = [sys.executable, "-m", "prefuse.kernels.tiles.tune", "--head-dims", "64", "1000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 2
    assert "tuning needs a GPU, and torch.cuda.is_available() is False" in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--head-dims", "0", "9"],
        ["--head-dims", "8", "9", "--minutes", "0"],
        ["--head-dims", "8", "9", "--tokens", "0"],
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        tune.arguments_of(flags)
    assert "--head-dims" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_tuner_times_real_kernels(device, tmp_path):
    head = tune.Head.random(512, 256, 4096, torch.bfloat16, device)
    present = choose("outputs", configs.capability(device), torch.bfloat16, True, 256, 4096)
    other = replace(present, block_d=32)
    with tune.compilers(2) as pool:
        tuned = tune.tune_kernel("outputs", head, [other], pool=pool)
    assert [len(x.ms) for x in tuned.entrants if not x.out]
    assert tuned.winner is not None
