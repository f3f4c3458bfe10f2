"""Log-probabilities of pairs under a model.

1. `packed` makes the rows that a model reads, and `padded` those of models that need a mask for them.
2. `packing_support` says which models can take packed rows, tries it on a pair, and counts what rows cost.
3. `memory` cuts pairs into batches within a budget, and into smaller ones when memory runs out.
4. `compute` runs a model over all batches; `reference` does that once for the starting policy.
5. `nonfinite` keeps the few pairs aside whose log-probabilities are not finite.
"""
