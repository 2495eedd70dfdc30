"""The table of tiles: how it is read, which row holds where, and how the tuner races candidates and writes rows.

No GPU: the tuner's timer is a fake, or wraps the interpreter.
"""

import contextlib
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch

import prefuse
from prefuse.bench.truth.head_cases import NEEDS, check_head, evaluate, random_inputs
from prefuse.kernels.tiles import table as configs
from prefuse.kernels.tiles.table import Tile, TileRow, choose, read, trial
from tile_cases import GOOD, SHIPPED, interpreted, interpreter_row, toml

pytest.importorskip("triton")

from prefuse.kernels import launch
from prefuse.kernels.tiles.aot import CHIPS
from prefuse.kernels.tiles.shipped import users


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


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("row", SHIPPED, ids=str)
def test_a_shipped_row_fits_its_chip_and_serves_a_kernel(row):
    assert 0 < row.shared_bytes <= CHIPS[row.chip].shared_limit
    # A row that no kernel runs with would be a mistake in its columns, and the compiler would never see it.
    assert users(row)


def test_a_good_row_is_read_as_it_stands(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(toml(GOOD | {"tile": [128, 64, 32], "min_d": 2048, "source": "measured on a chip"}))
    expected = TileRow(90, "half", "fold", Tile(128, 64, 32, 4, 2, True), "measured on a chip", 2048, 0, configs.OWN)
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
    assert tile_of("pull softcap", chip=89) == tile_of("fold", chip=89) == Tile(64, 64, 64, 4, 2, False)
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
    assert configs.fold_row_name(outputs, pull, softcap) == kernel


def test_a_trial_goes_before_everything_and_ends(own_table):
    own_table(GOOD | {"min_d": 4096, "min_v": 128256})
    before = tile_of()
    tried = TileRow(90, "half", "fold", Tile(16, 16, 16, 1, 1, True), "compiled")
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
