"""The tuner: candidates, the race, what it writes, and its command."""

import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace

import pytest
import torch

from aot_worker import compiling_processes
from prefuse.kernels.tiles import table as configs
from prefuse.kernels.tiles import tune
from prefuse.kernels.tiles.table import Tile, TileRow, choose, read
from prefuse.kernels.tiles.write import line_of
from tile_cases import GOOD, SHIPPED, interpreted, toml

pytest.importorskip("triton")

from prefuse.kernels import launch


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Puts rows into a file, and the file into PREFUSE_TILES."""

    def forget():
        configs.tile_rows.cache_clear()
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


# --------------------------------------------------------------------------------------------------- racing

A, B, C, D = (Tile(16, 16 << i, 16, 4, 1, True) for i in range(4))


def entrants(*tiles):
    return [tune.Entrant(TileRow(90, "half", "fold", tile, "compiled"), []) for tile in tiles]


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
    present = TileRow(
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
        return TileRow(chip, dtype, "fold", Tile(*tile, 8, stages, descriptors), "compiled").shared_bytes

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
            TileRow(90, "half", "fold", Tile(128, 256, 64, warps, 3, True), "compiled", 4096, 128256)
            for warps in (4, 8)
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
    return [replace(configs.parse_rows(f"rows = [\n{line_of(row)}\n]", "line")[0], layer=row.layer) for row in rows]


def test_the_shipped_table_is_written_as_the_tuner_writes():
    lines = [line for line in configs.TABLE.read_text().splitlines() if line.strip().startswith("{")]
    assert lines == [line_of(row) for row in SHIPPED]


def test_a_row_survives_its_line_whatever_its_source_says():
    source = 'measured on a "quoted" GPU \\ back, ü'
    row = TileRow("gfx942", "float32", "pull softcap", Tile(256, 16, 1024, 16, 5, False), source, 896, 151936)
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
    at = before.index(line_of(old))
    assert after == [*before[:at], line_of(new), line_of(bounded), *before[at + 1 :]]
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
    return configs.parse_row(GOOD | change, configs.OWN)


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


SMALL_TILES = [Tile(32, 32, 16, 4, 1, True), Tile(16, 16, 32, 4, 1, True)]


@pytest.mark.quick_cases(every=4)
@interpreted
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_every_workload_runs_with_every_candidate(kernel, monkeypatch):
    """The launching is real, on the interpreter: each candidate's tile is the one that is launched."""
    monkeypatch.setattr(tune, "ROUNDS", tune.SCREENING)
    head = tune.RaceInputs.random(9, 24, 41, torch.bfloat16, torch.device("cpu"))
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
    head = tune.RaceInputs.random(9, 24, 41, torch.float32, torch.device("cpu"))
    honest = tune.WORKLOADS["outputs"]

    def wrong_under_one(head):
        made = honest(head)
        tile = choose("outputs", 0, torch.float32, True, *head.size)
        return [x + 0.01 for x in made] if tile == SMALL_TILES[1] else made

    monkeypatch.setitem(tune.WORKLOADS, "outputs", wrong_under_one)
    tuned = tune.tune_kernel("outputs", head, SMALL_TILES, timer=lambda run: 1.0)
    assert [bool(x.out) for x in tuned.entrants] == [False, False, True]
    assert tuned.entrants[2].out.startswith("ArithmeticError: result 0 is off by")


@pytest.mark.slow
@interpreted
def test_what_the_command_writes_is_what_runs_next(tmp_path, monkeypatch, own_table, capsys):
    monkeypatch.setattr(tune, "candidates", lambda row, _: [replace(row, config=tile) for tile in SMALL_TILES])
    path = tmp_path / "made.toml"
    args = tune.arguments_of(["--head-dims", "24", "41", "--out", str(path), "--kernels", "outputs", "dlogits"])
    head = tune.RaceInputs.random(9, 24, 41, torch.float32, torch.device("cpu"))
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
    for kernel, tile in (("outputs", SMALL_TILES[0]), ("fold", Tile(16, 32, 16, 4, 1, True))):
        assert choose(kernel, 0, torch.float32, True, 24, 41) == tile
    assert choose("outputs", 0, torch.float32, True, 23, 41) != SMALL_TILES[0]  # measured at 24: not below


@interpreted
def test_rows_for_every_size_are_written_when_asked_for():
    head = tune.RaceInputs.random(4, 24, 41, torch.float32, torch.device("cpu"))
    tuned = tune.tune_kernel("outputs", head, SMALL_TILES, timer=lambda run: 1.0)
    bounded, anywhere = (tune.measured(tuned, any_size, "x") for any_size in (False, True))
    assert (bounded.min_d, bounded.min_v) == (24, 41)
    assert (anywhere.min_d, anywhere.min_v) == (0, 0)
    assert "D 24, V 41" in anywhere.source


@interpreted
def test_no_time_for_a_kernel_is_said_and_is_a_failure(tmp_path, capsys):
    args = tune.arguments_of(["--head-dims", "24", "41", "--out", str(tmp_path / "made.toml"), "--minutes", "1e-9"])
    head = tune.RaceInputs.random(4, 24, 41, torch.float32, torch.device("cpu"))
    assert tune.tune(head, args, "x", None, wall_timer) == 1
    assert f"no time for {', '.join(configs.KERNELS)}: give more --minutes" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_the_race(tmp_path, capsys):
    for path, why in ((tmp_path / "no" / "made.toml", "No such file"), (tmp_path / "bad.toml", "is not TOML")):
        (tmp_path / "bad.toml").write_text("rows = [")
        args = tune.arguments_of(["--head-dims", "24", "41", "--out", str(path)])
        assert (
            tune.tune(tune.RaceInputs.random(4, 24, 41, torch.float32, torch.device("cpu")), args, "x", None, None) == 2
        )
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
    head = tune.RaceInputs.random(512, 256, 4096, torch.bfloat16, device)
    present = choose("outputs", configs.capability(device), torch.bfloat16, True, 256, 4096)
    other = replace(present, block_d=32)
    with tune.compilers(2) as pool:
        tuned = tune.tune_kernel("outputs", head, [other], pool=pool)
    assert [len(x.ms) for x in tuned.entrants if not x.out]
    assert tuned.winner is not None
