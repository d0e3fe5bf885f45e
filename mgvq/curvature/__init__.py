"""Curvature: what the calibration data says about each layer."""
