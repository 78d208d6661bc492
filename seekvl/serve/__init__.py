"""Talking: one HTTP server in the dialects of OpenAI, Cog and Replicate, and a page, over one engine."""
