"""Allocation: how many bits each layer gets under the byte budget."""
