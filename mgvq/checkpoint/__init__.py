"""The packed checkpoint: what a quantised model is on disk, its size to the byte, and the way back to a model."""
