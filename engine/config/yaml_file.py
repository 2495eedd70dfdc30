"""The settings of a run as a YAML file: read with every value checked against its field, and written."""

from collections.abc import Hashable
from pathlib import Path

import yaml

from prefuse.engine.config.settings import FIELDS, Config, settings_of
from prefuse.engine.config.values import typed, unknown_setting
from prefuse.engine.errors import UserError
from prefuse.engine.run.files import write_whole

OF_A_RUN = "# prefuse "  # how a file begins that `write_yaml` wrote


class _OnceLoader(yaml.SafeLoader):
    """YAML whose keys are given once. yaml itself silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice: keep one of the two", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep)


def read_settings(path: str | Path) -> dict[str, object]:
    """What a YAML file sets, by name and with the type of the field."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_OnceLoader) or {}  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config file {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"the config file {path} must hold `name: value` lines, got a {type(settings).__name__}")
    for name in settings:
        if name not in FIELDS:
            raise unknown_setting(str(name), f" in {path}")
    return {name: typed(name, value) for name, value in settings.items()}


def read_yaml(path: str | Path) -> Config:
    """The settings of a YAML file, the rest as the defaults say."""
    return Config(**read_settings(path))


def is_of_a_run(path: str | Path) -> bool:
    """Whether a run wrote the file, by `write_yaml`, and not a user."""
    with Path(path).open(encoding="utf-8") as file:
        return file.readline().startswith(OF_A_RUN)


def command_of_run(path: str | Path) -> str | None:
    """The command whose settings `write_yaml` wrote into the file; None for a file of a user."""
    if not is_of_a_run(path):
        return None
    with Path(path).open(encoding="utf-8") as file:
        return file.readline().removeprefix(OF_A_RUN).split()[0]


def write_yaml(config: Config, path: Path, command: str) -> None:
    """The settings of `command`, by topic. `read_yaml` is the inverse."""
    text = f"{OF_A_RUN}{command} --config {path.name}\n"
    for title, fields in settings_of(command).items():
        values = {name: getattr(config, name) for name in fields}
        text += f"\n# {title}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_whole(path, text)
