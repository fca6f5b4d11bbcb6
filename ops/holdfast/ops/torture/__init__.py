"""Proof under faults: load, faults and a checker that believes nothing but its own record.

Producers note every attempt before it leaves their process and every acknowledgement after it came (``history``), while
faults are injected on a schedule that a seed decides (``schedule``, ``faults``).  At the end everything that can be
read is read in three ways (``observe``) and held against the record (``check``).

What is proven must not be proven by itself: the raw producers and the raw reader of this package talk to the server by
plain nats-py and take messages apart by themselves, so that a mistake in :mod:`holdfast.streams` cannot hide itself.
This package is therefore the one place beside ``holdfast.streams`` that imports ``nats``.
"""
