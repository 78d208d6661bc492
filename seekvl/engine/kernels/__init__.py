"""Products for decoding on a CPU, compiled from C++: they read weights as fast as memory gives them."""
