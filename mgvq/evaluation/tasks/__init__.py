"""Local tasks of lmms-eval: a yaml each, and the functions it names."""
