"""Answering: requests, the cache of keys and values, sampling, and the loop from prompt to text."""
