"""Allocation: the rate of every table group of the whole model under one budget of stored bits."""
