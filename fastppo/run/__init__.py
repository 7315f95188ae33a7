"""What both stages share outside their models: folders, signals, console, pictures, trackers."""
