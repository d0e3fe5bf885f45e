"""Calibration sets: examples for the statistics, and held-out ones, disjoint from each other and from every test question."""
