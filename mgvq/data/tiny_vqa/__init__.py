"""Procedural visual question answering: drawn scenes with real handwriting, twelve question types."""
