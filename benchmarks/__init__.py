"""What guidance costs, measured; run `python dev.py bench`."""
