"""The embedded model, and the scripts that made it."""
