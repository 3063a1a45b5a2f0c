"""Experiments: protocols, rows of results and the tables made of them."""
