"""Removes whole units (neurons, heads, experts, channels, blocks), so that a smaller dense model is left.

run.shrink() works on a model folder, by way of estimates, shapes and cutting. channels.shrink_module() works on a live module, by
way of trace, proof, widths and consumers.
"""
