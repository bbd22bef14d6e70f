"""A model as blocks and layers: where they are (discover), how one walks through them (walk), how folders are read (checkpoint).

Nothing here knows what pruning is. Other folders use walk, layers, blocks, activations, batches and checkpoint.
"""
