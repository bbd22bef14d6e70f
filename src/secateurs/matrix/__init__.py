"""One matrix at a time, tensors only: which pattern (2:4, 16x16), how much a weight matters (Wanda), which weights go (solvers).

Nothing here reads a file or knows a model. Other folders may import all of it.
"""
