"""The settings of a run as a YAML file: read with every value checked against its field, and written."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Literal

import yaml

from prefuse.engine.config.settings import FIELDS, Config
from prefuse.engine.errors import UserError


def read_yaml(path: str | Path) -> Config:
    """The settings of a YAML file, the rest as the defaults say."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"the config file {path} must hold `name: value` lines, got a {type(settings).__name__}")
    for name in settings:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `prefuse train --help` lists the settings"
            raise UserError(f"unknown setting {name!r} in {path}{hint}")
    return Config(**{name: _typed(name, value) for name, value in settings.items()})


def write_yaml(config: Config, path: Path, command: str) -> None:
    """The inverse of `read_yaml`."""
    body = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    path.write_text(f"# prefuse {command} --config {path.name}\n{body}", encoding="utf-8")


def _typed(name: str, value: object) -> object:
    """A YAML value as the field's type. YAML 1.1 reads 1e-6 as text and yes as true: the first is meant as a
    number, the second is never meant as one."""
    annotation = FIELDS[name]
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if option is types.NoneType:
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is list:
            values = [value] if isinstance(value, str) else value
            if isinstance(values, list) and values and all(isinstance(item, str) for item in values):
                return values
        elif option is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                try:
                    return float(value)
                except ValueError:
                    pass
        elif type(value) is option:
            return value
    wanted = " or ".join(_type_name(option) for option in options)
    raise UserError(f"{name} must be {wanted}, got {value!r} ({type(value).__name__})")


def _type_name(option: object) -> str:
    if option is types.NoneType:
        return "null"
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(typing.get_args(option))
    if typing.get_origin(option) is list:
        return "a list of texts"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[option]
