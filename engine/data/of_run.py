"""What the folder of a run says of the text that its model was trained on."""

from pathlib import Path
from typing import Any

import yaml

from prefuse.engine.config.settings import Config
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
