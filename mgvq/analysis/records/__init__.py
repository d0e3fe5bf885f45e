"""Records: what finished runs left, gathered into one table a study."""
