"""The command line: what works end to end, and one line for everything a user can get wrong."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefuse.engine import cli, generate
from prefuse.engine.config.help import topic_name
from prefuse.engine.config.settings import FIELDS, commands_of, settings_of
from prefuse.engine.config.values import literals, options_of
from prefuse.engine.errors import UserError
from tiny_run import PAIRS, save_model, weights, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "model": save_model(folder / "model"),
        "other": save_model(folder / "other", seed=1),
        "pairs": write_rows(folder / "pairs.jsonl", PAIRS),
    }


def prefuse(*words):
    return cli.main([str(word) for word in words])


def test_help_in_a_fresh_process_is_quick_to_import_and_exits_0():
    code = (
        "import sys; from prefuse.engine.cli import main\n"
        "assert main(['--help']) == 0\n"
        "assert not {'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("sft", "train", "eval", "generate"))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_lists_what_has_a_meaning_for_it_by_topic(command, capsys):
    assert prefuse(command, "--help", "all") == 0
    shown = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert flags == ["config", *(name for fields in settings_of(command).values() for name in fields)]
    assert set(flags) == {"config", *(name for name in FIELDS if command in commands_of(name))}
    titles = re.findall(r"\n\n(\w[^\n]*)\n  --", shown)
    assert titles == list(settings_of(command))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_is_one_screen_of_names_and_each_topic_says_the_rest(command, capsys):
    assert prefuse(command, "--help") == 0
    shown = capsys.readouterr().out
    own = [name for name in FIELDS if command in commands_of(name)]
    assert set(re.findall(r"--(\w+)", shown)) >= {"config", *own}
    assert shown.count("\n") < 75
    explained = []
    for title in settings_of(command):
        assert prefuse("help", command, topic_name(title)) == 0
        shown = capsys.readouterr().out
        assert shown.count("\n") <= 56
        explained += re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert sorted(explained) == sorted(own)


@pytest.mark.parametrize("asked", [["--help", "beta"], ["--help", "--beta"], ["--beta", "--help", "beta"]])
def test_help_of_one_setting(asked, capsys):
    assert prefuse("train", *asked) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^  --(\w+)", shown, re.MULTILINE) == ["beta"]


def test_help_by_another_name_and_help_of_what_is_not_there(capsys):
    assert prefuse("train", "--help", "lr") == 0
    assert "--learning_rate" in capsys.readouterr().out
    assert prefuse("train", "--help", "optimisation") == 2
    assert "did you mean optimization" in capsys.readouterr().err
    assert prefuse("sft", "--help", "beta") == 2  # sft has none


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(words, capsys):
    assert prefuse(*words) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in (*cli.COMMANDS, *cli.TOOLS))
    assert max(map(len, shown.splitlines())) <= 120
    assert shown.count("\n") <= 26
    assert sorted(name for group in cli.GROUPS.values() for name in group) == sorted([*cli.COMMANDS, *cli.TOOLS])


@pytest.mark.parametrize("words", [["--help"], ["train", "--help", "loss"]])
def test_help_whose_reader_has_left_ends_quietly(words, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as left:
        monkeypatch.setattr("sys.stdout", left)
        assert cli.main(words) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("tool", cli.TOOLS)
def test_every_tool_has_a_help_of_one_screen(tool, capsys):
    assert prefuse(tool, "--help") == 0
    shown = capsys.readouterr().out
    assert f"prefuse {tool}" in shown
    assert shown.count("\n") <= 50


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_the_version_is_the_packages(word, capsys):
    assert prefuse(word) == 0
    assert capsys.readouterr().out == f"prefuse {importlib.metadata.version('prefuse')}\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian"], "train"),
        (["repot"], "report"),
        (["docter"], "doctor"),
        (["show_tokens"], "show-tokens"),
        (["finetune"], "sft"),
        (["inspect", "rows.jsonl"], "data inspect"),
        (["dpo"], "prefuse train --loss_type dpo"),
        (["train", "--learning_rat", "1"], "learning_rate"),
        (["train", "--lr", "1"], "learning_rate"),
        (["train", "--loss_type", "dop"], "dpo"),
        (["data", "inspec"], "inspect"),
        (["data", "inspect", "rows.jsonl", "--pictre", "a.png"], "--picture"),
        (["report", "runs/dpo", "--output", "a.html"], "--output_file"),
        (["doctor", "--confg", "a"], "--config"),
        (["bench", "hed"], "head"),
        (["train", "beta", "0.1"], "--beta"),
        (["train", "--beta"], "prefuse train --help beta"),
        (["train", "--config"], "prefuse train --help config"),
        (["train"], "--model_name_or_path MODEL --dataset_name ROWS --output_dir NEW"),
        (["eval"], "prefuse eval --help"),
        (["report"], "prefuse report --help"),
    ],
)
def test_a_word_that_is_nearly_right_is_one_line_with_what_was_meant(words, meant, capsys):
    assert prefuse(*words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert meant in said[said.index("error") :].replace(f"'{words[-1]}'", "")


def test_a_path_in_the_place_of_a_command_says_which_command_takes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("run/metrics.jsonl", "run.yaml", "rows.jsonl"):
        (tmp_path / name).touch()
    for path, command in (
        ("run", "prefuse report run"),
        ("run.yaml", "prefuse train --config run.yaml"),
        ("rows.jsonl", "prefuse data inspect rows.jsonl"),
    ):
        assert prefuse(path) == 2
        assert command in capsys.readouterr().err


def test_train_eval_and_generate_work_together(files, tmp_path, capsys):
    run, report, answers = tmp_path / "run", tmp_path / "eval.json", tmp_path / "answers.jsonl"
    yaml = tmp_path / "train.yaml"
    yaml.write_text(
        f"model_name_or_path: {files['model']}\ndataset_name: {files['pairs']}\nmax_length: 64\n"
        "per_device_train_batch_size: 4\nlearning_rate: 1e-2\nnum_train_epochs: 3\neval_fraction: 0.2\n"
    )
    assert prefuse("train", "--config", yaml, "--output_dir", run, "--loss_type", "ipo") == 0
    assert "0 skipped" in capsys.readouterr().out

    # The run's own settings: evaluation then takes the rows that the run held out.
    models = ["--model_name_or_path", run, "--ref_model_name_or_path", files["model"]]
    assert prefuse("eval", "--config", run / "config.yaml", *models, "--output_file", report) == 0
    assert "evaluating 2 of 12" in capsys.readouterr().out
    metrics = json.loads(report.read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in "loss", "rewards/accuracies", "rewards/margins":
        assert metrics[name] == pytest.approx(last[f"eval_{name}"], rel=1e-5)
    assert metrics["kl_to_ref"] == pytest.approx(last["eval_kl_to_ref"], rel=1e-3)  # so few rows are sampled whole

    generate = [
        "generate",
        *models,
        "--dataset_name",
        files["pairs"],
        "--max_new_tokens",
        "4",
        "--output_file",
        answers,
    ]
    assert prefuse(*generate, "--num_prompts", "3") == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [pair["prompt"] for pair in PAIRS[:3]]
    assert [row["row"] for row in rows] == ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:3"]
    assert all(set(row) == {"row", "prompt", "reference", "model"} for row in rows)
    assert PAIRS[0]["prompt"] in capsys.readouterr().out


def test_generation_does_not_depend_on_what_shares_a_batch_and_sampling_on_the_seed_alone(files, tmp_path):
    def answers(*options):
        out = tmp_path / "answers.jsonl"
        out.unlink(missing_ok=True)
        command = ["generate", "--model_name_or_path", files["model"], "--dataset_name", files["pairs"]]
        assert prefuse(*command, "--max_new_tokens", "6", "--num_prompts", "0", "--output_file", out, *options) == 0
        return out.read_text()

    greedy = answers("--per_device_eval_batch_size", "1")
    assert len(greedy.splitlines()) == len({pair["prompt"] for pair in PAIRS})
    assert answers("--per_device_eval_batch_size", "5") == greedy
    sampled = answers("--temperature", "1.0")
    assert sampled == answers("--temperature", "1.0")
    assert greedy != sampled != answers("--temperature", "1.0", "--seed", "1")


def test_the_screen_shows_some_answers_and_the_file_has_all(files, tmp_path, monkeypatch):
    tables = []
    monkeypatch.setattr(generate, "print_table", lambda title, header, rows: tables.append(rows))
    monkeypatch.setattr(generate, "SHOWN_ANSWERS", 2)
    command = ["generate", "--model_name_or_path", files["model"], "--dataset_name", files["pairs"]]
    command += ["--max_new_tokens", "2", "--num_prompts", "0"]
    assert prefuse(*command) == 0
    assert prefuse(*command, "--output_file", tmp_path / "answers.jsonl") == 0
    prompts = len({pair["prompt"] for pair in PAIRS})
    assert [len(rows) for rows in tables] == [prompts, 2]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == prompts


def test_sft_then_resume_of_a_finished_run_changes_nothing(files, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["sft", "--model_name_or_path", files["model"], "--dataset_name", files["pairs"], "--output_dir", run]
    command += ["--max_steps", "2", "--save_steps", "2", "--learning_rate", "1e-2"]
    assert prefuse(*command) == 0
    before = {name: value.clone() for name, value in weights(run).items()}
    files_before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    assert prefuse(*command, "--resume") == 0
    assert "is finished (2 steps): there is nothing to resume" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == files_before
    assert all(bool((before[name] == value).all()) for name, value in weights(run).items())


# ---------------------------------------------------------------------------------------------------------
# What a user can get wrong


@pytest.fixture
def wrong(files, tmp_path):
    """Folders and files with one fault each."""
    paths = {name: tmp_path / name for name in ("bare", "weightless", "lacking", "used", "file", "empty.jsonl")}
    paths |= {
        name: tmp_path / name for name in ("columns.jsonl", "bytes.jsonl", "useless.jsonl", "same.jsonl", "foreign")
    }
    paths["bare"].mkdir()
    save_model(paths["weightless"])
    (paths["weightless"] / "model.safetensors").unlink()
    paths["used"].mkdir()
    (paths["used"] / "notes.txt").write_text("mine")
    paths["file"].write_text("mine")
    paths["empty.jsonl"].write_text("")
    write_rows(paths["columns.jsonl"], [{"question": "a", "chosen": "b"}])
    paths["bytes.jsonl"].write_bytes(b'{"prompt": "\xff"}')
    write_rows(paths["useless.jsonl"], [{"prompt": "a", "chosen": "", "rejected": "b"}] * 3)
    write_rows(paths["same.jsonl"], [{"prompt": "a", "completion": c, "label": c == "b"} for c in "bcdef"])
    save_model(paths["foreign"], vocab_size=50)
    return paths


def flags(files, tmp_path, **changes):
    settings = {
        "model_name_or_path": files["model"], "dataset_name": files["pairs"], "output_dir": tmp_path / "out",
    }  # fmt: skip
    return [word for name, value in (settings | changes).items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": "/none/here"}, "model folder /none/here does not exist"),
        ({"model_name_or_path": "bare"}, "is no model folder: expected config.json in it"),
        ({"model_name_or_path": "weightless"}, "weightless has no weights: expected model.safetensors"),
        ({"model_name_or_path": "foreign"}, "is outside the model's vocabulary of 50: expected the tokenizer that"),
        ({"output_dir": "used"}, "used exists and is not empty: give another folder, or --resume"),
        ({"output_dir": "file"}, "file is a file, expected a folder that is new or empty"),
        ({"dataset_name": "none.jsonl"}, "none.jsonl: no such file or folder"),
        ({"dataset_name": "empty.jsonl"}, "empty.jsonl is empty"),
        ({"dataset_name": "columns.jsonl"}, "question"),
        ({"dataset_name": "bytes.jsonl"}, "UTF-8"),
        ({"dataset_name": "useless.jsonl"}, "no usable row"),
        ({"dataset_name": "same.jsonl", "loss_type": "kto", "eval_fraction": 0}, "all rows have the same prompt"),
        ({"eval_fraction": 0.99}, "leaves nothing to train on: set eval_fraction to 0, or give an eval_dataset"),
        ({"device": "cuda:7"}, "device cuda:7 cannot be used"),
        ({"device": "abacus"}, "device abacus cannot be used"),
        ({"beta": 0}, "beta must be > 0, got 0.0"),
        ({"model_name_or_path": ""}, "model_name_or_path is required"),
        ({"config": "none.yaml"}, "cannot read the config file none.yaml"),
    ],
)
def test_one_line_says_what_is_wrong(changes, message, files, wrong, tmp_path, capsys):
    changes = {name: wrong.get(value, value) for name, value in changes.items()}
    assert prefuse("train", *flags(files, tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("prefuse: error: "))
    assert message in error[error.index(line) :]
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_refused_model_is_named(files, tmp_path, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = real(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert prefuse("train", *flags(files, tmp_path)) == 2
    assert "LlamaForCausalLM: log-probabilities from its logits and from its hidden states" in capsys.readouterr().err


def test_weights_that_lack_a_tensor_are_refused(files, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "lacking"
    save_model(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert prefuse("train", *flags(files, tmp_path, model_name_or_path=folder)) == 2
    assert "lack or misshape 1 tensors of LlamaForCausalLM (lm_head.weight)" in capsys.readouterr().err


def test_a_mistake_of_ours_shows_its_traceback(files, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefuse("train", *flags(files, tmp_path))


def test_an_interrupt_is_no_traceback_either(files, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert prefuse("train", *flags(files, tmp_path)) == 130
    assert "interrupted; if output_dir holds a checkpoint, --resume goes on from it" in capsys.readouterr().err
    command = ["--model_name_or_path", files["model"], "--dataset_name", files["pairs"]]
    assert prefuse("generate", *command) == 130
    assert capsys.readouterr().err == "prefuse: interrupted\n"


@pytest.mark.parametrize("words", [[], ["trian"], ["train", "--bata", "1"], ["train", "--beta", "x"]])
def test_a_command_line_that_does_not_parse_exits_2(words, capsys):
    assert prefuse(*words) == 2
    assert capsys.readouterr().err.count("\n") == 1


COMMAND = re.compile(rf"(?<![\w.])prefuse ((?:{'|'.join(cli.COMMANDS)})\b[^`\"'#|\n]*)")


def test_every_command_in_the_docs_and_in_our_messages_parses():
    root = Path(__file__).parents[2]
    texts = [root / "README.md", *root.glob("docs/*.md"), *root.glob("engine/**/*.py"), *root.glob("examples/**/*")]
    found = []
    for path in texts:
        if path.suffix in (".py", ".md", ".sh", ".sbatch", ".yaml"):
            text = re.sub(r"\\+\n", " ", path.read_text())  # two within a docstring
            found += [(path.name, match.group(1)) for match in COMMAND.finditer(text)]
    assert len({command for _, command in found}) >= 15
    for name, command in found:
        words = [word for word in command.split() if word not in ("...", "--help")]
        if any(word.startswith("--") for word in words):  # else it is named in a sentence
            try:
                cli.parse(_complete(words))
            except UserError as error:
                pytest.fail(f"{name}: prefuse {command}: {error}")


def _complete(words):
    """The command without its --config file, which is not there, and with values for those that are left open."""
    if "--config" in words:
        del words[words.index("--config") : words.index("--config") + 2]
    if words[-1].startswith("--") and bool not in options_of(words[-1][2:]):
        words.append("{}")
    return [(literals(words[i - 1][2:]) or "1")[0] if word.startswith("{") else word for i, word in enumerate(words)]
