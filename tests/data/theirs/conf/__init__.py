"""The yamls, found by hydra.searchpath=[pkg://theirs.conf]."""
