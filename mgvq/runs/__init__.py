"""One run: its identity, its folder, its execution. Hydra's instantiate is called in `build.py` and nowhere else."""
