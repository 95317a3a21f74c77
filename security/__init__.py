"""Keys, certificates, private files and secure aggregation. Knows no model and no transport."""
