"""Chat templates by LLaMA-Factory's names: the text around messages, and where a response ends.

transformers' apply_chat_template knows the tokenizer's own template only, and no name of another.
"""

from fastppo.templates.formats import TEMPLATES, check_name
from fastppo.templates.template import Message, Template, get_template

__all__ = ["TEMPLATES", "Message", "Template", "check_name", "get_template"]
