"""Named rows -> records: which columns a row is read from, what they become, and what is wrong with a row."""

from prefuse.engine.data.forms.form import Form, ReadOptions
from prefuse.engine.data.forms.mixture import name_of
from prefuse.engine.data.forms.read import Reading, read_records
from prefuse.engine.data.records import BadRow, DataError, Message, Record, SetAside, Skipped, Text

__all__ = [
    "BadRow",
    "DataError",
    "Form",
    "Message",
    "ReadOptions",
    "Reading",
    "Record",
    "SetAside",
    "Skipped",
    "Text",
    "name_of",
    "read_records",
]
