"""Growth curves: what an operation costs as the number of contexts, files, bytes, callers, versions or subjects grows.

Each curve is measured point by point in one run, with a power law fitted to it: cost = c · x^exponent, by least squares
of the logarithms.  An exponent of 0 is flat, 1 is proportional.  Beside each point stands the resident memory of every
process that took part.
"""
