"""What a finished run shows: traces of its evaluation, the theorem's quantities, and the report page."""
