"""Which files of a folder make up a split.

Splits are named as `datasets.load_dataset` names them: by the `configs` of the folder's README, by shards
("data/train_prefs-00000-of-00002.parquet" is the split train_prefs), or by words in the names of folders and files
("dev.jsonl" is validation). Files that name no split are train; without any split, a folder is read whole. Files of
several purposes (train_prefs.jsonl beside train_sft.jsonl) are no one split here, where `datasets` reads them as one.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from pathlib import Path
from typing import Any

from prefuse.engine.data.records import DataError
from prefuse.engine.data.sources.files import COMPRESSED, DATA, is_data_file

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
PURPOSES = {"prefs", "preference", "preferences", "sft", "gen", "rm", "reward", "dpo", "kto", "ppo", "grpo", "rl"}
SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-\d{5}")


def files_of_split(folder: Path, split: str, config: str | None) -> list[Path]:
    """Relative paths, sorted."""
    files = sorted(data_files(folder))
    if not files:
        kinds = ", ".join(DATA)
        raise DataError(f"{folder}: a folder without {kinds} files (plain or {', '.join(COMPRESSED)})")
    told = _splits_of_readme(folder, files, config)
    splits = told or _splits_of_names(files)
    if splits is None:
        return files
    wanted = split if split in splits else SPLIT_OF_WORD.get(split, split)
    if wanted in splits:
        if not told:
            _refuse_several_purposes(folder, wanted, splits[wanted])
        return splits[wanted]
    named = [file for file in files if file.name.split(".")[0] == split]  # train_prefs.jsonl beside train_sft.jsonl
    return named or pick(splits, split, str(folder))


def _refuse_several_purposes(folder: Path, split: str, files: list[Path]) -> None:
    purposes = {file: PURPOSES.intersection(re.split(r"[-._ 0-9]+", file.name.lower())) for file in files}
    if len(set(map(frozenset, purposes.values()))) > 1:
        names = ", ".join(map(str, files[:6])) + (", ..." if len(files) > 6 else "")
        one = next(file for file, found in purposes.items() if found)
        raise DataError(
            f"{folder}: the files of the split {split} have several purposes ({names}); name the split by a file's "
            f"whole name, as in --dataset_train_split {one.name.split('.')[0]}, or name one file as the data set"
        )


def pick(splits: dict[str, Any], split: str, source: str) -> Any:
    if split not in splits:
        raise DataError(f'{source}: no split "{split}"; it has {", ".join(splits)}')
    return splits[split]


def data_files(folder: Path) -> list[Path]:
    """Every data file below, relative; links are followed once, hidden files and folders left out."""
    found, seen = [], {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        for name in list(folders):
            path = Path(place, name)
            if name.startswith((".", "__")):
                folders.remove(name)
            elif path.is_symlink():
                real = os.path.realpath(path)
                if real in seen or Path(place).resolve().is_relative_to(real):
                    raise DataError(f"{path} is a link to a folder that holds it or is read already: a loop of links")
                seen.add(real)
        for name in files:
            path = Path(place, name)
            if is_data_file(path) and not name.startswith(".") and name not in NOT_DATA:
                refuse_what_is_no_file(path)
                found.append(path.relative_to(folder))
    return found


def refuse_what_is_no_file(path: Path) -> None:
    """FIFOs, devices, sockets, links to nothing and loops of links."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = "a link to nothing" if path.is_symlink() and not _loops(error) else f"not readable ({error.strerror})"
        raise DataError(f"{path} is {'part of a loop of links' if _loops(error) else what}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        what = kinds.get(stat.S_IFMT(mode), "no file")
        raise DataError(f"{path} is {what}, which can be read only once; write the rows to a file first")


def _loops(error: OSError) -> bool:
    import errno

    return error.errno == errno.ELOOP


def _splits_of_names(files: list[Path]) -> dict[str, list[Path]] | None:
    """None where no name says a split."""
    names = {file: _shard(file) or _keyword(file) for file in files}
    if not any(names.values()):
        return None
    splits: dict[str, list[Path]] = {}
    for file, name in names.items():
        splits.setdefault(name or "train", []).append(file)
    return splits


def _shard(file: Path) -> str | None:
    match = SHARD.match(file.name)
    return match and match["split"]


def _keyword(file: Path) -> str | None:
    """A word of its folders' names, else of its own name; parts are cut where `datasets` cuts them."""
    for part in (*file.parts[:-1], file.name):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in SPLIT_OF_WORD:
                return SPLIT_OF_WORD[word]
    return None


def _splits_of_readme(folder: Path, files: list[Path], config: str | None) -> dict[str, list[Path]] | None:
    """What the YAML at the top of README.md says in `configs`, if it says which files belong to which split."""
    configs = {str(entry.get("config_name", "default")): entry for entry in _readme(folder) if entry.get("data_files")}
    if not configs:
        if config is not None:
            raise DataError(f'{folder}: no configuration "{config}"; its README.md names none')
        return None
    if config is None:
        default = [name for name, entry in configs.items() if name == "default" or entry.get("default")]
        if not default and len(configs) > 1:
            raise DataError(
                f"{folder} has several configurations: {', '.join(configs)}; name one with --dataset_config"
            )
        config = (default or list(configs))[0]
    if config not in configs:
        raise DataError(f'{folder}: no configuration "{config}"; it has {", ".join(configs)}')
    splits: dict[str, list[Path]] = {}
    for split, pattern in _patterns(configs[config]["data_files"]):
        pattern = pattern.removeprefix("./")
        matching = [file for file in files if fnmatch.fnmatch(file.as_posix(), pattern)]
        if not matching:
            raise DataError(f"{folder}: its README.md names {pattern} for {split}, and there is no such file")
        splits.setdefault(split, []).extend(matching)
    return splits


def _readme(folder: Path) -> list[dict[str, Any]]:
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return []
    configs = header.get("configs") if isinstance(header, dict) else None
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """(split, pattern) of a string, a list, or [{split, path}]."""
    pairs = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths = paths if isinstance(paths, list) else [paths]
        if not all(isinstance(text, str) for text in (split, *paths)):
            raise DataError(f"README.md has {entry!r:.80} among its data_files; expected a path, or {{split, path}}")
        pairs += [(split, path) for path in paths]
    return pairs
