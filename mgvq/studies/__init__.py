"""Studies: a file of named arms becomes runs, and the missing ones are run."""
