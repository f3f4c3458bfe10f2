"""Several processes: their group, how they are launched, workers, signals, and progress on the terminal."""
