"""Triton kernels of a decode step (compute capability 8.0 and up), each with its oracle in `reference`.

`layers`: embedding, RMSNorm with the residual, rotary with the cache write, SwiGLU. `attention`: paged attention of one
new token a sequence. `sampling`: draw, log-probability, and everything that ends a step. Matrix products are torch's
but for those of few rows (`linear`) and with 8-bit weights (`tiled`).
"""
