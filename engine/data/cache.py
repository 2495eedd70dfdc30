"""Tokenized rows kept on disk: a second run on the same rows starts without reading them again.

An entry is a folder named by all that its ids depend on: the content of the files (for a dataset of the hub, of those
that `datasets` keeps of it), the tokenizer with its template,
every setting of `load_examples`, the code of this folder and the versions of the libraries below it. It holds the flat
arrays, which are mapped into memory, and about.json with their hashes, the skipped rows and what was said on the way,
which is said again. It is written aside and renamed, so it is whole or absent, whoever else writes or is killed; where
it is damaged, or cannot be written, the rows are read as if there were none.

`dataset_cache`: "auto" is the folder `datasets` in $PREFUSE_CACHE, else in prefuse/ of $XDG_CACHE_HOME or ~/.cache;
"none" keeps nothing; anything else is a folder. It is kept below 20 GB: entries that were not used for the longest time
go first. Files of less than 1 MB are read anew, which is as quick.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefuse.engine.data.forms.mixture import mixture_parts, name_of
from prefuse.engine.data.ragged import Ragged, Texts
from prefuse.engine.data.records import Skipped
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.table import NUMBERS, Examples
from prefuse.engine.run.files import flush, sha256_of

logger = logging.getLogger(__name__)

FEWEST_BYTES = 1 << 20  # of files that are worth an entry
MOST_BYTES = 20 << 30  # of all entries
LEFT_OVER = 24 * 3600  # seconds after which what a killed run has left is removed
LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow", "numpy")
ARRAYS = ("prompts", "completions", "rows")  # each as its values, starts and lengths
OPTIONAL = (*NUMBERS, "learned", "threads")


def folder_of(setting: str) -> Path | None:
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting)
    if own := os.environ.get("PREFUSE_CACHE"):
        return Path(own) / "datasets"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefuse" / "datasets"


def cached(
    setting: str, source: str | Sequence[Any], split: str, tokenizer: Any, settings: dict, read: Callable[[], Any]
) -> Any:
    """The Dataset of `read()`, from an entry if one has the same key. `settings`: those of `load_examples`, as JSON."""
    folder = folder_of(setting)
    parts = [] if folder is None else _parts(source, split, settings["reading"]["dataset_config"])
    if sum(path.stat().st_size for _, files in parts for path in files) < FEWEST_BYTES:
        return read()
    key = _key(parts, tokenizer, settings | {"split": split, "source": source if len(parts) > 1 else None})
    entry = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    if entry.exists():
        try:
            dataset, about = _load(entry, key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("the dataset cache %s is damaged (%s): reading the rows again", entry, error)
        else:
            tokenizer.chat_template = about["chat_template"]  # one may have been given to a tokenizer that had none
            for level, said in about["said"]:
                logger.log(level, "%s", said)
            logger.info("the tokens of %s are read from %s", name_of(source), entry)
            return dataclasses.replace(dataset, source=name_of(source))
    with _recorded() as said:
        dataset = read()
    try:
        _store(entry, {"key": key, "said": said, "chat_template": tokenizer.chat_template}, dataset)
        _trim(folder, entry)
    except OSError as error:
        logger.warning("the dataset cache %s could not be written (%s): the run goes on without", entry, error)
    return dataset


# ---------------------------------------------------------------------------------------------------------
# What the ids depend on


Files = tuple[str, tuple[Path, ...]]  # a path as it was given, which names its rows; the files that it stands for


def _parts(source: str | Sequence[Any], split: str, config: str | None) -> list[Files]:
    """The files of a source, or of each part of a mixture; none where a part has no file (rows in memory)."""
    if isinstance(source, str):
        asked = [(source, split, config)]
    else:
        asked = [(part.place, part.split or split, part.name) for part in mixture_parts(source)]
    parts = [(path, open_source(path, *rest).files) for path, *rest in asked]
    return parts if all(files for _, files in parts) else []


def _key(parts: list[Files], tokenizer: Any, settings: dict) -> dict:
    text = settings["text"]
    if not re.search("date|strftime", str(tokenizer.chat_template)):
        text = text | {"date": None}
    elif text["date"] is None:
        text = text | {"date": str(datetime.date.today())}
    return {
        "sources": [[_named(path), [_about(file, Path(path)) for file in files]] for path, files in parts],
        "tokenizer": _tokenizer_hash(tokenizer),
        "settings": settings | {"text": text},
        "code": _code_hash(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _named(path: str) -> str:
    """As its rows are named: a file or folder by its own name, a dataset of the hub by all of it."""
    return Path(path).name if Path(path).exists() else path


def _about(file: Path, source: Path) -> list:
    name = os.path.relpath(file, source) if source.is_dir() else file.name
    return [name, file.stat().st_size, sha256_of(file)]


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that `save_pretrained` writes, the template among it, and of its class."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} {sha256_of(path)}".encode())
    return digest.hexdigest()


def _code_hash() -> str:
    """Of the source of this folder: another version of it may read the same rows otherwise."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)} {sha256_of(path)}".encode())
    return digest.hexdigest()


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


@contextlib.contextmanager
def _recorded() -> Iterator[list[tuple[int, str]]]:
    """What is logged in this folder meanwhile."""
    recorder, ours = _Recorder(), logging.getLogger("prefuse.engine.data")
    ours.addHandler(recorder)
    try:
        yield recorder.said
    finally:
        ours.removeHandler(recorder)


# ---------------------------------------------------------------------------------------------------------
# On disk


def _store(entry: Path, about: dict, dataset: Any) -> None:
    aside = entry.with_name(f"{entry.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.mkdir(parents=True)
        hashes = {}
        for name, array in _arrays_of(dataset.examples).items():
            np.save(aside / f"{name}.npy", array)
            hashes[name] = sha256_of(aside / f"{name}.npy")
        fields = {f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset) if f.name != "examples"}
        about = about | {"arrays": hashes, "sides": dataset.examples.sides}
        about["dataset"] = fields | {"skipped": [dataclasses.asdict(skipped) for skipped in dataset.skipped]}
        (aside / "about.json").write_text(json.dumps(about), encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            flush(path)
        damaged = aside.with_suffix(".old")
        with contextlib.suppress(FileNotFoundError):
            entry.rename(damaged)
        with contextlib.suppress(OSError):  # another run has just put the same here
            aside.rename(entry)
        shutil.rmtree(damaged, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _arrays_of(examples: Examples) -> dict[str, np.ndarray]:
    parts = (examples.prompts, examples.completions, examples.rows.data)
    arrays = {
        f"{name}-{field}": getattr(part, field)
        for name, part in zip(ARRAYS, parts, strict=True)
        for field in ("values", "starts", "lengths")
    }
    optional = {name: getattr(examples, name) for name in OPTIONAL}
    return arrays | {name: array for name, array in optional.items() if array is not None}


def _load(entry: Path, key: dict) -> tuple[Any, dict]:
    from prefuse.engine.data.examples import Dataset

    about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
    if about["key"] != json.loads(json.dumps(key)):
        raise ValueError("it is not what its key says")
    arrays = {}
    for name, expected in about["arrays"].items():
        path = entry / f"{name}.npy"
        if sha256_of(path) != expected:
            raise ValueError(f"{path.name} does not have the hash that was written down")
        arrays[name] = np.asarray(np.load(path, mmap_mode="r"))
    prompts, completions, rows = (
        Ragged(*(arrays[f"{name}-{field}"] for field in ("values", "starts", "lengths"))) for name in ARRAYS
    )
    optional = {name: arrays.get(name) for name in OPTIONAL}
    examples = Examples(prompts, completions, Texts(rows), about["sides"], **optional)
    fields = about["dataset"]
    os.utime(entry)  # used
    skipped = [Skipped(**each) for each in fields["skipped"]]
    return Dataset(examples, **fields | {"skipped": skipped}), about


def _trim(folder: Path, newest: Path) -> None:
    """Removes what killed runs have left, and the entries that were not used for the longest time."""
    sizes: dict[Path, int] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        if path.suffix in (".tmp", ".old"):
            if time.time() - path.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(path, ignore_errors=True)
            continue
        sizes[path] = sum(file.stat().st_size for file in path.iterdir())
        if sum(sizes.values()) > MOST_BYTES and path != newest:
            shutil.rmtree(path, ignore_errors=True)
