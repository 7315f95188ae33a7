"""What a run asks: a reward server over HTTP, and vLLM as a server or beside the trainer."""
