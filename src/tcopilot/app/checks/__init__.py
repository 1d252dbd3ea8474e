"""What is refused before weights load."""
