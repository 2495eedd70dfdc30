"""The help of a command: its settings by topic in one screen, and each topic, or one setting, in full.

prefuse train --help            # the names, by topic
prefuse train --help loss       # one topic: what each of its settings does
prefuse train --help beta       # one setting
prefuse train --help all        # all of them
"""

import dataclasses
import shutil
import textwrap

from prefuse.engine.config.setting import TRAINING, known
from prefuse.engine.config.settings import commands_of, settings_of
from prefuse.engine.config.values import OTHER_NAMES, did_you_mean, literals, options_of
from prefuse.engine.errors import UserError

CONFIG_HELP = "YAML file with settings; flags win. It may hold settings of other commands."
ALL = "all"
TRAINS = "--model_name_or_path MODEL --dataset_name ROWS --output_dir NEW"
NEEDED = {  # what no run of a command can be without
    "eval": "--model_name_or_path MODEL --dataset_name ROWS",
    "generate": "--model_name_or_path MODEL --dataset_name ROWS",
    "label": "--dataset_name ROWS --scorer SCORER --output_file NEW",
    "revise": "--model_name_or_path MODEL --dataset_name ROWS --constitution FILE --output_file NEW",
    "merge": "--model_name_or_path ADAPTERS --output_dir NEW",
} | dict.fromkeys(TRAINING, TRAINS)


def help_of(command: str, about: str, wanted: str | None = None) -> str:
    """What `--help` shows, or `--help WANTED`: a topic, a setting or all. UserError where it is none of them."""
    topics = settings_of(command)
    names = {topic_name(title): title for title in topics}
    head = [f"usage: prefuse {command} {NEEDED[command]} [--config FILE] [--SETTING VALUE ...]", "", about]
    if wanted is None:
        return "\n".join([*head, "", *_overview(command, topics)])
    word = wanted.lstrip("-").lower().replace("-", "_")
    if word == "config":
        return "\n".join([f"prefuse {command}", "  --config FILE", *_wrapped(CONFIG_HELP)])
    if word == ALL:
        config = ["", "  --config FILE", *_wrapped(CONFIG_HELP)]
        return "\n".join([*head, *config, *(line for title in topics for line in ["", *_topic(title, topics[title])])])
    if word in names:
        title = names[word]
        return "\n".join([f"prefuse {command}: {title}", *_topic(title, topics[title])[1:]])
    word = OTHER_NAMES.get(word, word)
    for title, fields in topics.items():
        if word in fields:
            return "\n".join([f"prefuse {command}: {title}", *_setting(word, fields[word])])
    settings = [name for fields in topics.values() for name in fields]
    hint = did_you_mean(word, [*names, *settings]) or f"; the topics are {', '.join(names)}, {ALL}"
    raise UserError(f"prefuse {command} has no topic or setting {wanted!r}{hint}")


def needed_of(command: str) -> str:
    """What a command without any setting is told."""
    return f"prefuse {command} needs {NEEDED[command]}, or --config FILE"


def topic_name(title: str) -> str:
    """What is typed for a topic: "Speed and memory (docs/training.md)" -> "speed"."""
    return title.split()[0].lower()


def _overview(command: str, topics: dict[str, dict[str, dataclasses.Field]]) -> list[str]:
    left = 2 + max(len(topic_name(title)) for title in topics)
    lines = ["topic".ljust(left) + "settings"]
    for title, fields in topics.items():
        flags = " ".join(f"--{name}" for name in fields)
        wrapped = textwrap.wrap(flags, _width() - left, break_on_hyphens=False, break_long_words=False)
        lines += [
            f"{'' if number else topic_name(title):{left}}{line}" for number, line in enumerate(wrapped)
        ]  # fmt: skip
    example = "max_length" if command in commands_of("max_length") else next(iter(next(iter(topics.values()))))
    return [
        *lines,
        "",
        "All settings may stand in a YAML file: --config FILE (flags win).",
        f"prefuse {command} --help TOPIC     what the settings of a topic do, or of one setting: --help {example}",
        f"prefuse {command} --help {ALL}       all topics",
    ]


def _topic(title: str, fields: dict[str, dataclasses.Field]) -> list[str]:
    return [title, *(line for name, field in fields.items() for line in _setting(name, field))]


def _setting(name: str, field: dataclasses.Field) -> list[str]:
    return [f"  --{name} {_values(name)}".rstrip(), *_wrapped(known(field).about + _said_default(field))]


def _width() -> int:
    return min(100, shutil.get_terminal_size().columns)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
    )  # fmt: skip


def _values(name: str) -> str:
    options = options_of(name)
    if bool in options:
        return "[true|false]"
    if literals(name):
        return "{" + ",".join(literals(name)) + "}"
    if list[str] in options:
        return "TEXT ..."
    if list[float] in options:
        return "NUMBER ..."
    return "TEXT" if str in options else "NUMBER"


def _said_default(field: dataclasses.Field) -> str:
    if field.default is None or field.default == "":
        return ""
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f" (default: {value})"
