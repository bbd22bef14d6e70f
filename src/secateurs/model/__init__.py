"""A model as blocks and layers: where they are (families), how one walks through them (walk), how folders are read (checkpoint).

No part of it knows what pruning is. Others use walk, layers, parts, activations, batches and checkpoint.
"""
