"""One run: its identity, its folder, its execution. `build.py` alone calls Hydra's instantiate."""
