"""What a run would do and cost, worked out without doing it.

1. `architecture`: sizes of a model, from its configuration alone; how many parameters an adapter trains.
2. `settings`: the pass-through settings of a stage that decide its cost, the libraries' defaults filled in.
3. `batches`: how many batches and updates a training makes, and how many padded tokens they hold.
4. `costs`: FLOPs and memory from these; `device`: what this machine can do.
5. `inputs`: the pairs, as far as they can be had; `cached`: which stages need not be run again.
6. `workload`: every job of a run and what it computes; `pricing` adds the costs; `words` writes it down.
"""
