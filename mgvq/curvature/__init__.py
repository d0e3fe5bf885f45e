"""Curvature: what the calibration data says about each layer, collected in one pass and turned into the metric of rounding."""
