"""Tables, evidence and report pages from finished runs."""
