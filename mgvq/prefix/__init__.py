"""Rounding behind the quantised layers: which inputs a layer is rounded on, and what its target has to make up for."""
