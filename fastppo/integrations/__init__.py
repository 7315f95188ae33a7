"""Our operators in other people's trainers: one module for each, imported only where it is used.

| module         | what it puts in place                                                        |
|----------------|------------------------------------------------------------------------------|
| `transformers` | `patch_causal_lm`: a model's forward gives log-probs and entropies of labels |
| `trl`          | `patched`: the output head of TRL's trainers                                 |
| `verl`         | verl's fused output head, and policy losses under the names `fastppo_...`    |
| `openrlhf`     | PolicyLoss, ValueLoss and `log_probs_from_logits`                            |
| `liger`        | Liger's fused linear GRPO loss and scaled cross-entropy, with its arguments  |
"""
