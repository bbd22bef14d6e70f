"""Packed matrices: how zeros are left out (formats), which kernel multiplies (dispatch), the layer that does it (packed_linear).

library loads the compiled kernels of csrc/. Others use formats, dispatch and packed_linear.
"""
