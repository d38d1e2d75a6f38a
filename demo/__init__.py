"""The demo models, and the scripts that made them."""
