"""Single runs as people look for them: listed, shown, held against each other, and sent to somebody else."""
