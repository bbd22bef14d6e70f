"""What nothing loads any more, read into plain folders: compressed-tensors' bitmasks and Marlin-24, masks of torch.nn.utils.prune,
pickled checkpoints and ONNX files.

One file for each way of storing; folder.py finds out which a model has, and writes the result.
"""
