"""Log-probabilities of pairs under a model.

`rows` makes what a model reads and runs it; `packing_support` chooses the kind of rows; `memory` cuts batches
within a budget. `compute` runs all batches, `reference` does that for the starting policy, and `nonfinite`
keeps pairs aside that have no number.
"""
