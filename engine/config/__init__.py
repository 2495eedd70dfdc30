"""The settings of a run: fields, rules, and the YAML file."""
