"""Codebooks: how the tables and grids that weights are rounded to are fitted; how they are *stored* is in `mgvq.formats`.

A variant is a module and a yaml of the same name.
"""
