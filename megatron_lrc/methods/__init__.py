"""What is trained, and how: a folder per method."""
