"""Data that the project draws itself: leaf packages, which import no stage."""
