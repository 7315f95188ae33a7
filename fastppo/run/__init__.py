"""What any run does to the world: folders, signals, the console, pictures, trackers."""
