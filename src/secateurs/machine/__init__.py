"""What this machine can do: honest timing, `secateurs probe` (profile), `secateurs bench`; published figures (hardware).

Others use profile, timing and bench.
"""
