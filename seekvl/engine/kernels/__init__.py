"""Decoding on a CPU, compiled from C++: steps and products that read weights as fast as memory gives them.
Experts learn through them, too.
"""
