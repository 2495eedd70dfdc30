"""Mutated settings, rows, models, adapters, run folders and checkpoints: one line with exit code 2, or a right result.

Never a traceback, and never a model of numbers that are none. More than 500 mutations, the same in every run of the
tests; all in this process, on a model of one layer.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefuse.engine import cli
from prefuse.engine import train as train_module
from prefuse.engine.run.checkpoint import latest_checkpoint
from prefuse.engine.run.files import sha256_of
from prefuse.engine.run.folder import read_mark
from prefuse.engine.run.proof import checkpoints, fault_of_files
from tiny_run import PAIRS, save_model, weights, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1}
ROWS = PAIRS[:3]


def fuzz(examples: int):
    """The same examples in every run: derandomized, without a database and without deadlines."""
    options = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=examples, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, rows, adapters, and a run that was stopped before its model was written, with how it ends.

    Paths are relative: files that hold one are then the same in every run, and so are their mutations.
    """
    with pytest.MonkeyPatch.context() as place:
        place.chdir(tmp_path_factory.mktemp("files"))
        yield from made_files(Path())


def made_files(folder):
    made = {"model": save_model(folder / "model", **SMALL), "pairs": write_rows(folder / "pairs.jsonl", ROWS)}
    made["folder"] = folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "plot_curves", lambda *paths: None)
        assert cli.main(words(made, folder / "run")) == 0
        assert cli.main(words(made, folder / "lora", use_peft="true", lora_r=2, save_steps=0)) == 0
        made["wanted"] = weights(folder / "run")
        (folder / "run/model.safetensors").unlink()
        yield made


def words(files, out, **changes):
    flags = {"model_name_or_path": files["model"], "dataset_name": files["pairs"], "output_dir": out, "device": "cpu"}
    flags |= {"impl": "torch", "max_steps": 2, "save_steps": 1, "max_length": 64, "eval_fraction": 0} | changes
    return ["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def outcome(argv, capsys) -> int:
    """The exit code, with what must hold for every input."""
    try:
        code = cli.main(argv)
    except SystemExit as end:  # of the parser of flags
        code = end.code
    error = capsys.readouterr().err
    assert code in (0, 2), error
    assert "Traceback" not in error
    if code == 2:
        assert sum(line.startswith("prefuse: ") for line in error.splitlines()) == 1, error
    return code


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True).map(repr),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["0", "-0", "1e400", "-1e400", "nan", "inf", "-inf", "1e-400", "0x10", "1_0", "", " ", "null", "٣"]
    ),
)
NUMBERED = (
    "learning_rate", "beta", "max_steps", "num_train_epochs", "seed", "max_length", "per_device_train_batch_size",
    "gradient_accumulation_steps", "warmup_steps", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "save_steps", "save_total_limit", "logging_steps", "eval_steps", "label_smoothing",
    "eval_fraction", "max_tokens_per_batch", "max_skipped_steps", "max_loss_ratio", "max_kl", "lora_r", "lora_alpha",
    "lora_dropout", "nproc", "max_restarts", "ddp_timeout", "per_device_eval_batch_size",
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["(", "[", "*", "..", "/", "/dev/null", "\x00", "\x1b[2J", "~", "-1", "true", "cuda:99", "a" * 5000]
    ),
)
TEXTED = (
    "dtype", "device", "loss_type", "optim", "impl", "lora_target_modules", "dataset_name", "model_name_or_path",
    "ref_model_name_or_path", "eval_dataset", "lr_scheduler_type", "parallel", "config",
)  # fmt: skip


@fuzz(110)
@given(name=st.sampled_from(NUMBERED), value=NUMBERS)
def test_numbers(name, value, files, capsys):
    run_settings(files, capsys, name, value)


@fuzz(70)
@given(name=st.sampled_from(TEXTED), value=TEXTS)
def test_texts(name, value, files, capsys):
    if "\x00" not in value:  # which no process can be given
        run_settings(files, capsys, name, value)


def run_settings(files, capsys, name, value):
    out = files["folder"] / "fuzz"
    shutil.rmtree(out, ignore_errors=True)
    argv = words(files, out, max_steps=1, save_steps=0)
    lora = ["--use_peft", "true"] if name.startswith("lora") else []
    if name in ("nproc", "max_restarts") and value.strip().isdigit() and int(value) > 0:
        return  # it would start processes
    if name in ("max_steps", "num_train_epochs") and is_long(value):
        return  # a run that long is what was asked for
    if name == "num_train_epochs":
        argv[argv.index("--max_steps") + 1] = "-1"
    outcome([*argv, *lora, f"--{name}", value], capsys)


def is_long(value):
    try:
        return 10 < float(value) < float("inf")
    except (ValueError, OverflowError):
        return False


# ---------------------------------------------------------------------------------------------------------
# Files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def mutate_bytes(draw, data: bytes) -> bytes:
    kind = draw(st.sampled_from(["cut", "flip", "insert", "empty", "repeat"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if kind == "cut":
        return data[:at]
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
    return b"" if kind == "empty" else data + data[at:]


def mutate_json(draw, value):
    """One value somewhere inside becomes another, or goes."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        name = draw(st.sampled_from(sorted(value)))
        if draw(st.booleans()):
            return {k: v for k, v in value.items() if k != name} if draw(st.booleans()) else value | {name: draw(JSON)}
        return value | {name: mutate_json(draw, value[name])}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], mutate_json(draw, value[index]), *value[index + 1 :]]
    return draw(JSON)


def mutate(draw, root: Path) -> Path:
    """One file below `root` is damaged: which one."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".png")
    path = draw(st.sampled_from(paths))
    if path.suffix == ".json" and draw(st.integers(0, 2)):
        path.write_text(json.dumps(mutate_json(draw, json.loads(path.read_text()))))
    else:
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))
    return path


def fresh(files, name: str) -> Path:
    """A copy of the folder of that name, to be damaged; what the last example left is gone."""
    for old in ("fuzz", "out"):
        shutil.rmtree(files["folder"] / old, ignore_errors=True)
    return Path(shutil.copytree(files["folder"] / name, files["folder"] / "fuzz"))


@fuzz(45)
@given(data=st.data())
def test_a_run_folder(data, files, capsys):
    """Whatever is damaged, signed or not: refused in one line, or the weights of the run that was never damaged."""
    out = fresh(files, "run")
    path = mutate(data.draw, out)
    if path.parent != out and path.name != "manifest.json" and data.draw(st.booleans()):
        sign(path.parent)
    decides = path.name in ("model.safetensors", "trainer_state.json") or path.name.startswith("optimizer")
    if outcome([*words(files, out), "--resume", "true"], capsys) == 0 and not decides:
        ended = weights(out)
        assert all(torch.equal(value, ended[name]) for name, value in files["wanted"].items())
    elif (out / "model.safetensors").exists():
        assert all(value.isfinite().all() for value in weights(out).values())


@fuzz(200)
@given(data=st.data())
def test_what_proves_a_checkpoint_never_fails_itself(data, files):
    """Whole, or a fault in words: of the mark, the manifest and the state, unsigned and signed."""
    out = fresh(files, "run")
    path = mutate(data.draw, out)
    if path.parent != out and path.name != "manifest.json" and data.draw(st.booleans()):
        sign(path.parent)
    assert isinstance(read_mark(out), dict)
    for _, checkpoint in checkpoints(out):
        fault = fault_of_files(checkpoint)
        assert fault is None or fault.strip()
    newest = latest_checkpoint(out)
    assert newest is None or fault_of_files(newest) is None


def sign(checkpoint: Path) -> None:
    """As if the damage had been there when the checkpoint was written."""
    found = [path for path in sorted(checkpoint.iterdir()) if path.name not in ("manifest.json", "trainer_state.json")]
    hashes = {path.name: sha256_of(path) for path in found}
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"files": hashes}))
    except (ValueError, TypeError):
        pass
    hashes["trainer_state.json"] = sha256_of(checkpoint / "trainer_state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(hashes))


@fuzz(70)
@given(data=st.data())
def test_a_model_folder_that_trains(data, files, capsys):
    model = fresh(files, "model")
    mutate(data.draw, model)
    out = files["folder"] / "out"
    if outcome(words(files | {"model": str(model)}, out, max_steps=1, save_steps=0), capsys) == 0:
        assert all(value.isfinite().all() for value in weights(out).values())
    else:
        assert not out.exists() or not (out / "model.safetensors").exists()


@fuzz(70)
@given(data=st.data())
def test_a_model_folder_that_generates(data, files, capsys):
    model = fresh(files, "model")
    mutate(data.draw, model)
    flags = {"--model_name_or_path": model, "--dataset_name": files["pairs"], "--device": "cpu", "--max_new_tokens": 3}
    outcome(["generate", *(str(word) for flag in flags.items() for word in flag)], capsys)


@fuzz(70)
@given(data=st.data())
def test_adapters(data, files, capsys):
    adapters, out = fresh(files, "lora"), files["folder"] / "out"
    mutate(data.draw, adapters)
    flags = {"--model_name_or_path": adapters, "--output_dir": out}
    if outcome(["merge", *(str(word) for flag in flags.items() for word in flag)], capsys) == 0:
        assert all(value.isfinite().all() for value in weights(out).values())


@fuzz(50)
@given(data=st.data())
def test_rows(data, files, capsys):
    draw = data.draw
    path = files["folder"] / f"rows{draw(st.sampled_from(['.jsonl', '.json']))}"
    rows = [mutate_json(draw, row) if draw(st.integers(0, 3)) == 0 else row for row in ROWS]
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    content = text.encode()
    path.write_bytes(mutate_bytes(draw, content) if draw(st.booleans()) else content)
    out = files["folder"] / "fuzz"
    shutil.rmtree(out, ignore_errors=True)
    outcome(words(files | {"pairs": str(path)}, out, max_steps=1, save_steps=0), capsys)
