"""From a run's files to something a person reads.

1. `content` reads a run's folder; `figures` draws it; `page` makes `report.html` of it.
2. `tables`: results as text for the terminal; `inspect`: pairs to read.
"""
