"""Log-probabilities of pairs under a model: rows, batches, processes, the reference cache.

1. `shared_rows` puts a pair into one row, its prompt once; `padded_rows` each completion into its own.
2. `heads` runs TRL's fused head on the positions that predict a completion, and on no others.
3. `forward` runs a model over shared rows, for scoring and for training.
4. `paths` says which models can take shared rows; `ways` tries it on a pair and chooses.
5. `memory` cuts pairs into batches within a budget, and smaller ones when memory runs out.
6. `logprobs` runs a model over all batches, each process its share, and returns keyed columns.
7. `reference` does that once for the starting policy and publishes the result for everyone else.
"""
