"""How good a model is: text as tokens (texts), perplexity and KL (compare), lm-eval tasks, and gates, the limits it must hold.

evaluation compares a model folder with its dense model, and is what commands call.
"""
