/* What stands in for libcuda.so.1 in test_triton.py: it notes what is launched, and launches nothing. */
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

enum { LONGEST = 64 };
int launches;
unsigned programs, threads;
uint64_t stream, function, parameters[LONGEST];
int wanted; /* how many parameters, of eight bytes each */

int cuLaunchKernelEx(const Config *config, void *f, void **given, void **extra) {
  (void)extra;
  launches += 1;
  programs = config->grid[0];
  threads = config->block[0];
  stream = (uint64_t)config->stream;
  function = (uint64_t)f;
  for (int i = 0; i < wanted; i++) memcpy(&parameters[i], given[i], 8);
  return 0;
}

int cuCtxGetCurrent(void **context) { return *context = &launches, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuGetErrorString(int code, const char **words) { return (void)code, *words = "an error", 0; }

/* What else Triton links to: nothing of it is called here, or it may do nothing. */
#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuCtxGetDevice) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGetAttribute) NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuDriverGetVersion)
NOTHING(cuFuncGetAttribute) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleGetFunction) NOTHING(cuModuleLoadData) NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuPointerGetAttribute) NOTHING(cuPointerGetAttributes)
NOTHING(cuStreamIsCapturing) NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuTensorMapEncodeTiled)
