"""Decides what to ship: estimates what candidates save (realize), measures them and recommends one (decide), sizes a fleet (fleet).

Every candidate is a run directory of prune or shrink with its measurements.
"""
