"""A model folder whose zeros take no space, and back (folder); the plugin that makes transformers load it.

Others use folder.pack_run().
"""
