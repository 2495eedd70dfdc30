"""Metrics where people look: TensorBoard, Weights & Biases, trackio, each by its own writer. Off by default.

Names are TRL's, as transformers writes them: train/loss, train/rewards/chosen, eval/loss, over train/global_step. Their
own environment variables hold as ever (WANDB_PROJECT, WANDB_MODE=offline, TRACKIO_DIR, ...).
"""

import importlib.util
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError

logger = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def tracked_names(metrics: dict[str, float]) -> dict[str, float]:
    """{"loss": x, "eval_loss": y} -> {"train/loss": x, "eval/loss": y}, numbers alone."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def wanted_trackers(config: Config) -> list[str]:
    """Those of report_to; UserError for one whose package is not there, before anything is trained."""
    names = [name for name in config.report_to or [] if name != "none"]
    if "all" in names:
        names = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"report_to {name}: expected none, all, {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"report_to {name} needs its package: pip install {PACKAGES[name]}; or drop it")
    return list(dict.fromkeys(names))


class Trackers:
    """The writers of one run. One that fails is said and left: a run does not end for its log."""

    def __init__(self, config: Config, settings: dict[str, Any]) -> None:
        folder = Path(config.output_dir)
        name = config.run_name or folder.name
        self._writers: dict[str, tuple[Callable[[int, dict], None], Callable[[], None]]] = {}
        for tracker in wanted_trackers(config):
            self._try(tracker, lambda tracker=tracker: self._open(tracker, folder, name, settings))

    def _open(self, tracker: str, folder: Path, name: str, settings: dict[str, Any]) -> None:
        opened = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}[tracker]
        self._writers[tracker] = opened(folder, name, settings)

    def write(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        named = tracked_names({**metrics, "epoch": epoch})
        for tracker, (write, _) in list(self._writers.items()):
            self._try(tracker, lambda write=write: write(step, named))

    def close(self) -> None:
        for tracker, (_, close) in list(self._writers.items()):
            self._try(tracker, close)

    def _try(self, tracker: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # no network, a full disk, whatever another's writer meets
            self._writers.pop(tracker, None)
            logger.warning("report_to %s fails and is left: %s: %s", tracker, type(error).__name__, error)


def _tensorboard(folder: Path, name: str, settings: dict[str, Any]) -> tuple:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=os.environ.get("TENSORBOARD_LOGGING_DIR") or str(folder / "tensorboard"))

    def write(step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write, writer.close


def _wandb(folder: Path, name: str, settings: dict[str, Any]) -> tuple:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "prefuse")
    run = wandb.init(project=project, name=name, config=settings, dir=str(folder))
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    return lambda step, metrics: run.log({**metrics, "train/global_step": step}), run.finish


def _trackio(folder: Path, name: str, settings: dict[str, Any]) -> tuple:
    import trackio

    trackio.init(project=os.environ.get("TRACKIO_PROJECT", "prefuse"), name=name, config=settings)
    return lambda step, metrics: trackio.log({**metrics, "train/global_step": step}, step=step), trackio.finish
