"""Cutting the input channels of a layer into groups, each with a codebook and a rate of its own."""
