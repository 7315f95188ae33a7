"""What scores a response: an adapter, a model, a server or a Python function."""
