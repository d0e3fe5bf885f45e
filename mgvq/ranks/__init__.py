"""Processes that share one run: whose samples and layers are whose, and how what they find comes together."""
