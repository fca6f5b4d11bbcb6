"""Wire types, names, references, limits and errors: what every other part of Holdfast speaks.

Imports only the standard library and msgspec.
"""
