"""What bench.py measures and compares with."""
