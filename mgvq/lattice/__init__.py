"""Lattice codes of eight weights: E8P at 2 bits, with a second stage for the residual at 3 and 4."""
