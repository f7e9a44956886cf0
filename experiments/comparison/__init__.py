"""What may stand in one table, at which budget, and the table."""
