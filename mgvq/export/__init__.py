"""A checkpoint for readers without mgvq: as plain 16-bit weights, or in the codes of another package where these say the same."""
