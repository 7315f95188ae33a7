"""Kills, torn files, full disks and broken servers; `python -m pytest tests/reliability -q`."""
