"""Everything that speaks NATS: topology, hot tier, event log, dead letters, reading by sequence, services.

The only part of Holdfast that imports ``nats``.
"""
