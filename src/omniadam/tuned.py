"""Numbers that were chosen by measuring: each with what was measured, and when to choose again.

They decide how fast a step is and nothing else. Times are of two cores of an Intel Xeon.
"""

# Elements in a chunk, which one thread takes through a kernel at a time. The streams of a chunk
# (variable, gradient, momentum, velocity: 128 KiB in float32) fit a core's second-level cache.
CHUNK = 8192

# Elements in a step below which no helper thread is woken: waking one costs what a core does to
# some 100,000 elements, and its caches are cold.
PARALLEL = 1 << 19

# Elements in a buffer through which strided memory goes, in chunks: for a kernel, and for NumPy,
# whose temporaries should stay in the cache.
BUFFERED, BUFFERED_ON_NUMPY = 8, 2

# Variables in one call of the kernels from XLA, which takes time by the square of the operands of a
# call and more: 27 s to compile 800 variables in one.
IN_A_CALL = 64

# Elements in a part of a TensorFlow step that XLA compiles by itself. XLA splits each of its loops
# over the threads and waits for all of them, 500 times a step of ResNet-50; parts that TensorFlow
# runs side by side do not wait for each other.
PART = 1 << 18

# Lanes in which a sum of squares is added up by halves on TensorFlow: XLA's own sum takes a
# nanosecond for each element on a CPU, this an eighth of that.
LANES = 128
