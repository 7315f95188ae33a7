"""Keys of the data and the template reach the prompts that a run samples from."""

from __future__ import annotations


def test_thinking_and_truncation_are_what_the_file_says(state):
    thinks = state(template="qwen3")
    decode = thinks.tokenizer.decode
    header = "<|im_end|>\n<|im_start|>assistant\n"
    assert decode(thinks.prompts[0].ids).endswith(header)
    quick = state(template="qwen3", enable_thinking=False)
    assert decode(quick.prompts[0].ids).endswith(header + "<think>\n\n</think>\n\n")
    short = state(template="qwen3", cutoff_len=28)
    assert decode(short.prompts[-1].ids).endswith(header)
    assert max(len(prompt.ids) for prompt in short.prompts) == 28
    cut = state(template="qwen3", cutoff_len=28, lf_truncation=True)
    assert not decode(cut.prompts[-1].ids).endswith(header)
