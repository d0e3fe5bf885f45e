"""Transforms: an equivalent problem for each layer, in a basis in which its weights are easier to code."""
