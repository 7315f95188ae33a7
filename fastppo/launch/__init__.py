"""Starting a run of several processes by another launcher than torchrun: Ray."""
