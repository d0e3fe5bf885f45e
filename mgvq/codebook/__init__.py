"""Codebooks: what a layer's weights are rounded to. One variant a module and a yaml of the same name."""
