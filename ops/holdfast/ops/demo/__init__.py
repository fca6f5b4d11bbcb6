"""``holdfast demo``: three small agents at work, and what became of what they handed each other.

:mod:`library` holds what they can do, :mod:`agents` how they work together, :mod:`figures` what is measured afterwards,
:mod:`screen` how it is shown, :mod:`story` the order of it all.
"""
