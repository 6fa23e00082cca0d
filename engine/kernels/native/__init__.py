"""Kernels in C++ for one CPU, in float32: products with packed weights, paged attention, norms and gates.

`calls.py` is how JAX sees them, `build.py` compiles them, and each `.cc` is compiled by itself. XLA calls them on its own threads.
They know buffers only: neither models nor requests; nothing is shared between two calls but scratch memory of a thread.

The promise everything here keeps: a row's result never depends, in a single bit, on what else is in the launch.

- Products: y[t, n] is one accumulator, fed by d = 0, 1, 2, … in that order, whatever the blocking. A row of nothing but zeros, as
  padding mostly is, costs a look and its zeros.
- Rows: a norm's squares are added up in an order that the length alone decides.
- Attention: keys are met in blocks by absolute position, and what splits of them give is added up in their order; a masked key
  adds exactly nothing. So a query's result is also the same however its prompt was cut into chunks, whether it came in a
  prefill or a decode, and on however many threads.
"""
