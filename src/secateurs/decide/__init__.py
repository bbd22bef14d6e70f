"""What to ship: what a candidate could save (realize), which one does (decide), and how many replicas that takes (fleet).

Everything is a run directory of prune or shrink with its measurements.
"""
