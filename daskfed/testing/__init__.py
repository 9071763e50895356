"""Fakes that daskfed's tests and plugins' contract tests share: each a real, small implementation in virtual time.

:mod:`.clock` the virtual clock; :mod:`.transport` an in-memory connection with bad weather, through the real link and
codec; :mod:`.scheduler` the stand-in for a site's scheduler and workers.
"""
