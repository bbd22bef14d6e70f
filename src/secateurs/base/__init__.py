"""What every part of secateurs stands on: errors, files, this machine, processes, an estimate with its interval.

Nothing here knows a model or a mask. Others may use all of it.
"""
