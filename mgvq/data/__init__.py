"""Data that the project draws itself, and where public data is found: leaf packages, which import no stage."""
