"""`prefuse plot`: a picture, or one line that says why there is none."""

import json

import pytest

from prefuse.engine import cli

PNG = b"\x89PNG\r\n\x1a\n"


def test_pictures_of_losses_and_of_a_run(tmp_path, capsys):
    image = tmp_path / "losses.png"
    assert cli.main(["plot", "losses", "dpo", "kto", "--beta", "0.1", "--image", str(image)]) == 0
    assert image.read_bytes()[:8] == PNG
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.7}) + "\n")
    assert cli.main(["plot", "run", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes()[:8] == PNG
    assert "the curves of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments are required: verb"),
        (["losses"], "arguments are required: losses"),
        (["losses", "dppo"], "unknown loss 'dppo'; did you mean"),
        (["losses", "dpo", "--beta", "-1"], "beta must be"),
        (["losses", "dpo", "--beta", "x"], "invalid float value: 'x'"),
        (["run", "none"], "none has no metrics: expected metrics.jsonl"),
        (["picture"], "invalid choice: 'picture'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
