"""`python -m prefuse.engine` is `prefuse`."""

from prefuse.engine.cli import program

program()
