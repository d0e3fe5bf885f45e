"""Refits: the tables of codes that are chosen already, moved to where these codes serve best."""
