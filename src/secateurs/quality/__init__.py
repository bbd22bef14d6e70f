"""What a model is worth: text as tokens (texts), perplexity and KL (evaluate), lm-eval tasks, and gates, the floors it must hold.

evaluation measures a folder against its dense model, and is what commands call.
"""
