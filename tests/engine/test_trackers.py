"""report_to: the libraries' own writers get TRL's names; none is needed, and one that fails ends no run.

Where a library is not installed a stand-in takes its place, whose functions have the parameters of the real ones
(wandb 0.31, trackio 0.43, tensorboard 2.21 through torch.utils.tensorboard).
"""

import importlib.util
import sys
import types

import pytest

from prefuse.engine.errors import UserError
from prefuse.engine.report import trackers
from prefuse.engine.report.trackers import Trackers, tracked_names, wanted_trackers
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, write_rows

METRICS = {"loss": 0.5, "rewards/chosen": 1.5, "eval_loss": 0.25, "eval_rewards/accuracies": 1.0, "bad": float("nan")}
NAMES = {"train/loss": 0.5, "train/rewards/chosen": 1.5, "eval/loss": 0.25, "eval/rewards/accuracies": 1.0}


def config_of(folder, *names, **changes):
    options = {"output_dir": str(folder), "model_name_or_path": "-", "dataset_name": "-", "report_to": list(names)}
    return settings(**options | changes)


def test_names_are_those_of_transformers():
    assert tracked_names(METRICS) == NAMES
    from transformers.integrations.integration_utils import rewrite_logs

    assert rewrite_logs({k: v for k, v in METRICS.items() if k != "bad"}) == NAMES


class Wandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.rows, self.metrics, self.done = [], [], False

    def init(self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
             config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
             mode=None, force=None, reinit=None, resume=None, settings=None):  # fmt: skip
        self.about = {"project": project, "dir": dir, "name": name, "config": config}
        return self

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        self.metrics.append((name, step_metric))

    def log(self, data, step=None, commit=None):
        self.rows.append(data)

    def finish(self, exit_code=None, quiet=None):
        self.done = True


class Trackio(types.ModuleType):
    def __init__(self):
        super().__init__("trackio")
        self.rows, self.done = [], False

    def init(self, project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None,
             config=None, resume="never", settings=None, private=None, embed=True):  # fmt: skip
        self.about = {"project": project, "name": name, "config": config}

    def log(self, metrics, step=None):
        self.rows.append((step, metrics))

    def finish(self):
        self.done = True


@pytest.fixture
def stand_in(monkeypatch):
    def put(module):
        real = importlib.util.find_spec
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found = lambda name, *rest: module if name == module.__name__ else real(name, *rest)  # noqa: E731
        monkeypatch.setattr(trackers.importlib.util, "find_spec", found)
        return module

    return put


def test_wandb_gets_a_run(stand_in, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    wandb = stand_in(Wandb())
    writer = Trackers(config_of(tmp_path / "run", "wandb"), {"beta": 0.1})
    writer.write(7, 0.5, METRICS)
    writer.close()
    assert wandb.about == {"project": "prefuse", "dir": str(tmp_path / "run"), "name": "run", "config": {"beta": 0.1}}
    assert wandb.rows == [{**NAMES, "train/epoch": 0.5, "train/global_step": 7}]
    assert wandb.metrics == [("train/global_step", None), ("*", "train/global_step")]
    assert wandb.done


def test_trackio_gets_a_run(stand_in, tmp_path):
    trackio = stand_in(Trackio())
    writer = Trackers(config_of(tmp_path, "trackio", run_name="mine"), {"beta": 0.1})
    writer.write(7, 0.5, METRICS)
    writer.close()
    assert trackio.about["name"] == "mine"
    assert trackio.rows == [(7, {**NAMES, "train/epoch": 0.5, "train/global_step": 7})]
    assert trackio.done


def test_a_writer_that_fails_is_left(stand_in, tmp_path, caplog):
    trackio = stand_in(Trackio())
    writer = Trackers(config_of(tmp_path, "trackio"), {})
    trackio.log = lambda *args, **kwargs: 1 / 0
    writer.write(1, 0.1, METRICS)
    writer.write(2, 0.1, METRICS)
    writer.close()
    assert caplog.text.count("report_to trackio fails and is left: ZeroDivisionError") == 1
    assert not trackio.done


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = Trackers(config_of(tmp_path, "tensorboard"), {})
    writer.write(3, 0.5, METRICS)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*NAMES, "train/epoch"}
    (point,) = events.Scalars("eval/loss")
    assert (point.step, point.value) == (3, 0.25)


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_the_real_one_offline(library, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as it is imported
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    writer = Trackers(config_of(tmp_path, library), {"beta": 0.1})
    writer.write(3, 0.5, METRICS)
    assert list(writer._writers) == [library]
    writer.close()
    assert module.__name__ == library
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_what_is_not_there_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to wandb needs its package: pip install wandb"):
        wanted_trackers(config_of(tmp_path, "wandb"))
    with pytest.raises(UserError, match="report_to neptune: expected none, all, tensorboard, wandb, trackio"):
        wanted_trackers(config_of(tmp_path, "neptune"))
    assert wanted_trackers(config_of(tmp_path, "none")) == []
    assert wanted_trackers(config_of(tmp_path, "all")) == []


def test_a_run_reports_every_line_of_its_log(stand_in, tmp_path):
    trackio = stand_in(Trackio())
    model, pairs = save_model(tmp_path / "model"), write_rows(tmp_path / "pairs.jsonl", PAIRS)
    names = {"model_name_or_path": model, "dataset_name": pairs, "output_dir": str(tmp_path / "run")}
    train(settings(**names, max_steps=2, eval_fraction=0.2, report_to=["trackio"]), "train")
    rows = read_log(tmp_path / "run")
    assert [step for step, _ in trackio.rows] == [row["step"] for row in rows]
    for (_, sent), row in zip(trackio.rows, rows, strict=True):
        wanted = tracked_names({k: v for k, v in row.items() if k != "step" and v is not None})
        assert sent.items() >= {k: v for k, v in wanted.items() if k != "train/epoch"}.items()
    assert trackio.done
