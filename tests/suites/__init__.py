"""Dask's and xarray's own test suites, run over a federation of two sites; ``python -m tests.suites`` runs them."""
