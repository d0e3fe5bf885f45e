"""How a quantised weight is *stored*: packed codes with their tables, one class a format; the fits are in `mgvq.codebook`.

A leaf package, which needs nothing else of mgvq to decode a checkpoint. `multiply` of a class is the product of few tokens with
what is stored, without decoding it (`mgvq.kernels`).
"""
