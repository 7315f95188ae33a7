"""PPOTrainer: the loop of `fastppo-train` behind the class that TRL had until September 2026.

The modules, in the order in which they are read: names (TRL's names of settings, and what each
became), arguments (PPOConfig), objects (models, adapters and rewards), records (data sets),
settings (the arguments of PPOTrainer), callbacks (transformers' callbacks), ppo_trainer.
"""
