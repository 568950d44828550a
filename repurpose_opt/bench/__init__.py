"""Benchmarks of solvers: test sets and what runs them."""
