"""DPO training with TRL: on prepared pairs, and on a curriculum.

1. `arguments`: a recipe's settings as TRL's `DPOConfig`.
2. `trainer`: `PairTrainer`, TRL's `DPOTrainer` for tokenized rows that carry reference log-probs;
   `batching`: the batches of an update.
3. `selective_trainer`: `SelectiveDPOTrainer`, the public trainer that follows a curriculum.
4. `checkpointing`: trainings that survive being killed.
5. `train`: the training stage; `publish` and `card`: what is kept of it.
"""
