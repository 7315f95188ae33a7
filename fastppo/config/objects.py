"""What a program gives as objects where a YAML file has names. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
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
    rewards: Mapping[str, Any] = field(default_factory=dict)  # name in reward_model -> what scores

    def under(self, key: str | None) -> Any:
        """The model that is given in place of the key, None being model_name_or_path; or None."""
        models = {None: self.model, "model_name_or_path": self.model}
        models |= {"ref_model": self.ref_model, "critic_model": self.critic_model}
        return models.get(key)

    def names(self) -> set[str]:
        """The keys in whose place there are models."""
        found = {"ref_model", "critic_model"}
        found = {name for name in found if getattr(self, name) is not None}
        return found | ({"model_name_or_path"} if self.model is not None else set())
