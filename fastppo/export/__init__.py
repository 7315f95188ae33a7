"""`fastppo-export`: what a run trained, as a plain transformers folder."""
