"""Numbers that were chosen by measuring: each with what was measured, and when to choose again.

They decide how fast a step is and nothing else. Times are of two cores of an Intel Xeon, unless it
says otherwise.
"""

# Elements in a chunk, which one thread takes through a kernel at a time. The streams of a chunk
# (variable, gradient, momentum, velocity: 128 KiB in float32) fit a core's second-level cache. Four
# million elements by two threads, in ms: 2.44 in chunks of 1024, 1.53 of 4096, 1.54 of 8192, 1.45
# of 16384, 1.44 of 65536. Larger ones gain little, and what waits for a late thread waits longer.
CHUNK = 8192

# Elements in a step below which no helper thread is woken. Alone and with a helper, in us: 64 and
# 101 for 2**17 elements, 172 and 210 for 2**18, 324 and 320 for 2**19, 618 and 477 for 2**20.
PARALLEL = 1 << 19

# The same where the threads are PyTorch's own, which spin for a while after each of its operations.
# What counts is a step in a training loop, whose memory no cache holds: the kernel of an MLP's
# 109,386 elements takes 200 us alone and 105 with them, after a forward and a backward pass. With
# all in the cache they pay later; alone and with them a step takes 189 and 208 us for 2**16
# elements, 330 and 325 for 2**17, 452 and 406 for 2**18. (Two cores of an AMD EPYC.)
SPINNING = 1 << 15

# Bytes of a state tensor of PyTorch from which on it is asked for in huge pages, of two MiB.
HUGE = 2 << 20

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
# nanosecond for each element on a CPU, and is not vectorised as this is.
LANES = 128
