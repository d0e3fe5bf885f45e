"""Allocation: the rate of every unit of the whole model under one budget of stored bits."""
