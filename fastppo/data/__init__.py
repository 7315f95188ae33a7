"""Records as LLaMA-Factory's `dataset_info.json` names them, and their encoding.

Read in the order in which it runs: info (what a name means), files (raw rows), records (rows to
conversations), mixing (several sets to one, and what is held out), encode (conversations to ids).
Reading needs neither torch nor a tokenizer, so that bad data is refused at once.
"""

from fastppo.data.encode import encode_pairs, encode_prompts, fit_prompt
from fastppo.data.mixing import Records, read_records
from fastppo.data.records import Record

__all__ = ["Record", "Records", "encode_pairs", "encode_prompts", "fit_prompt", "read_records"]
