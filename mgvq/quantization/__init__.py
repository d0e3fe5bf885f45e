"""The algorithm: a method quantises a model, block by block, from statistics to stored weights."""
