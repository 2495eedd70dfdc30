"""A data source -> named rows, one after another."""

from prefuse.engine.data.records import BadRow, DataError
from prefuse.engine.data.sources.source import Source, open_source

__all__ = ["BadRow", "DataError", "Source", "open_source"]
