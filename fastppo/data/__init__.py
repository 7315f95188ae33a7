"""Data sets, described as in LLaMA-Factory's `dataset_info.json`, and their encoding.

The modules, in the order in which they run: info (finds a data set by its name), files (reads raw
rows), records (converts rows to conversations), mixing (mixes several sets, and splits off records
for evaluation), encode (converts conversations to token ids). Reading needs neither torch nor a
tokenizer, so that bad data is reported at once.
"""

from fastppo.data.encode import encode_pairs, encode_prompts, fit_prompt
from fastppo.data.mixing import Records, read_records
from fastppo.data.records import Record

__all__ = ["Record", "Records", "encode_pairs", "encode_prompts", "fit_prompt", "read_records"]
