"""Scores of answers: one type for reward models, ensembles, rules, Python functions and judges. Knows no run."""

from prefuse.engine.score.contract import Scorer as Scorer
from prefuse.engine.score.contract import Scores as Scores
from prefuse.engine.score.scorers import scorer_of as scorer_of
