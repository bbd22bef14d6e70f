"""Packed matrices: how zeros are left out (formats), which kernel multiplies (dispatch), the layer that does it (packed_linear).

library loads the compiled kernels of csrc/; semi_structured times PyTorch's 2:4 on GPUs.
"""
