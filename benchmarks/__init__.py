"""Benchmarks of Holdfast: each figure beside its raw limit, both measured in turn in the same run.

The raw limit is what the bare parts (nats-py, pyarrow, a dict) reach doing the same work with no Holdfast between.
An absolute figure tells about the machine it was measured on; the ratio tells about Holdfast.
"""
