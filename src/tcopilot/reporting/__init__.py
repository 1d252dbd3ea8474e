"""What finished runs say: tables, evidence, report pages."""
