"""One-shot pruning: the plan, what guides it (sensitivity, allocation), one block, tuning, and the run that puts them together.

prune.prune() is the way in; record holds what report.json says, and verify checks it.
"""
