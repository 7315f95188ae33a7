"""The base model, its adapters and heads, and the four roles that run on them."""
