"""Whole units removed (neurons, heads, experts, channels, blocks): what is left is a smaller dense model.

run.shrink() works on a model folder, channels.shrink_module() on a live module.
"""
