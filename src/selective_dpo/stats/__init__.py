"""Statistics on arrays: estimates with intervals, bootstrap, rank correlation, win rates. NumPy only."""
