"""How fast this machine is: timing, `secateurs probe` (probe, profile), `secateurs bench`; published figures (hardware).

Other folders use profile, timing, probe, bench and hardware.
"""
