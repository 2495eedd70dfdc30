"""pytest-benchmark files for who changes the head: `pytest bench/development --benchmark-compare` after a saved run."""
