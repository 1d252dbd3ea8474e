"""What is refused before weights load: the config alone, the parts that it builds, the models and the data."""
