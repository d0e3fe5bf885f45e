"""A third party's package: one variant of each group. Nothing in mgvq knows of it (tests/e2e/test_third_party.py)."""
