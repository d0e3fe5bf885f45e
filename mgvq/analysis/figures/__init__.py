"""Figures: SVG from records."""
