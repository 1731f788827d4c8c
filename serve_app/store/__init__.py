"""The job store: SQLite on one machine, PostgreSQL for more."""
