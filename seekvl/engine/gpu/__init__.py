"""How a CUDA device answers; on a CPU the same step runs as its own reference.

- `switch`: whether, and how far; the one place that is asked.
- `decoder`: a step of decoding on memory that never moves, recorded as a CUDA graph and replayed.
- `kernels`: its attention over the cache, in torch; `triton_kernels`: the same and the experts, in Triton.
- `layers`: the classes that experts and vision blocks get on a GPU.
"""
