"""The workers: ingester, archiver, compactor, janitor and resolver, one module each, and how they run together."""
