"""What a run would do and cost, worked out without doing it.

1. `architecture`: sizes of a model, from its configuration alone; how many parameters an adapter trains.
2. `settings`: the pass-through settings of a stage that decide its cost, the libraries' defaults filled in.
3. `forwarding`: in which rows and batches the engine takes pairs through the model.
4. `batches`: batches and updates of a training, and what plain ones hold; `dealing`: what this package's
   trainer makes of them.
5. `costs`: FLOPs and memory from these; `device`: what this machine can do.
6. `inputs`: the pairs, as far as they can be had; `cached`: which stages need not be run again.
7. `workload`: every job of a run and what it computes (`scorer_work` a scorer's); `pricing` adds the costs.
8. `protocols`: what each way of scoring takes (beside `plain` batches) and keeps (as `measured`).
9. `words` and `protocol_words` write it down, in `quantities` that people read.
"""
