"""Measurements beside peers: `prefuse bench VERB`, one file a verb. Nothing imports it but the command line."""
