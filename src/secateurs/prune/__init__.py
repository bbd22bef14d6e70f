"""One-shot pruning: the plan, what guides it (sensitivity, allocation), one block, tuning, and the run directory (folder, live).

prune.prune() is the way in; report and verify say and check what came of it.
"""
