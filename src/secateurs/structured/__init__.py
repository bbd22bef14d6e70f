"""Removing whole units: what is left is a smaller dense model. columns: which and how to make up for it; units: where they are in
a model and what is cut with them; shrink: a model folder, to a budget.
"""
