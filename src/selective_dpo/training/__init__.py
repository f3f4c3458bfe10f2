"""DPO training with TRL: on prepared pairs, and on a curriculum.

1. `pair_trainer`: `PairTrainer`, TRL's `DPOTrainer` for tokenized rows that carry reference log-probs.
   `equal_weights`: its updates are means over their own pairs, on any number of processes.
2. `arguments`: a recipe's settings as TRL's `DPOConfig`.
3. `selective_trainer`: `SelectiveDPOTrainer`, the public trainer that follows a curriculum.
4. `order`: the record of which pairs were really consumed, in which order.
5. `train`: the recipe's training stage; `model_card`: what is said of its result.
"""
