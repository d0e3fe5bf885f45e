"""Rounding a layer to its codebooks, with or without correcting the error of what is rounded in what is still free."""
