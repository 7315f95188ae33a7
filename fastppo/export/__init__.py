"""`fastppo-export`: merge what a run trained into a folder that plain transformers loads."""
