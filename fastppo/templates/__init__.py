"""Chat templates by LLaMA-Factory's names: the text around messages, and the tokens that end one.

transformers' apply_chat_template has only the tokenizer's own template, and no templates by name.
"""

from fastppo.templates.formats import TEMPLATES, check_name
from fastppo.templates.template import Message, Template, get_template, note_on_template

__all__ = ["TEMPLATES", "Message", "Template", "check_name", "get_template", "note_on_template"]
