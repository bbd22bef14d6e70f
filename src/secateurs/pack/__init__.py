"""A model folder whose zeros take no space, and back (folder); packed layers in a live model (live); the plugin that makes
transformers load the folder.

Others use folder.pack_run().
"""
