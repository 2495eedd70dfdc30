"""The final model in the run folder; where that cannot be written, the weights are kept somewhere else and named."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from prefuse.engine.errors import UserError
from prefuse.engine.model.load import save_model, trained_weights
from prefuse.engine.report.card import model_card
from prefuse.engine.run.checkpoint import model_bytes
from prefuse.engine.run.files import require_space

if TYPE_CHECKING:
    from prefuse.engine.run.setup import Run

logger = logging.getLogger(__name__)


def publish_model(run: Run, done: int, metrics: dict[str, float]) -> None:
    """The final model straight in the run folder, each file whole or absent."""
    weights = trained_weights(run.lm, run.ranks)

    def publish() -> None:
        try:
            require_space(run.folder, model_bytes(run.lm), "the model")
            with tempfile.TemporaryDirectory(dir=run.folder, prefix="model.", suffix=".tmp") as aside:
                _write(run, Path(aside), weights, metrics)
                for path in Path(aside).iterdir():
                    path.replace(run.folder / path.name)
        except (OSError, UserError) as error:
            raise kept_elsewhere(run, done, error, weights) from None

    run.ranks.from_main(publish)


def _write(run: Run, folder: Path, weights: dict[str, Tensor], metrics: dict[str, float]) -> None:
    save_model(run.lm, run.tokenizer, folder, weights)
    card = model_card(run.config, run.identity.command, metrics)
    (folder / "README.md").write_text(card, encoding="utf-8")


def kept_elsewhere(run: Run, done: int, error: Exception, weights: dict[str, Tensor] | None = None) -> UserError:
    """`error`, after which the run folder cannot be written, with where the weights of step `done` are.

    The last checkpoint has them, or else they are written to the first place with room for a model: beside the run
    folder, the working directory, the system's folder for temporary files, the home.
    """
    own, newest = Path(run.home.given).absolute(), run.checkpoints.newest  # as it was named: it may be gone
    if newest == done and (last := own / f"checkpoint-{newest}").is_dir():
        return UserError(
            f"{error}; the weights after step {done} are in {last}: free some space, and --resume ends the run from it"
        )
    for place in (own.parent, Path.cwd(), Path(tempfile.gettempdir()), Path.home()):
        folder = None
        try:
            require_space(place, model_bytes(run.lm), "the model")
            folder = Path(tempfile.mkdtemp(dir=place, prefix=f"{own.name}-step{done}-"))
            _write(run, folder, trained_weights(run.lm, run.ranks) if weights is None else weights, {})
        except (OSError, UserError):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            folder.chmod(0o755)
        return UserError(f"{error}; the weights after step {done} were kept in {folder}, a whole model: move it away")
    return UserError(f"{error}; the weights after step {done} found no place with room for them and are lost")
