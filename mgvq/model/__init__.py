"""The models: loading them, listing their quantisable layers, and turning questions into their inputs."""
