"""How difficulty is measured: train on some folds, measure the pairs of another.

1. `folds` and `protocols`: who is trained on what.
2. `scorer`: one training and its records; `held_out`: the evaluations on the way.
"""
