"""The ledger of published claims: each one data, the runs that decide it, and what they say here."""
