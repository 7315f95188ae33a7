"""Chat templates by LLaMA-Factory's names: text around what is said, and where a response ends."""

from fastppo.templates.formats import TEMPLATES, check_name
from fastppo.templates.template import Message, Template, get_template

__all__ = ["TEMPLATES", "Message", "Template", "check_name", "get_template"]
