"""DPO training with TRL.

`arguments` are a recipe's settings as TRL's; `trainer` is TRL's trainer for prepared pairs, `batching` its
batches, and `selective_trainer` the public one that follows a curriculum. `checkpointing` lets trainings
survive; `train` is the stage, `publish` and `card` what is kept of it.
"""
