"""Chat templates by LLaMA-Factory's names: text around what is said, and where a response ends.

transformers' apply_chat_template knows the tokenizer's own template only, and no name of another.
"""

from fastppo.templates.formats import TEMPLATES, check_name
from fastppo.templates.template import Message, Template, get_template

__all__ = ["TEMPLATES", "Message", "Template", "check_name", "get_template"]
