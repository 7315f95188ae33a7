"""`fastppo-export`: merge a trained adapter into a model that plain transformers loads."""
