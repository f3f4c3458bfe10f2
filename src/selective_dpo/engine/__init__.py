"""Log-probabilities of pairs under a model: batching, processes, the reference cache.

1. `batching` sorts pairs by length and cuts them into batches of a bounded number of tokens.
2. `logprobs` runs a model over those batches, each process its share, and returns keyed columns.
3. `reference` does that once for the starting policy and publishes the result for everyone else.
"""
