"""The settings of a run, one file a topic; how a setting is declared: setting.py."""

from prefuse.engine.config.settings import Config as Config
from prefuse.engine.config.settings import validate as validate
