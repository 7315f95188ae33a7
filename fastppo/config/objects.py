"""What a program gives as objects where a YAML file has names. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Objects:
    """Models, a tokenizer and functions in place of names; a YAML file has none.

    The keys that would name them still hold a name, for messages and the model card.
    """

    model: Any = None  # in place of model_name_or_path: a PreTrainedModel or a PeftModel
    tokenizer: Any = None
    ref_model: Any = None
    critic_model: Any = None  # a causal LM, or a sequence classifier of one label
    value_head: Any = None  # nn.Linear, for the critic
    ref_adapter: str | None = None  # the model's adapter that is the reference
    # Name in reward_model -> a function, or a model and its score.
    rewards: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def under(self, key: str | None) -> Any:
        """The model that is given in place of the key, None being model_name_or_path; or None."""
        models = {None: self.model, "model_name_or_path": self.model}
        models |= {"ref_model": self.ref_model, "critic_model": self.critic_model}
        return models.get(key)

    def names(self) -> set[str]:
        """The keys in whose place there are models."""
        keys = ("model_name_or_path", "ref_model", "critic_model")
        return {key for key in keys if self.under(key) is not None}
