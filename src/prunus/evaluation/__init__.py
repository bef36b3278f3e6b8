"""Perplexity, KL to the dense model, multiple choice, lm-eval tasks and continuations, each with its conditions."""

from prunus.evaluation.continuations import continuations
from prunus.evaluation.evaluate import evaluate_choices, evaluate_model, evaluate_text
from prunus.evaluation.lm_eval_tasks import lm_eval_tasks
from prunus.evaluation.source import LogitSource

__all__ = [
    "LogitSource",
    "continuations",
    "evaluate_choices",
    "evaluate_model",
    "evaluate_text",
    "lm_eval_tasks",
]
