"""Where the runs of a study happen: processes of this machine, jobs of Slurm, tasks of a Ray cluster."""
