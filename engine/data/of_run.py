"""What the folder of a run says of the text that its model was trained on."""

import datetime
import hashlib
import json
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from prefuse.engine.config.settings import Config
from prefuse.engine.config.yaml_file import is_of_a_run
from prefuse.engine.data.templates import TextOptions
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say

# Settings that change a prompt and are saved with neither the model nor its tokenizer.
UNSAVED = ("system_prompt", "chat_template_kwargs")


def control_of_run(folder: Path) -> str | None:
    """control_good of the csft run in `folder`; None for any other folder."""
    settings = _settings_of(folder)
    control = settings.get("control_good") if settings.get("loss_type") == "csft" else None
    return control if isinstance(control, str) else None


def first_day(folder: Path) -> str | None:
    """The day that the run in `folder` began, which its chat template was told; None for any other folder."""
    date = _settings_of(folder).get("template_date")
    return date if isinstance(date, str) else None


@cache
def today() -> str:
    """The day on which this process first asked: prompts and scorers agree, also across midnight."""
    return datetime.date.today().isoformat()


def read_system_prompt(given: str | None) -> str | None:
    """The text of the setting system_prompt, which may name a .txt file."""
    if given is None or not given.endswith(".txt"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read system_prompt {given}: {error}") from None


def text_of_scorer(path: str, asked: TextOptions | None = None) -> TextOptions:
    """How the conversations that a scorer reads become text, by its own chat template.

    A folder that a run has left renders as its training did: with its arguments, system prompt, EOS and first day. Any
    other model gets the arguments and the day of the run that asks, and no system prompt.
    """
    asked = asked or TextOptions(date=today())
    own = Path(path) / "config.yaml"
    if not own.is_file() or not is_of_a_run(own):
        return TextOptions(arguments=asked.arguments, date=asked.date)
    settings = _settings_of(Path(path))
    return TextOptions(
        arguments=json.loads(settings.get("chat_template_kwargs") or "{}"),
        system_prompt=read_system_prompt(settings.get("system_prompt")),
        date=settings.get("template_date") or asked.date,
        eos_token=settings.get("eos_token"),
        learn_after_stop=bool(settings.get("learn_after_stop")),
    )


def text_key(text: TextOptions, tokenizer: Any) -> str:
    """What a cache of scores must know of it: empty where nothing but the template's own text is in the scores."""
    dated = re.search("date|strftime", str(tokenizer.chat_template))
    known = replace(text, date=text.date if dated else None, arguments=text.arguments or None)
    digest = hashlib.sha256(json.dumps(asdict(known), sort_keys=True).encode()).hexdigest()
    return "" if known == TextOptions() else f" text {digest[:16]}"


def say_unlike_run(config: Config) -> None:
    """Says which prompts the model has learned where the settings leave them to the default."""
    settings = _settings_of(Path(config.model_name_or_path))
    for name in UNSAVED:
        if getattr(config, name) is None and settings.get(name) is not None:
            say(
                f"{config.model_name_or_path} was trained with --{name} {settings[name]!r}, and these prompts are "
                f"without: give it too, or --config {Path(config.model_name_or_path) / 'config.yaml'}"
            )


def _settings_of(folder: Path) -> dict[str, Any]:
    """Those in the config.yaml of a run's folder; none where there is no such file, or it cannot be read."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}
