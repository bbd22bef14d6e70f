"""What all other folders use: errors, safe file writes, this machine, compute precision, processes, a value with its interval.

Nothing here knows a model or a mask. Other folders may import all of it.
"""
