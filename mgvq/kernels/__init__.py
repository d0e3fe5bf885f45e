"""Products with a packed weight that never becomes a matrix: one compiled loop for each way of storing codes.

They stand below `mgvq.formats`, whose classes offer them as `multiply`, and know packed bytes, tables and activations alone:
float32, on the CPU, a handful of tokens at a time. `mgvq.kernels.linear` says when they run.
"""
